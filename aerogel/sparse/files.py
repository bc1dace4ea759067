"""Coded tensors in a .safetensors file. Any reader of safetensors opens it, and finds a row of bytes for each tensor.

Each is an ordinary U8 tensor of the same name: CRC-32 of what follows, then the coded tensor (`codec.py`). The header
of safetensors spends some 80 bytes a name, so those that are small lie together in one, TOGETHER: the names, a line
each, as a stream of their own (`entropy.py`), then the coded tensors in that order. The file's metadata say
{"format": FORMAT}.
Nothing is allotted for a tensor before its type and shape were seen: `read` gives these, then a tensor at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors
from safetensors.numpy import load_file, save
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.files import refuse_device
from aerogel.imports import one_line
from aerogel.sparse import codec, entropy
from aerogel.sparse.bits import Cursor, sized, varint
from aerogel.sparse.codec import Header

FORMAT = "aerogel.sparse.1"
TOGETHER = "..together"  # no module has an empty name, so no tensor is called so
SMALL = 1 << 14  # bytes of a coded tensor that lies with others
MOST_NAMES = 1 << 24  # bytes of all their names

Found = TypeVar("Found")


def write(tensors: Mapping[str, Tensor], path: Path) -> dict[str, bytes]:
    """Writes the file; gives each tensor as it was coded. Each is decoded again first, and compared.

    Raises OSError when it cannot be written, AerogelError for a tensor that cannot be coded, or a name of two lines.
    """
    if odd := [name for name in tensors if "\n" in name]:
        raise AerogelError(f"sparse: {odd[0]!r} must be a name of one line; rename that module, or save without sparse")
    coded = {name: _proved(name, tensor) for name, tensor in tensors.items()}
    stored = {name: data for name, data in coded.items() if len(data) >= SMALL}
    if small := {name: data for name, data in coded.items() if name not in stored}:
        stored[TOGETHER] = _joined(small)
    rows = {
        name: np.frombuffer(zlib.crc32(data).to_bytes(4, "little") + data, np.uint8) for name, data in stored.items()
    }
    path.write_bytes(save(rows, metadata={"format": FORMAT}))
    return coded


def _proved(name: str, tensor: Tensor) -> bytes:
    """The coded tensor, after it was decoded again and found the same."""
    try:
        data = codec.encode(tensor)
    except AerogelError as error:
        raise AerogelError(f"{error} ({name})") from error
    if not codec.same(codec.decode(data), tensor):
        raise AerogelError(f"sparse: {name} does not come back as it was; save it without sparse, and report this")
    return data


def is_sparse(path: Path) -> bool:
    """Whether the file says that it was written here. Raises AerogelError when it is absent or not safetensors."""
    try:
        refuse_device(path)
        with safetensors.safe_open(path, "numpy") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


class Coded(Mapping[str, Header]):
    """The tensors of a file by name: type and shape, known before any is decoded."""

    def __init__(self, path: Path, coded: Mapping[str, bytes]) -> None:
        self.path, self._coded = path, dict(coded)
        self._headers = {name: self._told(name, codec.header) for name in coded}

    def __getitem__(self, name: str) -> Header:
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def decode(self) -> dict[str, Tensor]:
        """All of them, one after the other; each time what was coded is let go.

        Raises AerogelError naming file and tensor when it is damaged, when this machine's memory is too small, or the
        second time.
        """
        if len(self._coded) < len(self):
            raise AerogelError(f"{self.path} was decoded before, and what was coded is let go; read it again")
        need, have = sum(header.dense_bytes for header in self.values()), _memory()
        if need + max((header.working_bytes for header in self.values()), default=0) > have:
            raise AerogelError(
                f"{self.path} says that it holds {need:,} bytes, this machine has {have:,}; it is corrupt or too large"
            )
        return {name: self._told(name, codec.decode, drop=True) for name in self}

    def _told(self, name: str, function: Callable[[bytes], Found], drop: bool = False) -> Found:
        try:
            return function(self._coded.pop(name) if drop else self._coded[name])
        except AerogelError as error:
            raise AerogelError(f"{self.path}: {name} is corrupt: {error}") from error


def read(path: Path) -> Coded:
    """The tensors of a file that `write` wrote, none of them decoded.

    Raises AerogelError naming the file, and the tensor, when it is absent, of another format, cut short or damaged.
    """
    if not is_sparse(path):
        raise AerogelError(f"{path} holds no sparse tensors: its format is not {FORMAT}; it is another program's")
    try:
        rows = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error
    except (TypeError, AttributeError) as error:  # a type that numpy has not, such as BF16; here all are U8
        raise AerogelError(f"{path} holds other types than bytes ({one_line(error)}); it is corrupt") from error
    coded: dict[str, bytes] = {}
    for name, row in rows.items():
        if row.dtype.isbuiltin != 1:  # numpy has such a type after all where ml_dtypes was imported
            raise AerogelError(f"{path} holds other types than bytes ({row.dtype}); it is corrupt")
        data = row.tobytes()
        if row.dtype != np.uint8 or row.ndim != 1 or zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
            raise AerogelError(f"{path}: {name} does not match its checksum; it is corrupt")
        found = _apart(path, data[4:]) if name == TOGETHER else {name: data[4:]}
        if twice := found.keys() & coded.keys():
            raise AerogelError(f"{path} holds {min(twice)} twice; it is corrupt")
        coded |= found
    return Coded(path, coded)


def _joined(coded: Mapping[str, bytes]) -> bytes:
    names = "\n".join(coded).encode() + b"\n"
    packed = entropy.pack(np.frombuffer(names, np.uint8))
    return b"".join([varint(len(names)), packed, *map(sized, coded.values())])


def _apart(path: Path, data: bytes) -> dict[str, bytes]:
    """The coded tensors that lie together."""
    cursor, found = Cursor(data), {}
    try:
        size = cursor.varint()
        if not 0 < size <= MOST_NAMES:
            raise AerogelError(f"names of {size} bytes")
        names = entropy.unpack(cursor, size).tobytes().decode().removesuffix("\n").split("\n")
        for name in names:
            if name in found:
                raise AerogelError(f"{name} is there twice")
            found[name] = cursor.sized()
        cursor.end()
    except ValueError as error:  # AerogelError and UnicodeDecodeError are ones
        raise AerogelError(f"{path}: {TOGETHER} is corrupt: {error}") from error
    return found


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _unreadable(path: Path, error: Exception) -> AerogelError:
    reason = one_line(error) if os.path.exists(path) else "no such file"
    return AerogelError(f"cannot read {path}: {reason}; it is absent, corrupt or not safetensors")
