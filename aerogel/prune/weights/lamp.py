"""Layer-adaptive magnitude. Lee, Park, Mo, Ahn, Shin 2021, "Layer-adaptive sparsity for the magnitude-based pruning",
arXiv:2010.07611, equation 3.

score(u) = w_u^2 / sum of w_v^2 over all v of the layer that are not smaller. The largest has 1: a global ranking leaves
every layer something, and each weight is judged by what its loss would change of its layer. Differs: nothing; of equal
weights the first counts as the smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lamp(weight: Tensor) -> Tensor:
    """In [0, 1], of the weight's shape, in double precision: a layer's sum has many small terms. Zeros have 0."""
    ascending, order = weight.detach().double().square().flatten().sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(ascending)
    scores[order] = ascending / not_smaller.clamp_min(torch.finfo(torch.double).tiny)
    return scores.view(weight.shape)
