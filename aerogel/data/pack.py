"""A set as plain memory: each split's pixels in one uint8 file that is mapped, not read. Written once, for every run.

    FOLDER/manifest.json        shapes, classes, mean, std, bad files, fingerprints, sha256 of each file and of itself
    FOLDER/train/images.bin     uint8 (N, C, H, W)
    FOLDER/train/labels.bin     int64 (N,), little-endian; and so val/, test/

Pixels are decoded and resized as the source is, so a packed set trains to the same weights. Loading checks every
sha256: it reads the files once, which also brings them into the system's cache. Batches are then copied out of that
cache; the process itself holds none of the set, and all processes of a machine share it.

Letters: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel.data import load
from aerogel.data.batching import batches
from aerogel.data.dataset import SPLITS, Dataset, Split, fingerprint_of
from aerogel.data.files import Lazy
from aerogel.errors import AerogelError, DataError
from aerogel.files import check_free, new_folder, read_json, refuse_existing, sha256, write_json
from aerogel.imports import one_line

MANIFEST = "manifest.json"
CHUNK = 256  # images that are written at once
RACE_IMAGES, RACE_SECONDS, RACE_BATCH = 320, 6.0, 32

Say = Callable[[str], None]


class PackedSplit(BaseModel):
    """sha256 of the two files, and the split's fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(gt=0)
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    images: str = Field(pattern="^[0-9a-f]{64}$")
    labels: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1]
    source: str  # as the user typed it
    size: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    bad_files: tuple[tuple[str, str], ...]
    splits: dict[Literal["train", "val", "test"], PackedSplit]


def write_packed(dataset: Dataset, out: str | Path) -> None:
    """Writes the set as a folder: whole or not at all. Images are read CHUNK at a time, so it need not fit the memory.

    Raises AerogelError when `out` exists, or the disk has no room for it.
    """
    out = Path(out).expanduser()
    refuse_existing(out, "data pack")
    images, shape = sum(len(getattr(dataset, name)) for name in SPLITS), "x".join(map(str, dataset.input_shape))
    need = images * (math.prod(dataset.input_shape) + 8)
    check_free(out, need, f"{images:,} packed images of {shape} (a smaller --input makes them smaller)")
    with new_folder(out, "data pack") as temp:
        splits = {name: _write_split(getattr(dataset, name), temp / name) for name in SPLITS}
        held = {
            "format": 1, "source": dataset.name, "size": dataset.input_shape, "classes": dataset.classes,
            "mean": dataset.mean, "std": dataset.std, "augment": dataset.augment, "bad_files": dataset.bad_files,
            "splits": splits,
        }  # fmt: skip
        content = Manifest.model_validate(held).model_dump(mode="json")
        write_json(temp / MANIFEST, {"sha256": _sha256_of(content), **content})


def load_packed(path: str | Path) -> Dataset:
    """The set that `write_packed` wrote, memory-mapped, after its files' sha256 were checked.

    Raises DataError naming the file that is missing, or is not what was written.
    """
    root = Path(path).expanduser()
    held = _read_manifest(root)
    with ThreadPoolExecutor(len(SPLITS)) as pool:
        train, val, test = pool.map(lambda name: _read_split(root / name, held.splits[name], held.size), SPLITS)
    return Dataset(f"packed:{path}", train, val, test, held.classes, held.mean, held.std, held.augment, held.bad_files)


def pack_and_measure(spec: str, out: str | Path, size: tuple[int, int, int] | None, say: Say) -> dict[str, Any]:
    """Loads the set that `spec` names, at `size`, writes it and measures what that gave.

    Raises what `load` and `write_packed` raise.
    """
    refuse_existing(Path(out).expanduser(), "data pack")
    began = time.perf_counter()
    dataset = load(spec, size=size, lazy=True)
    load_seconds = time.perf_counter() - began
    began = time.perf_counter()
    write_packed(dataset, out)
    written = time.perf_counter()
    packed = load_packed(out)
    loaded = time.perf_counter() - written
    found: dict[str, Any] = {
        "folder": str(out),
        "bytes": sum(getattr(packed, name).images.numel() for name in SPLITS),
        "images": {name: len(getattr(packed, name)) for name in SPLITS},
        "size": list(packed.input_shape),
        "bad_files": [list(row) for row in packed.bad_files],
        "fingerprint": packed.fingerprint(),
        "write_seconds": written - began,
        "load_seconds": {"unpacked": load_seconds, "packed": loaded},
    }
    shape = "x".join(map(str, packed.input_shape))
    say(f"{sum(found['images'].values()):,} images of {shape}, {found['bytes'] / 2**20:,.1f} MiB in {out}")
    say(f"loads in {loaded:.2f} s, its sha256 checked; unpacked in {load_seconds:.2f} s")
    found["epoch"] = race(dataset, packed)
    say(_race_text(found["epoch"], isinstance(dataset.train.images, Lazy)))
    say(f"use it as --data packed:{out}")
    return found


