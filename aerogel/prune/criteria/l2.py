"""L2 norm of a channel's weights: the magnitude that Han et al. 2015 (arXiv:1506.02626) prune by, a channel at a time.
Li et al. 2017, arXiv:1608.08710, found it as good as L1.

score = sqrt(sum w^2) over all slices of the channel.
Differs: over everything that the channel touches, as for L1. reduce="max" is the largest norm of a slice, "mean" the
root of the mean square norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, reduced, slice_sums


def l2(group: Group, weights: Weights, reduce: str = "sum") -> Tensor:
    """(n,): root of the squares summed over each slice; `reduce`: sum, max or mean of the slices' squares."""
    return reduced(slice_sums(group, weights, torch.square), reduce, group).sqrt()
