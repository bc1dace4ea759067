"""Atomic, durable writes: temp file in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aerogel.errors import AerogelError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temp path beside `path`; on leaving without error it durably becomes `path`.

    Raises AerogelError when the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        with open(temp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise AerogelError(f"cannot write {path}: {error.strerror or error}; {free_space(path)}") from error
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, caller: str) -> Iterator[Path]:
    """Yields a temp folder beside `path`; on leaving without error it becomes `path`, whole or not at all.

    Raises AerogelError when `path` exists (nothing is ever overwritten) or cannot be written.
    """
    path = Path(path)
    refuse_existing(path, caller)
    temp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        fsync_folder(temp)
        os.chmod(temp, 0o755)
        os.rename(temp, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise AerogelError(f"cannot write {path}: {error.strerror or error}; {free_space(path)}") from error
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)


def refuse_existing(path: Path, caller: str) -> None:
    if Path(path).exists():
        raise AerogelError(
            f"{caller}: {path} exists and is never overwritten; name another --out or move it away"
        )


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises AerogelError naming the file when it is absent or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AerogelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise AerogelError(
            f"{path} is not JSON ({error}); it is corrupt or not a file of aerogel's"
        ) from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> str:
    folder = next((p for p in Path(path).absolute().parents if p.exists()), Path("/"))
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free on its disk"
