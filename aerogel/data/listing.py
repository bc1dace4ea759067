"""A Dataset out of listed image files, whatever holds them: a folder, tar shards, tables.

Validation is always carved from train: 10 %, stratified. Test is what was held out, else 20 % carved from train.
What cannot be read is skipped and listed in `Dataset.bad_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from aerogel.data.dataset import Dataset, Split
from aerogel.data.files import Files, Lazy, decode_all, examine
from aerogel.data.prepare import assemble, carve, fits_memory
from aerogel.errors import DataError

VAL_SHARE, TEST_SHARE = 0.1, 0.2
MAX_UNREADABLE = 0.05
BadFiles = tuple[tuple[str, str], ...]  # (path, reason)


class TooManyBad(DataError):
    """More images than may be cannot be read; `bad` lists them all."""

    def __init__(self, message: str, bad: BadFiles) -> None:
        super().__init__(message)
        self.bad = bad


class Listing(NamedTuple):
    """Files of one split."""

    files: Files
    labels: Sequence[int]  # of each file
    stray: BadFiles = ()  # what is no image by its name
    place: str = ""  # where it lies, for messages


def from_listings(
    name: str,
    train: Listing,
    test: Listing | None,
    classes: Sequence[str],
    size: tuple[int, int, int],
    *,
    lazy: bool = False,
) -> Dataset:
    """The set of these files, decoded to `size` (C, H, W): in memory when it fits, unless `lazy`, else as it is used.

    Raises TooManyBad for more than 5 % unreadable images; DataError for a class without a readable training image or
    a test split without any.
    """
    listings = [train] if test is None else [train, test]
    lazy = lazy or not fits_memory(sum(len(listing.files) for listing in listings), size)
    splits, bad = zip(*(_read(listing, size, lazy) for listing in listings), strict=True)
    unread: BadFiles = sum(bad, ())
    _check_readable(train.place, sum(len(listing.files) for listing in listings), unread)
    rest: Split = splits[0]
    present = torch.bincount(rest.labels, minlength=len(classes))
    if not present.all():
        empty = classes[int((present == 0).nonzero()[0])]
        raise DataError(f"load: {train.place}/{empty} has no readable image; add some or remove the class")
    if test is None:
        rest, held = carve(rest, max(1, round(TEST_SHARE * len(rest))))
    else:
        held = splits[1]
        if len(held) == 0:
            raise DataError(f"load: {test.place} has no readable image of a class; add some or remove it")
    stray = sum((listing.stray for listing in listings), ())
    count = max(1, round(VAL_SHARE * len(rest)))
    return assemble(name, rest, held, classes, val=count, augment="crop_flip", bad_files=stray + unread)


def number_labels(
    given: Sequence[Sequence[Any]], places: Sequence[str], names: Sequence[str] | None = None
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Class numbers, and the classes: `names` that the labels number, or else the labels of the first split, sorted.

    given: the labels of each split, integers or texts. Raises DataError for a label that is neither, or that is no
    class.
    """
    if names is None:
        kinds = {type(label) for label in given[0]}
        if kinds not in ({int}, {str}):
            found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
            raise DataError(
                f"load: the labels of {places[0]} must all be integers or all be texts, got {found}; mend them"
            )
        order = sorted(set(given[0]))
        names = [str(label) for label in order]
    else:
        order = list(range(len(names)))
    number = {label: place for place, label in enumerate(order)}
    for labels, place in zip(given, places, strict=True):
        strange = next((label for label in labels if isinstance(label, bool) or label not in number), None)
        if strange is not None or None in labels:
            raise DataError(
                f"load: {place} has the label {strange!r}, which is no class of {places[0]}; choose another split or "
                "mend its labels"
            )
    return [[number[label] for label in labels] for labels in given], tuple(map(str, names))


def _read(listing: Listing, size: tuple[int, int, int], lazy: bool) -> tuple[Split, BadFiles]:
    """The readable images, and (path, reason) of every other."""
    files, labels = listing.files, torch.tensor(listing.labels, dtype=torch.int64)
    images: torch.Tensor | Lazy
    if lazy:
        found = examine(files, size)
        reasons = found.reasons
        images = Lazy(files, size, np.arange(len(files)), found.digests, found.sums)
    else:
        images, reasons = decode_all(files, size)
    good = torch.tensor([not reason for reason in reasons], dtype=torch.bool)
    bad = tuple((files.name(row), reason) for row, reason in enumerate(reasons) if reason)
    split = Split(images, labels)
    return (split.subset(good) if bad else split), bad


def _check_readable(place: str, total: int, unread: BadFiles) -> None:
    if len(unread) > MAX_UNREADABLE * total:
        first = ", ".join(f"{path} ({reason})" for path, reason in unread[:3])
        raise TooManyBad(
            f"load: {len(unread)} of {total} images under {place} cannot be read, more than {MAX_UNREADABLE:.0%}: "
            f"{first}; mend or remove them (aerogel data check lists them all)",
            unread,
        )
