"""Variational information distillation (VID). Ahn, Hu, Damianou, Lawrence, Dai 2019, arXiv:1904.05835.

q(t | s) = Normal(mu(s), sigma_c^2), mu a trained network, one trained variance a channel of the teacher
loss = -log q = the mean of 1/2 * ((t - mu)^2 / sigma^2 + log sigma^2), less a constant; it may be negative
sigma^2 = softplus(alpha_c) + 1e-5, from 5
Paper: mu is three 1 x 1 convolutions with ReLUs, weight 1 (in a sum over pairs of layers). Differs: maps of two sizes
are averaged to the smaller one, as in RepDistiller; log of sigma^2 / 2 is the paper's log sigma.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.distill.features import channels, matched
from aerogel.distill.hints import along_channels
from aerogel.errors import AerogelError

VARIANCE, LEAST = 5.0, 1e-5


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Gaussian log-likelihood of the teacher's feature, negated: mean and teacher of one kind with C channels,
    variance (C,) -> (). Lowest, at log(variance) / 2, where mean and teacher agree.

    Raises AerogelError for a variance that is not positive, other channels, places that do not match, and a teacher
    whose features are not finite.
    """
    one, other = matched("vid_loss", mean, teacher)
    if one.shape != other.shape or variance.shape != (one.shape[2],) or not (variance > 0).all():
        raise AerogelError(
            f"vid_loss: mean and teacher must have equally many channels and variance one number > 0 for each, got "
            f"{one.shape[2]}, {other.shape[2]} and {tuple(variance.shape)}; take what Variational gives"
        )
    return ((one - other).square() / variance + variance.log()).mean() / 2


class Variational(nn.Module):
    """mu and sigma^2, by an example of either's feature: student -> (mean like it with the teacher's C, (C,))."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        wide = channels(teacher)
        self.mean = nn.Sequential(
            nn.Linear(channels(student), wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide)
        )
        self.scale = nn.Parameter(torch.full((wide,), math.log(math.expm1(VARIANCE - LEAST))))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        return along_channels(self.mean, feature), F.softplus(self.scale) + LEAST
