"""The batches that training and measuring read from a split: every image exactly once in a pass.

A split of N images is divided into ceil(N / batch_size) batches whose sizes differ by at most one, so that none is
left out and none is tiny. Of each of them, rank r of R processes reads the rows r, r + R, r + 2R, ...: together they
read the same batches, with the same augmentation, as one process would.

Letters: N images of a split, n of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from aerogel.data.augment import Augment, find_augment
from aerogel.data.dataset import SPLITS, Dataset, Split, check_scale, check_tensor
from aerogel.data.workers import by_workers
from aerogel.errors import AerogelError, nearest


class Batch(NamedTuple):
    """keys: epoch * N + the image's place in its split. With one seed, augmentation and batch size each stands for one
    image, changed in one way; None where nobody counts them."""

    inputs: torch.Tensor  # float32 (n, C, H, W), normalised
    labels: torch.Tensor  # int64 (n,)
    keys: torch.Tensor | None = None  # int64 (n,)


def batch_count(n: int, batch_size: int) -> int:
    """How many batches a pass over n images has: ceil(n / batch_size)."""
    return -(-n // batch_size)


def batch_rows(n: int, batch_size: int, number: int) -> slice:
    """Which of n images batch `number` is, as numpy.array_split divides them: the first batches have one more."""
    count = batch_count(n, batch_size)
    size, more = divmod(n, count)
    first = number * size + min(number, more)
    return slice(first, first + size + (number < more))


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(images / 255 - mean) / std. Shapes uint8 (n, C, H, W) -> float32 (n, C, H, W), one allocation.

    Raises AerogelError when the images are not uint8 or `mean` and `std` do not fit their channels.
    """
    check_tensor("images", images, torch.uint8, "(n, C, H, W)", dims=4, caller="normalise")
    check_scale("normalise", mean, std, images.shape[1])
    centre = torch.tensor([255 * value for value in mean], device=images.device).view(-1, 1, 1)
    scale = torch.tensor([255 * value for value in std], device=images.device).view(-1, 1, 1)
    # Measured: converting first is faster than one call on mixed types, whose loop is not vectorised.
    return images.float().sub_(centre).div_(scale)


def batches(
    dataset: Dataset,
    split: str,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    augment: str = "none",
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """One pass over a split, from batch number `start` on: `batch_count` batches of at most `batch_size` images.

    Order and augmentation depend on (seed, epoch, batch number) alone: a pass begun at `start` yields exactly
    what the whole pass yields from there. `start` may equal the number of batches; nothing is left then. Rank r of
    `ranks` gets the rows r::ranks of every batch, augmented as they are in the whole batch. `workers` processes read
    and augment ahead; they change nothing but the speed, and serve where images are decoded as they are used.

    Raises AerogelError, at the call and not at the first batch, for an argument out of its range.
    """
    if split not in SPLITS:
        raise AerogelError(f"batches: unknown split {split!r}; {nearest(split, SPLITS)}")
    limits = (("seed", seed, 0), ("epoch", epoch, 0), ("ranks", ranks, 1), ("workers", workers, 0))
    for name, value, least in (("batch_size", batch_size, 1), *limits):
        if value < least:
            raise AerogelError(f"batches: {name} must be >= {least}, got {value}; give a larger one")
    part: Split = getattr(dataset, split)
    count = batch_count(len(part), batch_size)
    if not 0 <= start <= count:
        raise AerogelError(f"batches: start must be in [0, {count}], got {start}; {split} has {count} batches")
    if not 0 <= rank < ranks:
        raise AerogelError(f"batches: rank must be in [0, {ranks}), got {rank}; number the processes from 0")
    if ranks > (smallest := len(part) // count):
        raise AerogelError(
            f"batches: ranks must be at most the {smallest} images of the smallest batch of {split}, got {ranks}; "
            "give a larger --batch-size or start fewer processes"
        )
    change = find_augment(augment)

    def produce() -> Iterator[Batch]:
        order = torch.randperm(len(part), generator=_generator(seed, epoch, 0)) if shuffle else torch.arange(len(part))
        numbers = range(start, count)
        share = _Share(part, order, batch_size, seed, epoch, change, slice(rank, None, ranks))
        made = by_workers(share.images, numbers, workers) if workers and numbers else map(share.images, numbers)
        for number, images in zip(numbers, made, strict=True):
            rows = share.rows(number)
            yield Batch(normalise(images, dataset.mean, dataset.std), part.labels[rows], epoch * len(part) + rows)

    return produce()


@dataclass(frozen=True, eq=False)
class _Share:
    """A process's share of each batch of a pass, before normalisation."""

    part: Split
    order: torch.Tensor  # int64 (N,)
    batch_size: int
    seed: int
    epoch: int
    change: Augment
    mine: slice  # of each batch

    def rows(self, number: int) -> torch.Tensor:
        return self.order[batch_rows(len(self.part), self.batch_size, number)][self.mine]

    def images(self, number: int) -> torch.Tensor:
        """uint8 (n, C, H, W)."""
        whole = batch_rows(len(self.part), self.batch_size, number)
        generator = _generator(self.seed, self.epoch, number + 1)
        return self.change(self.part.rows(self.rows(number)), generator, whole.stop - whole.start, self.mine)


def _generator(*key: int) -> torch.Generator:
    """Independent streams for different (seed, epoch, number); consecutive seeds alone would be related."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
