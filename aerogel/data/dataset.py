"""A labelled image set: in memory, memory-mapped, or as files that are decoded when they are used.

Pixels stay uint8 until a batch is made (batching.py). Letters: N images of a split, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from aerogel.data.augment import find_augment
from aerogel.data.files import Lazy
from aerogel.errors import DataError

SPLITS: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their class numbers. Raises DataError for other types or shapes than those named here.

    Of `images` only `len`, `shape` and indexing with positions, a mask or a slice serve for every split.
    """

    images: torch.Tensor | Lazy  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,)
    known: str | None = None  # the fingerprint, where it need not be computed

    def __post_init__(self) -> None:
        if not isinstance(self.images, Lazy):
            check_tensor("images", self.images, torch.uint8, "(N, C, H, W)", dims=4)
        check_tensor("labels", self.labels, torch.int64, "(N,)", dims=1)
        if len(self.images) != len(self.labels):
            raise DataError(
                f"Split: images and labels must be equally many, got {len(self.images)} and "
                f"{len(self.labels)}; give every image one label"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor | slice) -> Split:
        """The images that `index` (int64 positions, a bool mask or a slice) picks, in its order."""
        images = self.images.subset(index) if isinstance(self.images, Lazy) else self.images[index]
        return Split(images, self.labels[index])

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Pixels of the images that `index` picks, decoded now where they are not in memory: uint8 (n, C, H, W)."""
        return self.images[index]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shape, each image's sha256 and the labels; the same wherever the pixels are."""
        return self.known or fingerprint_of(self.images.shape, image_digests(self.images), self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits that share their classes. `assemble` makes one from a train and a test split.

    Raises DataError when a split is empty, when image shapes differ between splits, when a label is no index
    of `classes`, or when `mean` and `std` do not fit the channels; AerogelError for an unknown augmentation.
    """

    name: str  # as the user typed it
    train: Split
    val: Split  # always carved from the training images, never from the test images
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of pixels / 255 of the train split
    std: tuple[float, ...]
    augment: str  # the set's default, a key of AUGMENTS
    bad_files: tuple[tuple[str, str], ...] = ()  # (path, reason) of what a folder held and was not read

    def __post_init__(self) -> None:
        for name in SPLITS:
            part = getattr(self, name)
            if len(part) == 0:
                raise DataError(f"Dataset: {self.name!r} has an empty {name} split; give it at least one image")
            if part.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(
                    f"Dataset: all splits of {self.name!r} must have one image shape, {name} has "
                    f"{tuple(part.images.shape[1:])} and train {self.input_shape}; resize them alike"
                )
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"Dataset: labels of {self.name!r} must lie in [0, {self.num_classes}), {name} has {low} "
                    f"to {high}; number the classes from 0 and name each one in `classes`"
                )
        check_scale("Dataset", self.mean, self.std, self.input_shape[0])
        find_augment(self.augment)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def fingerprint(self) -> str:
        """sha256 over the pixels, labels and shapes of all splits: equal for equal data, whatever its name or path."""
        parts = (self.train, self.val, self.test)
        return hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()


def image_digests(images: torch.Tensor | Lazy) -> np.ndarray:
    """sha256 of each image's pixels. Shapes: uint8 (N, C, H, W) -> uint8 (N, 32)."""
    if isinstance(images, Lazy):
        return images.digests
    hashed = b"".join(hashlib.sha256(image.cpu().contiguous().numpy().data).digest() for image in images)
    return np.frombuffer(hashed, np.uint8).reshape(-1, 32)


def fingerprint_of(shape: torch.Size, digests: np.ndarray, labels: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    digest.update(np.ascontiguousarray(digests).data)
    digest.update(labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_tensor(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: str, *, dims: int, caller: str = "Split"
) -> None:
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{caller}: {name} must be a tensor, got a {type(value).__name__}; use torch.as_tensor")
    if value.dtype != dtype or value.ndim != dims:
        raise DataError(
            f"{caller}: {name} must be {str(dtype)[6:]} of shape {shape}, got {str(value.dtype)[6:]} of "
            f"shape {tuple(value.shape)}; convert it first"
        )


def check_scale(caller: str, mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != channels or len(std) != channels or not finite or min(std) <= 0:
        raise DataError(
            f"{caller}: mean and std must hold a finite number for each of {channels} channels, std > 0, "
            f"got {mean=}, {std=}; take those of the training images"
        )
