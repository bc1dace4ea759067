"""Magnitude, with one threshold a layer. Han, Pool, Tran, Dally 2015, "Learning both weights and connections for
efficient neural networks", arXiv:1506.02626, sections 3 and 4.

score = |w|
threshold of a layer = quality * std of its weights; what lies below is pruned.
The quality is set per layer from its sensitivity. Differs: pruned weights (zeros) are left out of the standard
deviation, so that a second round goes on where the first stopped; the paper does not say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.errors import AerogelError


def magnitude(weight: Tensor) -> Tensor:
    """|w|, of the weight's shape."""
    return weight.abs()


def below_threshold(weight: Tensor, quality: float) -> Tensor:
    """The mask, bool of the weight's shape: True where |w| >= quality * std of the weights that are not zero.

    Raises AerogelError when quality is negative or not finite.
    """
    if not 0 <= quality < math.inf:
        raise AerogelError(f"below_threshold: quality must be >= 0 and finite, got {quality}; 1 is usual")
    return (weight.abs() >= quality * _std(weight)) & (weight != 0)


def quality_of(weight: Tensor, sparsity: float) -> float:
    """The quality whose threshold prunes that share of the weights that are not zero."""
    sizes = weight[weight != 0].abs().flatten().sort().values
    count = round(sparsity * len(sizes))
    if not count or len(sizes) < 2:
        return 0.0
    edge = 2 * sizes[-1].double() if count == len(sizes) else sizes[count - 1 : count + 1].double().mean()
    return float(edge / _std(weight).double().clamp_min(torch.finfo(torch.double).tiny))


def _std(weight: Tensor) -> Tensor:
    held = weight[weight != 0].float()
    return held.std(correction=0) if len(held) else weight.new_zeros(())
