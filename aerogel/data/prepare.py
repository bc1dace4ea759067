"""What every loader does before it hands a set over: find files, check memory, resize, carve, measure.

Validation and test parts are carved with a fixed seed, so that runs with different seeds are judged on the
same images. Letters: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from aerogel.data.dataset import Dataset, Split
from aerogel.data.files import Lazy
from aerogel.errors import AerogelError, DataError

SPLIT_SEED = 0
CHUNK = 512  # images at a time, where a temporary larger than the images is made
LUMA = (19595, 38470, 7471)  # ITU-R 601 weights of R, G, B in 1 / 65536, as Pillow's


def assemble(
    name: str,
    train: Split,
    test: Split,
    classes: Sequence[str],
    *,
    val: int,
    augment: str = "none",
    bad_files: tuple[tuple[str, str], ...] = (),
) -> Dataset:
    """A Dataset whose `val` validation images are carved out of `train`, with the statistics of what remains.

    Raises DataError when nothing can be carved, and whatever `Dataset` raises.
    """
    rest, held = carve(train, val)
    mean, std = statistics(rest.images)
    return Dataset(name, rest, held, test, tuple(classes), mean, std, augment, bad_files)


def carve(split: Split, count: int) -> tuple[Split, Split]:
    """(the rest, about `count` images), the same share of every class in both; order within each is kept.

    `count` is met exactly unless a class is tiny: each class keeps one image and, having two, gives one.
    Raises DataError when `count` is out of range or no class has two images.
    """
    _, labels, sizes = np.unique(split.labels.numpy(), return_inverse=True, return_counts=True)
    if not 0 < count < len(labels):
        raise DataError(f"carve: count must be in (0, {len(labels)}), got {count}; keep images for both parts")
    share = count * sizes / len(labels)
    quota = np.floor(share).astype(np.int64)
    short = count - int(quota.sum())
    quota[np.argsort(quota - share, kind="stable")[:short]] += 1  # the largest remainders first
    quota = np.clip(quota, np.minimum(1, sizes - 1), sizes - 1)
    if quota.sum() == 0:
        raise DataError("carve: no class has two images, so none can be held out; add images")

    # RandomState's stream is frozen by NumPy: the same images are held out with every version.
    mixed = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[by_class]]
    taken = np.zeros(len(labels), dtype=bool)
    taken[by_class[rank < quota[labels[by_class]]]] = True
    mask = torch.from_numpy(taken)
    return split.subset(~mask), split.subset(mask)


def statistics(images: torch.Tensor | Lazy) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255 per channel, from exact integer sums, wherever the pixels are.

    A constant channel gets the deviation 1, so that normalising it stays finite. Shape: uint8 (N, C, H, W).
    """
    pixels = math.prod(images.shape) // images.shape[1]  # of a channel
    means, deviations = [], []
    for total, squares in _sums(images):
        means.append(total / (255 * pixels))
        deviations.append(math.sqrt(squares * pixels - total**2) / (255 * pixels) or 1.0)
    return tuple(means), tuple(deviations)


def _sums(images: torch.Tensor | Lazy) -> list[tuple[int, int]]:
    """Of each channel's pixels and of their squares; Python's integers, as their products exceed 64 bits."""
    if isinstance(images, Lazy):
        return [(int(total), int(squares)) for total, squares in images.sums.sum(0)]
    levels = torch.arange(256)
    found = []
    for channel in images.unbind(1):
        counts = torch.zeros(256, dtype=torch.int64)
        for chunk in channel.split(CHUNK):
            counts += torch.bincount(chunk.flatten(), minlength=256)
        found.append((int(counts @ levels), int(counts @ levels.square())))
    return found


def check_size(size: tuple[int, int, int], caller: str = "load") -> None:
    """Raises AerogelError unless `size` is (C, H, W) with C 1 or 3 and H, W positive."""
    if len(size) != 3 or size[0] not in (1, 3) or min(size) < 1:
        given = ",".join(map(str, size))
        raise AerogelError(f"{caller}: --input must be C,H,W with C 1 or 3 and H, W >= 1, got {given}; e.g. 3,224,224")


