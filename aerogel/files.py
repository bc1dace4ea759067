"""Atomic, durable writes: temp file in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aerogel.errors import AerogelError

LARGEST_TEXT = 2**28  # bytes of a JSON or TOML file that is read


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temp path beside `path`; on leaving without error it durably becomes `path`.

    Raises AerogelError when the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    temp = _beside(path)
    try:
        yield temp
        fsync(temp)
        os.replace(temp, path)
        fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink()


@contextmanager
def new_folder(path: Path, caller: str) -> Iterator[Path]:
    """Yields a temp folder beside `path`; on leaving without error it becomes `path`, whole or not at all.

    Raises AerogelError when `path` exists (nothing is ever overwritten) or cannot be written.
    """
    path = Path(path)
    refuse_existing(path, caller)
    temp = _beside(path)
    try:
        temp.mkdir(parents=True)
        yield temp
        for item in [*temp.rglob("*"), temp]:
            fsync(item)
        os.rename(temp, path)
        fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def check_free(folder: Path, need: int, what: str) -> None:
    """Raises AerogelError unless `need` bytes are free on the disk that `folder` is or will be on, and it can be
    written there. Takes no time: nothing but an empty file is written.

    what: for which they are needed, as the message says it.
    """
    place = _existing(folder)
    try:
        free = shutil.disk_usage(place).free
        probe = place / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_write(folder / "any", error) from error
    if free < need:
        raise AerogelError(
            f"{folder}: {what} need {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free on its disk; "
            "make room or write elsewhere"
        )


def refuse_existing(path: Path, caller: str) -> None:
    """Raises AerogelError when something has that name already, be it a link that leads nowhere."""
    if os.path.lexists(path):
        raise AerogelError(f"{caller}: {path} exists and is never overwritten; name another --out or move it away")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Raises AerogelError for what JSON cannot hold (nan, infinity, objects), or when it cannot be written."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AerogelError(f"cannot write {path}: {error}; give finite numbers, texts, lists and dicts") from error
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Raises AerogelError naming the file when it is absent or not JSON."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise AerogelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AerogelError(f"{path} is not JSON ({error}); it is corrupt or not a file of aerogel's") from error


def read_toml(path: Path, caller: str = "", remedy: str = "name an existing TOML file") -> dict[str, Any]:
    """Raises AerogelError naming the file when it is absent or not TOML, and the remedy."""
    lead = caller and f"{caller}: "
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise AerogelError(f"{lead}cannot read {path}: {error.strerror or error}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise AerogelError(f"{lead}{path} is not TOML: {error}; {remedy}") from error


def read_text(path: Path) -> str:
    """A text that somebody may have tampered with. Raises OSError, also for a device, a pipe or what is far too large;
    UnicodeDecodeError."""
    refuse_device(path)
    size = os.stat(path).st_size
    if size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, over {LARGEST_TEXT:,}")
    return Path(path).read_text(encoding="utf-8")


def refuse_device(path: Path) -> None:
    """Raises OSError for what may never end, such as a link to /dev/zero or a named pipe."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is not a regular file")


def sha256(path: Path) -> str:
    refuse_device(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Returns once the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename is enough and stays on one disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    return next((p for p in [path, *path.parents] if os.path.isdir(p)), Path("/"))


def _cannot_write(path: Path, error: OSError) -> AerogelError:
    free = f"{shutil.disk_usage(_existing(path)).free / 2**20:.0f} MiB are free on its disk"
    return AerogelError(f"cannot write {path}: {error.strerror or error}; {free}: make room or write elsewhere")
