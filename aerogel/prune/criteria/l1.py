"""L1 norm of a channel's weights. Li, Kadav, Durdanovic, Samet, Graf 2017, "Pruning filters for efficient convnets",
arXiv:1608.08710, section 3.1.

score = sum |w| over the channel's slice of each weight, then over the slices.
Differs: the paper takes the filter alone; here every weight that the channel touches counts, the next layer's too, as
in DepGraph (Fang et al. 2023, arXiv:2301.12900). Biases and norms, which have one dimension, do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, reduced, slice_sums


def l1(group: Group, weights: Weights, reduce: str = "sum") -> Tensor:
    """(n,): |w| summed over each slice; `reduce`: sum, max or mean of the slices."""
    return reduced(slice_sums(group, weights, torch.abs), reduce, group)
