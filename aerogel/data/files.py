"""Image files that are read one by one: `Lazy` stands where a tensor of all images would not fit the memory.

Before the first epoch every file is decoded once, as it will be (`examine`). So an epoch never meets a bad file, its
length is known, and the set has the fingerprint and the statistics it would have in memory: whether it fits changes
no number. What was found is kept in $XDG_CACHE_HOME/aerogel/images, by default in ~/.cache, and is valid for a file
as long as its size and its time of change are; the next run, and every other process of this one, begins at once.

Letters: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aerogel.data.decode import read_image, reason_of, strictly
from aerogel.errors import AerogelError, DataError
from aerogel.files import replacing

VERSION = 1  # of what is kept; another is not read
CHUNK = 4096  # files whose results wait at once
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the GIL


class Files(Protocol):
    """Image files, in a fixed order. It is sent to other processes, and holds no open file."""

    @property
    def origin(self) -> str:
        """What holds them, absolute."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """As the user finds it."""

    def stamp(self, row: int) -> str:
        """Changes whenever the file may have changed. Raises OSError when it is gone."""

    def open(self, row: int) -> Path | BinaryIO:
        """What Pillow reads. Raises DataError when it is no file with content."""


@dataclass(frozen=True, eq=False)
class Examined:
    """What reading every file once has shown. Of a file that cannot be read, digest and sums are zero."""

    reasons: list[str]  # "" where it can be read
    digests: np.ndarray  # uint8 (N, 32): sha256 of the pixels
    sums: np.ndarray  # int64 (N, C, 2): of the pixels and of their squares


@dataclass(frozen=True, eq=False)
class Lazy:
    """Like a uint8 tensor (N, C, H, W) in what a Split needs: `len`, `shape`, and indexing, which decodes.

    Indexing raises DataError naming a file that could be read when it was examined and now cannot.
    """

    files: Files
    size: tuple[int, int, int]
    rows: np.ndarray  # int64 (N,): which of the files
    digests: np.ndarray  # uint8 (N, 32)
    sums: np.ndarray  # int64 (N, C, 2)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.size))

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, index: torch.Tensor | slice) -> Lazy:
        """Those that `index` (positions, a bool mask or a slice) picks; nothing is decoded."""
        which = index.numpy() if isinstance(index, torch.Tensor) else index
        return Lazy(self.files, self.size, self.rows[which], self.digests[which], self.sums[which])

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Their pixels: uint8 (n, C, H, W). In threads, but in one alone where a worker process reads."""
        rows = self.rows[index.numpy() if isinstance(index, torch.Tensor) else index]
        images = torch.empty((len(rows), *self.size), dtype=torch.uint8)

        def read(place: int) -> None:
            try:
                images[place] = read_image(self.files.open(rows[place]), self.size)
            except Exception as error:  # Pillow raises anything at all on a damaged file
                raise DataError(
                    f"load: {self.files.name(rows[place])} was readable when the set was loaded and is not now "
                    f"({reason_of(error)}); put it back and resume"
                ) from error

        alone = len(rows) < 4 or torch.utils.data.get_worker_info() is not None
        with strictly():
            _each(read, len(rows), 1 if alone else THREADS)
        return images


def examine(files: Files, size: tuple[int, int, int]) -> Examined:
    """Reads every file once, or remembers what that showed."""
    stamps = [_stamp(files, row, size) for row in range(len(files))]
    kept = _kept_path(files, size)
    known = _recall(kept, size[0])
    reasons = [""] * len(files)
    digests = np.zeros((len(files), 32), np.uint8)
    sums = np.zeros((len(files), size[0], 2), np.int64)
    missing = []
    for row, stamp in enumerate(stamps):
        if stamp in known:
            reasons[row], digests[row], sums[row] = known[stamp]
        else:
            missing.append(row)

    def look(place: int) -> None:
        row = missing[place]
        try:
            pixels = read_image(files.open(row), size)
        except Exception as error:  # Pillow raises anything at all on a damaged file
            reasons[row] = reason_of(error)
        else:
            digests[row] = np.frombuffer(hashlib.sha256(pixels.contiguous().numpy().data).digest(), np.uint8)
            flat = pixels.flatten(1).long()
            sums[row] = torch.stack((flat.sum(1), flat.square().sum(1)), dim=1).numpy()

    with strictly():
        _each(look, len(missing), THREADS)
    if missing or len(known) != len(stamps):
        with suppress(AerogelError, OSError):  # no room, or read-only: it is read again next time
            _remember(kept, stamps, reasons, digests, sums)
    return Examined(reasons, digests, sums)


def decode_all(files: Files, size: tuple[int, int, int]) -> tuple[torch.Tensor, list[str]]:
    """Every image in memory, uint8 (N, C, H, W), and the reason ("" for none) why it could not be read."""
    images = torch.empty((len(files), *size), dtype=torch.uint8)
    reasons = [""] * len(files)

    def read(row: int) -> None:
        try:
            images[row] = read_image(files.open(row), size)
        except Exception as error:  # Pillow raises anything at all on a damaged file
            reasons[row] = reason_of(error)

    with strictly():
        _each(read, len(files), THREADS)
    return images, reasons


class _Task(Protocol):
    def __call__(self, place: int, /) -> None: ...


def _each(task: _Task, count: int, threads: int) -> None:
    """task(0), task(1), ... task(count - 1), in threads."""
    if threads == 1 or count < 2:
        for place in range(count):
            task(place)
        return
    with ThreadPoolExecutor(threads) as pool:
        for part in _chunks(count):
            list(pool.map(task, part))


def _chunks(count: int) -> Iterator[range]:
    return (range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def _stamp(files: Files, row: int, size: tuple[int, int, int]) -> bytes:
    try:
        stamp = files.stamp(row)
    except OSError:
        stamp = "gone"
    return hashlib.sha256(f"{VERSION} {size} {files.name(row)} {stamp}".encode()).digest()


def _kept_path(files: Files, size: tuple[int, int, int]) -> Path:
    name = hashlib.sha256(f"{size} {files.origin}".encode()).hexdigest()[:24]
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "aerogel" / "images" / f"{name}.safetensors"


def _remember(path: Path, stamps: list[bytes], reasons: list[str], digests: np.ndarray, sums: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {str(row): reason for row, reason in enumerate(reasons) if reason}
    keys = np.frombuffer(b"".join(stamps), np.uint8).reshape(-1, 32)
    with replacing(path) as temp:
        save_file({"stamps": keys, "digests": digests, "sums": sums}, temp, metadata=told)


def _recall(path: Path, channels: int) -> dict[bytes, tuple[str, np.ndarray, np.ndarray]]:
    """What was kept, by stamp; nothing when it is absent, damaged or of another shape."""
    try:
        held = load_file(path)
        told = _metadata(path)
        stamps, digests, sums = held["stamps"], held["digests"], held["sums"]
        if not len(stamps) == len(digests) == len(sums) or sums.shape[1:] != (channels, 2):
            return {}
    except (OSError, KeyError, ValueError, SafetensorError):
        return {}
    return {stamps[row].tobytes(): (told.get(str(row), ""), digests[row], sums[row]) for row in range(len(stamps))}


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata() or {}
