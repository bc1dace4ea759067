"""Chance: the honest baseline.

score ~ uniform in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def random(weight: Tensor) -> Tensor:
    """Of the weight's shape, by torch's global generator: seed it."""
    return torch.rand(weight.shape)
