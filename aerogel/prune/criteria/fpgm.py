"""Distance to the other channels: what lies near the geometric median can be replaced by the rest. He, Liu, Wang, Hu,
Yang 2019, "Filter pruning via geometric median for deep convolutional neural networks acceleration", CVPR,
arXiv:1811.00250, equation 6.

score_i = sum over j of ||F_i - F_j||_2, F_i the channel's slice of a weight as one vector.
Not about size: a channel of large weights goes when others are like it.
Differs: over every weight that the channel touches, not the filter alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, reduced, slice_rows


def fpgm(group: Group, weights: Weights, reduce: str = "sum") -> Tensor:
    """(n,): distances summed over the other channels, for each weight; `reduce`: sum, max or mean of the weights.

    In double precision: distances come from products, which lose half of the digits.
    """
    rows = (rows.double() for rows in slice_rows(group, weights))
    return reduced((torch.cdist(r, r).sum(1) for r in rows), reduce, group)
