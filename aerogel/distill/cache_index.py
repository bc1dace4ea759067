"""Where the rows of a teacher's cache (cache.py) are, in files that grow and are mapped."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aerogel.distill.cache_rows import Layout, Records, frames
from aerogel.errors import AerogelError


@dataclass
class _File:
    path: Path
    end: int = 0  # of the whole frames that were taken
    held: Any = None  # uint8 (bytes,), mapped


class Index:
    """Where the rows of one view are: which file, which byte."""

    def __init__(self, images: int) -> None:
        self.file, self.at = np.full(images, -1, np.int32), np.zeros(images, np.int64)
        self._files: list[_File] = []

    def take(self, path: Path, owner: bytes, layout: Layout) -> None:
        """The frames that the file has got since it was last looked at."""
        number, file = self._of(path)
        if path.stat().st_size <= file.end:
            return
        file.held = _mapped(path)
        for first, rows in frames(memoryview(file.held), file.end, owner, layout, str(path)):
            places = rows["key"] % len(self.file)
            self._set(number, places, first, layout.record.itemsize)
            file.end = first + rows.nbytes

    def add(self, path: Path, places: np.ndarray, first: int, itemsize: int) -> None:
        """Rows that this process has just written."""
        number, file = self._of(path)
        self._set(number, places, first, itemsize)
        file.end = first + len(places) * itemsize

    def _set(self, number: int, places: np.ndarray, first: int, itemsize: int) -> None:
        self.file[places] = number
        self.at[places] = first + itemsize * np.arange(len(places))

    def read(self, places: np.ndarray, layout: Layout) -> Records:
        """int64 (n,) -> (n,) records."""
        size = layout.record.itemsize
        raw = np.empty((len(places), size), np.uint8)
        for row, (number, at) in enumerate(zip(self.file[places].tolist(), self.at[places].tolist(), strict=True)):
            file = self._files[number]
            if file.held is None or len(file.held) < file.end:
                file.held = _mapped(file.path)
            raw[row] = file.held[at : at + size]
        return raw.reshape(-1).view(layout.record)

    def _of(self, path: Path) -> tuple[int, _File]:
        for number, file in enumerate(self._files):
            if file.path == path:
                return number, file
        self._files.append(_File(path))
        return len(self._files) - 1, self._files[-1]


def _mapped(path: Path) -> np.ndarray:
    """uint8 (bytes,), read from the disk when it is used."""
    try:
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise AerogelError(f"cache: cannot read {path}: {error}; delete this file, its rows are made anew") from error
