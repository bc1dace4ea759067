"""N:M patterns: of every M weights in a row, N survive. Mishra et al. 2021, "Accelerating sparse deep neural networks",
arXiv:2104.08378, section 3: 2:4, which NVIDIA's tensor cores (Ampere and later) multiply at twice the dense rate.

The row runs along the inputs of a layer, dimension 1 of a weight (out, in, ...): of a convolution, its input channels
at one place of the kernel. The largest survive; of equal ones the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import AerogelError


def n_of_m(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask, bool of the scores' shape (out, in, ...): in every m consecutive inputs the n of highest score.

    Raises AerogelError unless 0 < n <= m and the inputs are a multiple of m.
    """
    if not 0 < n <= m:
        raise AerogelError(f"n_of_m: n must be in [1, m], got {n=}, {m=}; 2:4 is usual")
    if scores.ndim < 2 or scores.shape[1] % m:
        raise AerogelError(
            f"n_of_m: the inputs (dimension 1) must be a multiple of {m}, got shape {tuple(scores.shape)}; "
            "protect that layer"
        )
    rows = scores.movedim(1, -1)
    groups = rows.reshape(-1, m)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    return mask.view(rows.shape).movedim(-1, 1).contiguous()
