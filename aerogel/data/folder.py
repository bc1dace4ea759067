"""The user's own images: PATH/train/<class>/*.jpg ... and PATH/test/<class>/ or PATH/val/<class>/.

- Classes are the folders in train/, sorted by name. Validation is always carved from train: 10 %, stratified.
- Test is test/, else val/, else 20 % carved from train. With test/ there, val/ is not read.
- Names that start with a dot are ignored. What cannot be read is skipped and listed in `Dataset.bad_files`.
- How a file becomes pixels: decode.py. A set that does not fit the memory is decoded as it is used: files.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aerogel.data.dataset import Dataset
from aerogel.data.decode import SUFFIXES, shown
from aerogel.data.decode import read_image as read_image
from aerogel.data.listing import Listing, from_listings
from aerogel.data.prepare import check_size
from aerogel.errors import DataError

CLUTTER = frozenset(("thumbs.db", "desktop.ini"))
DEFAULT_SIZE = (3, 224, 224)


@dataclass(frozen=True)
class PathFiles:
    """Files of a file system."""

    origin: str
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return shown(self.paths[row])

    def stamp(self, row: int) -> str:
        told = self.paths[row].stat()
        return f"{told.st_size} {told.st_mtime_ns}"

    def open(self, row: int) -> Path:
        path = self.paths[row]
        if not path.is_file():
            raise DataError("a broken link or not a regular file")
        if path.stat().st_size == 0:
            raise DataError("an empty file")
        return path


def load_folder(path: str | Path, size: tuple[int, int, int] | None = None, *, lazy: bool = False) -> Dataset:
    """The image folder at `path`, decoded to `size` (C, H, W); default (3, 224, 224).

    lazy: images are decoded as they are used even if all would fit the memory.
    Raises DataError when folders are missing, with fewer than two classes, for a class without a readable
    image, a held-out class unknown in train, or more than 5 % unreadable images.
    """
    size = size or DEFAULT_SIZE
    check_size(size)
    root = Path(path).expanduser()
    classes = _class_names(root / "train")
    if len(classes) < 2:
        found = ", ".join(map(shown, classes)) or "none"
        raise DataError(f"load: {root}/train must hold two class folders or more, got {found}; add train/<class>/")
    held = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held is not None:
        unknown = sorted(set(_class_names(held)) - set(classes))
        if unknown:
            raise DataError(f"load: {held}/{shown(unknown[0])} is no class of {root}/train; rename or move it")
    train = _list(root / "train", classes)
    test = None if held is None else _list(held, classes)
    return from_listings(f"folder:{path}", train, test, tuple(map(shown, classes)), size, lazy=lazy)


def _class_names(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _list(folder: Path, classes: Sequence[str]) -> Listing:
    """By class, then by name."""
    paths: list[Path] = []
    labels: list[int] = []
    stray = [(entry, "not in a class folder") for entry in _visible(folder) if not entry.is_dir()]
    for label, name in enumerate(classes):
        for entry in _visible(folder / name) if (folder / name).is_dir() else ():
            if entry.is_dir():
                stray.append((entry, "a folder inside a class folder"))
            elif entry.suffix.lower() not in SUFFIXES:
                stray.append((entry, "not an image suffix"))
            else:
                paths.append(entry)
                labels.append(label)
    files = PathFiles(shown(folder.absolute()), paths)
    return Listing(files, labels, tuple((shown(entry), reason) for entry, reason in stray), shown(folder))


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files and the clutter of file managers."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"load: cannot list {folder} ({error.strerror}); images must lie in PATH/train/<class>/*.jpg"
        ) from error
    return [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in CLUTTER]
