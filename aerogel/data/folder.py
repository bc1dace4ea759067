"""The user's own images: PATH/train/<class>/*.jpg ... and PATH/test/<class>/ or PATH/val/<class>/.

- Classes are the folders in train/, sorted by name. Validation is always carved from train: 10 %, stratified.
- Test is test/, else val/, else 20 % carved from train. With test/ there, val/ is not read.
- Decoding: EXIF orientation applied, transparency laid over white, 16-bit grey scaled by 1/257, first frame
  of an animation, RGB (or luma, when C is 1), shorter side resized to the target and the centre cropped.
- Names that start with a dot are ignored. What cannot be read is skipped and listed in `Dataset.bad_files`.

A folder's files are not trusted: only the formats below are tried (Pillow would run Ghostscript on an EPS
named .jpg), and an image of more pixels than Pillow's limit is refused before it is decoded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aerogel.data.dataset import Dataset, Split
from aerogel.data.prepare import assemble, carve, check_memory, check_size
from aerogel.errors import DataError
from aerogel.imports import one_line

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
CLUTTER = frozenset(("thumbs.db", "desktop.ini"))
DEFAULT_SIZE = (3, 224, 224)
VAL_SHARE, TEST_SHARE = 0.1, 0.2
MAX_UNREADABLE = 0.05
BadFiles = tuple[tuple[str, str], ...]  # (path, reason)


class Listing(NamedTuple):
    files: list[Path]  # by class, then by name
    labels: list[int]  # of each file
    stray: BadFiles  # what is no image by its name


def load_folder(path: str | Path, size: tuple[int, int, int] | None = None) -> Dataset:
    """The image folder at `path`, decoded to `size` (C, H, W); default (3, 224, 224).

    Raises DataError when folders are missing, with fewer than two classes, for a class without a readable
    image, a held-out class unknown in train, more than 5 % unreadable images, or too little memory (checked
    before anything is decoded).
    """
    size = size or DEFAULT_SIZE
    check_size(size)
    root = Path(path).expanduser()
    classes = _class_names(root / "train")
    if len(classes) < 2:
        found = ", ".join(map(_shown, classes)) or "none"
        raise DataError(f"load: {root}/train must hold two class folders or more, got {found}; add train/<class>/")
    listings = [_list(root / "train", classes)]
    held = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held is not None:
        unknown = sorted(set(_class_names(held)) - set(classes))
        if unknown:
            raise DataError(f"load: {held}/{_shown(unknown[0])} is no class of {root}/train; rename or move it")
        listings.append(_list(held, classes))
    check_memory(sum(len(listing.files) for listing in listings), size)

    splits, bad = zip(*(_decode_all(listing, size) for listing in listings), strict=True)
    _check_readable(root, listings, bad)
    train: Split = splits[0]
    present = torch.bincount(train.labels, minlength=len(classes))
    if not present.all():
        empty = _shown(classes[int((present == 0).nonzero()[0])])
        raise DataError(f"load: {root}/train/{empty} has no readable image; add some or remove the folder")
    if held is None:
        train, test = carve(train, max(1, round(TEST_SHARE * len(train))))
    else:
        test = splits[1]
        if len(test) == 0:
            raise DataError(f"load: {held} has no readable image in a class folder; add some or remove it")
    return assemble(
        f"folder:{path}",
        train,
        test,
        tuple(map(_shown, classes)),
        val=max(1, round(VAL_SHARE * len(train))),
        augment="crop_flip",
        bad_files=tuple(entry for listing in listings for entry in listing.stray) + sum(bad, ()),
    )


def read_image(path: str | Path, size: tuple[int, int, int]) -> torch.Tensor:
    """One image file as a folder's images are read. Shape: uint8 (C, H, W).

    Raises whatever Pillow raises on a damaged file, and ValueError for a pixel type without a defined white.
    """
    from PIL import Image, ImageOps

    channels, height, width = size
    with Image.open(path, formats=FORMATS) as image:
        twice = 2 * max(height, width)
        image.draft(None, (twice, twice))  # a JPEG is decoded at less than full size: far faster
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError(f"pixel type {upright.mode} has no defined white; save it with 8 or 16 bits")
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    flat = upright.convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).view(height, width, channels).permute(2, 0, 1)


def _class_names(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _list(folder: Path, classes: Sequence[str]) -> Listing:
    files: list[Path] = []
    labels: list[int] = []
    stray = [(entry, "not in a class folder") for entry in _visible(folder) if not entry.is_dir()]
    for label, name in enumerate(classes):
        for entry in _visible(folder / name) if (folder / name).is_dir() else ():
            if entry.is_dir():
                stray.append((entry, "a folder inside a class folder"))
            elif entry.suffix.lower() not in SUFFIXES:
                stray.append((entry, "not an image suffix"))
            else:
                files.append(entry)
                labels.append(label)
    return Listing(files, labels, tuple((_shown(entry), reason) for entry, reason in stray))


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files and the clutter of file managers."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"load: cannot list {folder} ({error.strerror}); images must lie in PATH/train/<class>/*.jpg"
        ) from error
    return [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in CLUTTER]


def _decode_all(listing: Listing, size: tuple[int, int, int]) -> tuple[Split, BadFiles]:
    """The readable images, and (path, reason) of every other. In threads: Pillow decodes outside the GIL."""
    from PIL import Image

    images = torch.empty((len(listing.files), *size), dtype=torch.uint8)

    def decode(row: int) -> str:
        path = listing.files[row]
        try:
            if not path.is_file():
                return "a broken link or not a regular file"
            if path.stat().st_size == 0:
                return "an empty file"
            images[row] = read_image(path, size)
        except Exception as error:  # Pillow raises anything at all on a damaged file
            return _reason(error)
        return ""

    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # of damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        reasons = list(pool.map(decode, range(len(listing.files))))
    good = torch.tensor([not reason for reason in reasons], dtype=torch.bool)
    every = Split(images, torch.tensor(listing.labels, dtype=torch.int64))
    bad = tuple((_shown(path), reason) for path, reason in zip(listing.files, reasons, strict=True) if reason)
    return (every if good.all() else every.subset(good)), bad


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}"
    return f"{type(error).__name__}: {one_line(error)}"


def _check_readable(root: Path, listings: Sequence[Listing], bad: Sequence[BadFiles]) -> None:
    total = sum(len(listing.files) for listing in listings)
    unread = [entry for entries in bad for entry in entries]
    if len(unread) > MAX_UNREADABLE * total:
        first = ", ".join(f"{path} ({reason})" for path, reason in unread[:3])
        raise DataError(
            f"load: {len(unread)} of {total} images under {root} cannot be read, more than "
            f"{MAX_UNREADABLE:.0%}: {first}; mend or remove them"
        )


def _shown(path: Path | str) -> str:
    """A file name that prints anywhere: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
