"""Sets of the `datasets` library: `hf:NAME[@TRAIN[,TEST]]`.

NAME is a folder written by `save_to_disk`, a folder of parquet or arrow files (train*.parquet, test*.parquet), one
such file, or a set of the Hugging Face hub, which is downloaded when it is not in that library's cache. TRAIN and TEST
are its splits; without them train, and test or else validation. Validation is always carved from train.

The image column is the only one with images; the label is the column `label` or `labels`, else the only one of class
labels. Images are read out of the table as the files that they are (decode.py). Nothing in a set is run: since
datasets 4 a set is data alone.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aerogel.data.dataset import Dataset
from aerogel.data.folder import DEFAULT_SIZE
from aerogel.data.listing import Listing, from_listings, number_labels
from aerogel.data.prepare import check_size
from aerogel.errors import DataError, nearest
from aerogel.imports import one_line

TABLES = (".parquet", ".arrow")
HELD_OUT = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class TableFiles:
    """Image files in one column of a table."""

    origin: str
    table: Any  # a datasets.Dataset whose images are not decoded
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        return f"{self.origin} row {row}"

    def stamp(self, row: int) -> str:
        files = [Path(file["filename"]).stat() for file in self.table.cache_files]
        return f"{self.table._fingerprint} {[(told.st_size, told.st_mtime_ns) for told in files]} {row}"

    def open(self, row: int) -> Path | BinaryIO:
        held = self.table[int(row)][self.column]
        if held is None:
            raise DataError("the row has no image")
        if held["bytes"] is not None:
            if not held["bytes"]:
                raise DataError("an empty file")
            return io.BytesIO(held["bytes"])
        path = Path(held["path"] or "")
        if not path.is_absolute() or not path.is_file():
            raise DataError("the row has neither an image nor the path of a file")
        return path


def load_hub(rest: str, size: tuple[int, int, int] | None = None, *, lazy: bool = False) -> Dataset:
    """The set that `rest` (NAME[@TRAIN[,TEST]]) names, decoded to `size` (C, H, W); default (3, 224, 224).

    Raises DataError when the library is absent, the set or a split cannot be had, or its columns are not an image and
    a label; else as `from_listings`.
    """
    size = size or DEFAULT_SIZE
    check_size(size)
    name, _, chosen = rest.partition("@")
    found = _open(name)
    train, test = _splits(name, list(found), chosen)
    image, label, names = _columns(found[train], f"hf:{name}@{train}")
    parts = [train] if test is None else [train, test]
    files, given = [], []
    for part in parts:
        where = f"hf:{name}@{part}"
        if _columns(found[part], where) != (image, label, names):
            raise DataError(f"load: {where} must have the columns and classes of {train}; make them alike")
        files.append(TableFiles(where, _undecoded(found[part], image), image))
        given.append(list(found[part][label]))
    numbers, classes = number_labels(given, [file.origin for file in files], names)
    listings = [Listing(file, labels, (), file.origin) for file, labels in zip(files, numbers, strict=True)]
    return from_listings(f"hf:{rest}", listings[0], listings[1] if test else None, classes, size, lazy=lazy)


def _open(name: str) -> dict[str, Any]:
    """The set's splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('load: hf: needs the datasets library; pip install "aerogel[hf]"') from error
    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in TABLES:  # the library would look for a set called as the suffix is
        raise DataError(f"load: hf:{name} is no table; give a .parquet or .arrow file, or a folder of them")
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise DataError(f"load: hf:{name} is neither there nor the name of a set on the hub, as owner/name; check it")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            found = datasets.load_dataset(path.suffix.lstrip("."), data_files=str(path))
        else:
            found = datasets.load_dataset(str(path) if path.exists() else name)
    except Exception as error:  # the library's, Arrow's and the network's own
        raise DataError(
            f"load: hf:{name} cannot be had ({type(error).__name__}: {one_line(error)}); it must be a folder of "
            "save_to_disk, parquet or arrow files, or the name of a set on the hub, which needs the network once"
        ) from error
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _splits(name: str, known: list[str], chosen: str) -> tuple[str, str | None]:
    """The names of the training and the test split; None: test is carved."""
    asked = chosen.split(",") if chosen else []
    for split in asked:
        if split not in known:
            raise DataError(f"load: hf:{name} has no split {split!r}; {nearest(split, known)}")
    if len(asked) > 2 or len(set(asked)) < len(asked):
        raise DataError(f"load: hf:NAME@TRAIN,TEST takes two different splits at most, got {chosen!r}; name them")
    if asked:
        return asked[0], asked[1] if len(asked) == 2 else None
    train = "train" if "train" in known else known[0]
    if train != "train" and len(known) > 1:
        raise DataError(f"load: hf:{name} has no split train; choose as hf:{name}@{known[0]},{known[1]}")
    return train, next((split for split in HELD_OUT if split in known and split != train), None)


def _columns(table: Any, where: str) -> tuple[str, str, tuple[str, ...] | None]:
    """The image column, the label column and, where the set tells them, the names of the classes."""
    from datasets import ClassLabel, Image, Value

    def is_image(kind: Any) -> bool:
        return isinstance(kind, Image) or (isinstance(kind, dict) and "bytes" in kind)

    features = table.features
    images = [name for name, kind in features.items() if is_image(kind)]
    classed = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [name for name, kind in features.items() if isinstance(kind, Value)]
    named = [name for name in ("label", "labels") if name in classed or name in plain]
    labels = named or classed
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"load: {where} must have one column of images and one of labels (named label, or of class labels), got "
            f"{', '.join(features)}; select and rename its columns and save_to_disk"
        )
    kind = features[labels[0]]
    return images[0], labels[0], tuple(kind.names) if isinstance(kind, ClassLabel) and kind.names else None


def _undecoded(table: Any, image: str) -> Any:
    """Its images as the files that they are."""
    from datasets import Image

    chosen = table.with_format(None).select_columns([image])
    return chosen.cast_column(image, Image(decode=False)) if isinstance(table.features[image], Image) else chosen
