"""Mean size of a channel's activations. Molchanov, Tyree, Karras, Aila, Kautz 2017, "Pruning convolutional neural
networks for resource efficient inference", arXiv:1611.06440, section 2.2, the mean-activation criterion.

score = mean of |a| over samples and positions.
Differs: the absolute value, so that activations may be negative; read where the next layer reads them.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, index_of, reduced
from aerogel.prune.evidence import Evidence, held


def activation(group: Group, weights: Weights, evidence: Evidence | None = None, reduce: str = "mean") -> Tensor:
    """(n,); `reduce`: sum, max or mean over the layers that read it.

    Raises CutError without evidence of activations, and where no convolution or linear layer reads the group.
    """
    found = held(evidence, "sizes", group, weights)
    return reduced((sizes[index_of(member, sizes)].mean(1) for member, sizes in found), reduce, group)
