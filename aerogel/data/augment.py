"""Random changes of a training batch, on its uint8 pixels, before normalisation.

- `shift`: moved by up to 2 px each way, zeros come in. For digits, where a flip would change the class.
- `crop_flip`: padded by 4 zeros a side, cropped back at random, mirrored left-right with probability 1/2.
  Lee et al. 2015, arXiv:1409.5185; He et al. 2016, arXiv:1512.03385, section 4.2.

Every offset is equally likely. Shapes: (n, C, H, W) uint8 -> the same. One gather a batch.

A process that has only some rows of a batch of `whole` images says which: the random numbers are drawn for the whole
batch and those of its rows are used, so that an image changes alike however many processes share the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from aerogel.errors import AerogelError, nearest

ALL = slice(None)


class Augment(Protocol):
    """(images, generator, whole, rows): `images` are those `rows` of a batch of `whole`; None: they are the batch."""

    def __call__(
        self, images: torch.Tensor, generator: torch.Generator, whole: int | None = None, rows: slice = ALL
    ) -> torch.Tensor: ...


def none(images: torch.Tensor, generator: torch.Generator, whole: int | None = None, rows: slice = ALL) -> torch.Tensor:
    return images


def shift(
    images: torch.Tensor, generator: torch.Generator, whole: int | None = None, rows: slice = ALL
) -> torch.Tensor:
    return _crop(images, generator, whole, rows, pad=2, flip=False)


def crop_flip(
    images: torch.Tensor, generator: torch.Generator, whole: int | None = None, rows: slice = ALL
) -> torch.Tensor:
    return _crop(images, generator, whole, rows, pad=4, flip=True)


AUGMENTS: dict[str, Augment] = {"none": none, "shift": shift, "crop_flip": crop_flip}


def find_augment(name: str) -> Augment:
    """The function of that name. Raises AerogelError for an unknown one."""
    if name not in AUGMENTS:
        raise AerogelError(f"augment: unknown name {name!r}; {nearest(name, AUGMENTS)}")
    return AUGMENTS[name]


def _crop(
    images: torch.Tensor, generator: torch.Generator, whole: int | None, which: slice, *, pad: int, flip: bool
) -> torch.Tensor:
    n, channels, height, width = images.shape
    drawn = n if whole is None else whole
    top, left = torch.randint(0, 2 * pad + 1, (2, drawn, 1), generator=generator)[:, which]
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = (torch.rand((drawn, 1), generator=generator) < 0.5)[which]
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    pixels = padded.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1))
    return pixels.view(n, channels, height, width)
