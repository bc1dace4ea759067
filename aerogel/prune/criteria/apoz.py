"""Share of zeros among a channel's activations. Hu, Peng, Tai, Tang 2016, "Network trimming: a data-driven neuron
pruning approach towards efficient deep architectures", arXiv:1607.03250, equation 1.

APoZ = share of samples and positions at which the activation is 0; score = 1 - APoZ.
Differs: activations are read where the next layer reads them, behind a pooling for instance, and a channel that
several layers read has the mean over them. Activations without zeros (GELU, a residual sum before its ReLU) say
nothing.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.prune.coupling import Group
from aerogel.prune.criteria.slices import Weights, index_of, reduced
from aerogel.prune.evidence import Evidence, held


def apoz(group: Group, weights: Weights, evidence: Evidence | None = None, reduce: str = "mean") -> Tensor:
    """(n,) in [0, 1]; `reduce`: sum, max or mean over the layers that read it.

    Raises CutError without evidence of activations, and where no convolution or linear layer reads the group.
    """
    found = held(evidence, "zeros", group, weights)
    return reduced((1 - zeros[index_of(member, zeros)].mean(1) for member, zeros in found), reduce, group)