def race(unpacked: Dataset, packed: Dataset) -> dict[str, Any]:
    """Images a second that each makes into training batches, batch by batch in turn, the same ones.

    Without workers. The first batch of each is not counted. At most RACE_IMAGES images or RACE_SECONDS.
    """
    options: dict[str, Any] = {"shuffle": True, "augment": packed.augment}
    pairs = [batches(data, "train", RACE_BATCH, **options) for data in (unpacked, packed)]
    seconds, images = [0.0, 0.0], 0
    for turn in range(1 + RACE_IMAGES // RACE_BATCH):
        took = [_timed(pair) for pair in pairs]
        if took[0][1] == 0 or sum(seconds) > RACE_SECONDS:
            break
        if turn or took[0][1] == len(packed.train):  # a set of one batch has no other
            images += took[0][1]
            seconds = [total + one[0] for total, one in zip(seconds, took, strict=True)]
    rates = [images / max(total, 1e-9) for total in seconds]
    return {"unpacked_images_per_s": rates[0], "packed_images_per_s": rates[1], "ratio": rates[1] / rates[0],
            "images": images}  # fmt: skip


def _timed(pair: Iterator[Any]) -> tuple[float, int]:
    """Seconds until the next batch, and its images; none at the end."""
    began = time.perf_counter()
    batch = next(pair, None)
    return time.perf_counter() - began, 0 if batch is None else len(batch.labels)


def _race_text(found: dict[str, Any], decoded: bool) -> str:
    rates = f"{found['packed_images_per_s']:,.0f} images/s against {found['unpacked_images_per_s']:,.0f}"
    how = "" if decoded else "; the unpacked set is in memory, so packing saves loading and memory only"
    return (
        f"an epoch's batches come {found['ratio']:.1f} times as fast ({rates}, {found['images']} images in turn){how}"
    )


def _write_split(split: Split, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    digest, each = hashlib.sha256(), []
    with open(folder / "images.bin", "wb") as file:
        for first in range(0, len(split), CHUNK):
            pixels = split.rows(slice(first, first + CHUNK)).cpu().contiguous()
            _append(file, pixels.numpy(), digest)
            each += [hashlib.sha256(image.numpy().data).digest() for image in pixels]
    labels = split.labels.cpu().numpy().astype("<i8")
    (folder / "labels.bin").write_bytes(labels.tobytes())
    digests = np.frombuffer(b"".join(each), np.uint8).reshape(-1, 32)
    return {
        "count": len(split),
        "fingerprint": fingerprint_of(split.images.shape, digests, split.labels),
        "images": digest.hexdigest(),
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
    }


def _append(file: BinaryIO, pixels: np.ndarray, digest: Any) -> None:
    file.write(pixels.data)
    digest.update(pixels.data)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    remedy = "it is damaged or not written by aerogel data pack, pack the set again"
    try:
        held = read_json(path)
    except AerogelError as error:
        raise DataError(f"load: packed:{root} needs the manifest that aerogel data pack wrote: {error}") from error
    if not isinstance(held, dict) or held.pop("sha256", None) != _sha256_of(held):
        raise DataError(f"load: {path} is not what was written (its sha256 differs); {remedy}")
    try:
        manifest = Manifest.model_validate(held)
    except ValidationError as error:
        raise DataError(f"load: {path} does not fit this version ({one_line(error)}); pack the set again") from error
    if set(manifest.splits) != set(SPLITS) or min(manifest.size) < 1:
        raise DataError(f"load: {path} must tell train, val and test and a size; {remedy}")
    return manifest


def _read_split(folder: Path, held: PackedSplit, size: tuple[int, int, int]) -> Split:
    numbers = held.count * math.prod(size)
    images, labels = folder / "images.bin", folder / "labels.bin"
    for path, need, written in ((images, numbers, held.images), (labels, 8 * held.count, held.labels)):
        try:
            found, digest = path.stat().st_size, sha256(path)
        except OSError as error:
            raise DataError(f"load: {path} cannot be read ({error.strerror}); pack the set again") from error
        if found != need or digest != written:
            raise DataError(f"load: {path} is not what was written (its sha256 differs); pack the set again")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to a split
        # Mapped for reading only: a private, writable map of more than the memory would be refused by the system.
        mapped = torch.from_numpy(np.memmap(images, np.uint8, "r", shape=(held.count, *size)))
    return Split(mapped, torch.from_numpy(np.fromfile(labels, "<i8").astype(np.int64)), held.fingerprint)


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
