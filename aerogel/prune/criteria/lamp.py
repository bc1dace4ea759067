"""Layer-adaptive magnitude. Lee, Park, Mo, Ahn, Shin 2021, "Layer-adaptive sparsity for the magnitude-based pruning",
arXiv:2010.07611, equation 3.

score(u) = w_u^2 / sum of w_v^2 over all v that are not smaller. The largest has 1, so that a global threshold below 1
leaves every layer something, and scores are comparable between layers as they are: normalize="none".
Differs: the paper scores single weights; here, as in Torch-Pruning, w^2 is a channel's squared L2 norm over the group.
Of equal ones the first counts as the smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, reduced, slice_sums


def lamp(group: Group, weights: Weights, reduce: str = "sum") -> Tensor:
    """(n,) in (0, 1], 0 for a channel of zeros; `reduce`: sum, max or mean of the slices' squares."""
    squares = reduced(slice_sums(group, weights, torch.square), reduce, group)
    ascending, order = squares.sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = ascending / not_smaller.clamp_min(torch.finfo(squares.dtype).tiny)
    return scores
