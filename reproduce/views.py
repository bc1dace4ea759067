"""Changed views of digits: affine maps and elastic distortions, drawn anew each time, all images of a batch at once.

Elastic: Simard, Steinkraus, Platt 2003, "Best practices for convolutional neural networks applied to visual document
analysis". A displacement in x and in y is drawn for every pixel, uniform in [-1, 1], smoothed by a Gaussian of sigma 5
pixels and multiplied by alpha. Affine: as Ciresan, Meier, Gambardella, Schmidhuber 2010, arXiv:1003.0358: rotation by
up to 15 degrees, scale by up to 15 %; beside them shear by up to 0.15 and a shift of up to 2 pixels.
Differs: alpha is drawn for every image, uniform from 0 to 38, so that near-originals are among the views; sevens and
ones are rotated as the others are.

A view at (x, y) is the image at A (x, y) + t + d(x, y), bilinear, where (0, 0) is the centre; outside is the border.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES, SCALE, SHEAR, SHIFT = 15.0, 0.15, 0.15, 2.0
ALPHA, SIGMA = 38.0, 5.0


def views(images: Tensor, generator: torch.Generator | None = None, strength: float = 1.0) -> Tensor:
    """Float images (n, 1, H, W) -> as many, changed. strength: on every range above; 0 leaves them as they are."""
    n, _, height, width = images.shape
    affine = F.affine_grid(_maps(n, height, width, generator, strength), [n, 1, height, width], align_corners=False)
    return F.grid_sample(
        images, affine + _elastic(n, height, width, generator, strength), padding_mode="border", align_corners=False
    )


def _maps(n: int, height: int, width: int, generator: torch.Generator | None, strength: float) -> Tensor:
    """(n, 2, 3): rotation, scale by axis, shear; shifts in units of half an image."""
    drawn = strength * (2 * torch.rand((6, n), generator=generator) - 1)
    angle = math.radians(DEGREES) * drawn[0]
    across, down = 1 + SCALE * drawn[1], 1 + SCALE * drawn[2]
    cosine, sine, shear = angle.cos(), angle.sin(), SHEAR * drawn[3]
    first = torch.stack([across * cosine, across * (shear * cosine - sine), 2 * SHIFT / width * drawn[4]], dim=1)
    second = torch.stack([down * sine, down * (shear * sine + cosine), 2 * SHIFT / height * drawn[5]], dim=1)
    return torch.stack([first, second], dim=1)


def _elastic(n: int, height: int, width: int, generator: torch.Generator | None, strength: float) -> Tensor:
    """(n, H, W, 2), in units of half an image."""
    noise = 2 * torch.rand((n, 2, height, width), generator=generator) - 1
    alpha = ALPHA * strength * torch.rand((n, 1, 1, 1), generator=generator)
    moved = alpha * (_smoothing(height) @ noise @ _smoothing(width).t())
    return (moved * torch.tensor([2 / width, 2 / height]).view(1, 2, 1, 1)).permute(0, 2, 3, 1)


def _smoothing(size: int) -> Tensor:
    """Row i: a Gaussian around i with sum 1 on the whole line, so that less than 1 of it lies near a border."""
    place = torch.arange(size)
    bell = torch.exp(-((place[:, None] - place[None, :]) ** 2) / (2 * SIGMA**2))
    return bell / (SIGMA * math.sqrt(2 * math.pi))
