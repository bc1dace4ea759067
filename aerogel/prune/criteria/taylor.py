"""First-order Taylor expansion: how much the loss changes when a channel is set to zero. Molchanov, Mallya, Tyree,
Frosio, Kautz 2019, "Importance estimation for neural network pruning", CVPR, arXiv:1906.10771, section 3.1, the
group contribution of a structural set of parameters S.

score = mean over batches of (sum over s in S of g_s w_s)^2, g the gradient of the batch's loss.
Here S is the channel's slice of one layer: a filter with its bias, a norm's scale with its shift (the paper's best,
a gate after the norm, has the same derivative), the next layer's weights for it.
Differs: the paper estimates while it trains and removes some after every few batches; here the weights stay while
evidence is gathered, and the network runs in eval mode.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.prune.coupling import Dim, Group
from aerogel.prune.criteria.slices import Weights, by_channel, reduced
from aerogel.prune.evidence import Evidence, held


def taylor(group: Group, weights: Weights, evidence: Evidence | None = None, reduce: str = "sum") -> Tensor:
    """(n,) squared loss; `reduce`: sum, max or mean over the layers. Raises CutError without evidence of gradients."""
    by_batch: dict[Dim, Tensor] = {}  # (module, dimension): (n, batches)
    for member, found in held(evidence, "gradients", group, weights):
        layer = (member.target.rpartition(".")[0], member.dim)
        contribution = by_channel(found.T, member)
        by_batch[layer] = by_batch[layer] + contribution if layer in by_batch else contribution
    return reduced((c.square().mean(1) for c in by_batch.values()), reduce, group)