def resize_images(images: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Bilinear with antialiasing; 1 -> 3 channels repeats, 3 -> 1 is luma.

    Shapes: uint8 (N, c, h, w) -> uint8 (N, *size); the images themselves when they have that size already.
    Height and width are met even if the aspect ratio changes. Computed on uint8, which is within 1 of the
    float result and several times faster. Raises AerogelError for other channel counts.
    """
    check_size(size, "resize_images")
    channels = images.shape[1]
    if tuple(images.shape[1:]) == tuple(size):
        return images
    if channels not in (1, 3, size[0]):
        raise AerogelError(f"resize_images: cannot make {size[0]} channels of {channels}; give --input {channels},H,W")
    out = images.new_empty((len(images), *size))
    for source, target in zip(images.split(CHUNK), out.split(CHUNK), strict=True):
        if channels == 3 and size[0] == 1:
            luma = (source.int() * torch.tensor(LUMA, dtype=torch.int32).view(-1, 1, 1)).sum(1, keepdim=True)
            source = ((luma + 2**15) // 2**16).to(torch.uint8)
        if source.shape[2:] != target.shape[2:]:
            source = F.interpolate(source, size[1:], mode="bilinear", antialias=True)
        target.copy_(source)  # broadcasts one channel to three
    return out


def resized(dataset: Dataset, size: tuple[int, int, int]) -> Dataset:
    """The same set in memory, with images of `size` and new statistics. Raises DataError when memory is short."""
    check_size(size)
    if dataset.input_shape == tuple(size):
        return dataset
    parts = (dataset.train, dataset.val, dataset.test)
    check_memory(sum(map(len, parts)), size)
    train, val, test = (Split(_resized(part, size), part.labels) for part in parts)
    mean, std = statistics(train.images)
    return dataclasses.replace(dataset, train=train, val=val, test=test, mean=mean, std=std)


def _resized(part: Split, size: tuple[int, int, int]) -> torch.Tensor:
    if isinstance(part.images, Lazy):
        raise DataError(
            f"load: images that are decoded as they are used have one size, {tuple(part.images.size)}, and cannot be "
            "resized; give --input where their files are read"
        )
    return resize_images(part.images, size)


def fits_memory(count: int, size: tuple[int, int, int]) -> bool:
    """Whether `count` uint8 images of `size` take at most half of the memory available.

    Half, because a part is copied while it is carved, and training needs the rest.
    """
    available = available_memory()
    return available is None or count * math.prod(size) <= available / 2


def check_memory(count: int, size: tuple[int, int, int]) -> None:
    """Raises DataError unless `fits_memory`."""
    if not fits_memory(count, size):
        shape, need, available = "x".join(map(str, size)), count * math.prod(size), available_memory() or 0
        raise DataError(
            f"load: {count} images of {shape} need {need / 2**30:.2f} GiB, over half of the "
            f"{available / 2**30:.2f} GiB of memory available; give a smaller --input"
        )


def available_memory() -> int | None:
    """Bytes that can be allocated, the container's limit included; None where the system does not tell."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
    return min(found, default=None)


def find_files(name: str, folder: str, files: Sequence[str], origin: str) -> Path:
    """The folder of a named set, in $AEROGEL_DATA or else ./data, that holds all `files`.

    Raises DataError that says where was looked, what is missing and how to get it.
    """
    root = os.environ.get("AEROGEL_DATA")
    places = [Path(place) / folder for place in (root, "data") if place]
    missing = {place: [file for file in files if not (place / file).is_file()] for place in places}
    for place in places:
        if not missing[place]:
            return place
    best = min(places, key=lambda place: len(missing[place]))
    raise DataError(
        f"load: {name} was not found in $AEROGEL_DATA ({root or 'not set'}) nor {Path('data').absolute()}: "
        f"{folder}/ lacks {', '.join(missing[best])}; get them from {origin}, put them in a folder {folder}/ "
        "and set AEROGEL_DATA to the folder that holds it"
    )
