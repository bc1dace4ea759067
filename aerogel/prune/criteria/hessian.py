"""Second-order expansion with the Hessian's diagonal. LeCun, Denker, Solla 1990, "Optimal brain damage", NIPS 2:
a weight's saliency is h_kk w_k^2 / 2, at a minimum, where the gradient is zero.

score = sum over the channel's weights of h_kk w_k^2 / 2.
h is the diagonal of the Gauss-Newton matrix, estimated without bias by Gauss-Newton-Bartlett (Liu, Li, Hall, Liang,
Ma 2023, "Sophia", arXiv:2305.14342, algorithm 2): h = n g^2, g the gradient of the batch's mean loss at n labels drawn
from the network's own answers, averaged over batches. It needs no labels, one backward pass a batch, and is never
negative. For cross-entropy it is the diagonal of the true Fisher matrix (not of the empirical one, which vanishes with
the training loss).
Differs: OBD computes the diagonal of the Gauss-Newton matrix by a second-order backward pass of its own.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, by_channel, reduced
from aerogel.prune.evidence import Evidence, held


def hessian(group: Group, weights: Weights, evidence: Evidence | None = None, reduce: str = "sum") -> Tensor:
    """(n,) loss; `reduce`: sum, max or mean over the weights. Raises CutError without evidence of curvature."""
    found = held(evidence, "curvature", group, weights)
    return reduced((by_channel(by_index, member) for member, by_index in found), reduce, group)
