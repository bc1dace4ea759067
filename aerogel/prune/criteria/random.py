"""Chance: the honest baseline. Mittal et al. 2018, arXiv:1801.10447, found that after fine-tuning it is hard to beat.

score ~ uniform in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights


def random(group: Group, weights: Weights) -> Tensor:
    """(n,) by torch's global generator: seed it."""
    return torch.rand(len(group))
