"""Tar shards in WebDataset's layout: `wds:SHARDS[@TEST_SHARDS]`, as wds:train-{000..015}.tar@test-{0..1}.tar.

A sample is the members of a shard with one key, the name up to the first dot after the last slash: an image
(0001.jpg, .png ...) and 0001.cls, an integer or a text, or 0001.json with "cls" or "label". SHARDS may have a range
{000..015}, zero-padded as written, or alternatives {a,b}. Order: shards as written, samples by name.

A shard is not read from end to end: its index is made once from the headers, and any image is then read at its place.
So training shuffles over all shards, every sample comes exactly once an epoch, and any number of processes reads the
batches that one would; shards need not be as many as processes, nor of one size. Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from aerogel.data.dataset import Dataset
from aerogel.data.decode import SUFFIXES, shown
from aerogel.data.folder import DEFAULT_SIZE
from aerogel.data.listing import BadFiles, Listing, from_listings, number_labels
from aerogel.data.prepare import check_size
from aerogel.errors import DataError
from aerogel.imports import one_line

BLOCK = 512  # of a tar file, which ends with blocks of zeros
LABEL_BYTES = 1 << 20  # of a .cls or .json; a longer one is no label
MOST_SHARDS = 1_000_000
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Place(NamedTuple):
    """Where one member lies."""

    shard: int
    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class ShardFiles:
    """Image files inside uncompressed tar files."""

    origin: str
    shards: Sequence[Path]
    places: Sequence[Place]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        place = self.places[row]
        return f"{shown(self.shards[place.shard])}/{shown(place.name)}"

    def stamp(self, row: int) -> str:
        place = self.places[row]
        told = self.shards[place.shard].stat()
        return f"{told.st_size} {told.st_mtime_ns} {place.offset} {place.length}"

    def open(self, row: int) -> BinaryIO:
        place = self.places[row]
        if place.length == 0:
            raise DataError("an empty file")
        return io.BytesIO(_content(self.shards[place.shard], place))


def load_shards(rest: str, size: tuple[int, int, int] | None = None, *, lazy: bool = False) -> Dataset:
    """The set in the shards that `rest` names, decoded to `size` (C, H, W); default (3, 224, 224).

    Raises DataError for a pattern without shards, a shard that is missing, compressed or damaged, or labels that are
    neither all integers nor all texts; else as `from_listings`.
    """
    size = size or DEFAULT_SIZE
    check_size(size)
    patterns = rest.split("@")
    if len(patterns) > 2 or not all(patterns):
        raise DataError(f"load: wds:SHARDS[@TEST_SHARDS] takes one @ at most and shards on each side, got {rest!r}")
    found = [_list(pattern) for pattern in patterns]
    numbers, classes = number_labels([labels for _, labels, _ in found], patterns)
    listings = [
        Listing(files, labels, stray, f"wds:{pattern}")
        for (files, _, stray), labels, pattern in zip(found, numbers, patterns, strict=True)
    ]
    return from_listings(
        f"wds:{rest}", listings[0], listings[1] if len(listings) == 2 else None, classes, size, lazy=lazy
    )


def expand(pattern: str) -> list[str]:
    """ "a-{08..11}.tar" -> a-08.tar, a-09.tar, a-10.tar, a-11.tar; "{x,y}.tar" -> x.tar, y.tar.

    Raises DataError for braces that do not match or hold neither, and for more than a million names.
    """
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    if any(brace in text for text in pieces[::2] for brace in "{}"):
        raise DataError(f"load: wds:{pattern} has braces that do not match; write {{000..015}} or {{a,b}}")
    choices = [[text] if place % 2 == 0 else _choices(pattern, text[1:-1]) for place, text in enumerate(pieces)]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        raise DataError(f"load: wds:{pattern} names more than {MOST_SHARDS:,} shards; give fewer")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(pattern: str, inner: str) -> list[str]:
    span = RANGE.fullmatch(inner)
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise DataError(f"load: wds:{pattern} must count upwards, by at most {MOST_SHARDS:,}, got {{{inner}}}")
        width = len(span[1]) if span[1].startswith("0") else 0
        return [f"{number:0{width}}" for number in range(first, last + 1)]
    if "," not in inner:
        raise DataError(f"load: wds:{pattern} must have a range or alternatives in braces, got {{{inner}}}")
    return inner.split(",")


def _list(pattern: str) -> tuple[ShardFiles, list[Any], BadFiles]:
    """The images of the shards, their labels as written, and what is no sample."""
    shards = [Path(name).expanduser() for name in expand(pattern)]
    places: list[Place] = []
    labels: list[Any] = []
    stray: list[tuple[str, str]] = []
    for number, shard in enumerate(shards):
        for key, members in sorted(_index(shard, number).items()):
            images = [place for suffix, place in members.items() if f".{suffix}" in SUFFIXES]
            try:
                label = _label(shard, members)
                if len(images) != 1:
                    raise ValueError("no image" if not images else "more than one image")
            except ValueError as error:
                stray.append((f"{shown(shard)}/{shown(key)}", f"not a sample: {one_line(error)}"))
            else:
                places.append(images[0])
                labels.append(label)
    origin = " ".join(str(shard.absolute()) for shard in shards)
    return ShardFiles(origin, shards, places), labels, tuple(stray)


def _index(shard: Path, number: int) -> dict[str, dict[str, Place]]:
    """{key: {suffix: where it lies}}, from the headers alone."""
    found: dict[str, dict[str, Place]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = -(-(member.offset_data + member.size * member.isreg()) // BLOCK) * BLOCK
                if not member.isreg() or member.issparse():
                    continue  # folders, links and devices are no samples; nothing is unpacked
                if member.offset_data + member.size > shard.stat().st_size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = str(PurePosixPath(folder) / stem)
                place = Place(number, member.name, member.offset_data, member.size)
                if found.setdefault(key, {}).setdefault(suffix.lower(), place) is not place:
                    raise tarfile.ReadError(f"it holds {member.name} twice")
        with open(shard, "rb") as whole:
            whole.seek(end)
            if whole.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("it has no end mark, so it is cut off or damaged")
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"load: {shown(shard)} cannot be read as an uncompressed tar file ({one_line(error)}); get or make it again"
        ) from error
    return found


def _label(shard: Path, members: dict[str, Place]) -> int | str:
    """Raises ValueError when the sample has none."""
    if "cls" in members:
        text = _label_text(shard, members["cls"])
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
    if "json" not in members:
        raise ValueError("no .cls and no .json")
    try:
        held = json.loads(_label_text(shard, members["json"]))
    except RecursionError as error:
        raise ValueError("a .json nested too deeply") from error
    label = held.get("cls", held.get("label")) if isinstance(held, dict) else None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError('its .json has no "cls" or "label" that is an integer or a text')
    return label


def _label_text(shard: Path, place: Place) -> str:
    if place.length > LABEL_BYTES:
        raise ValueError(f"a label of {place.length} bytes")
    text = _content(shard, place).decode().strip()
    if not text:
        raise ValueError("an empty label")
    return text


def _content(shard: Path, place: Place) -> bytes:
    with open(shard, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)
