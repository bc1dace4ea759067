"""Scale of the batch norms that a channel passes. Liu et al. 2017, "Learning efficient convolutional networks through
network slimming", arXiv:1708.06519, section 3.

score = |gamma|. The paper compares it raw through the whole network: normalize="none".
Differs: a channel that passes several norms (a residual stage, a dense network) has the scales of all of them.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.errors import CutError
from aerogel.prune.coupling import Group, Member
from aerogel.prune.criteria.slices import Weights, by_channel, in_single, reduced


def bn_scale(group: Group, weights: Weights, reduce: str = "sum") -> Tensor:
    """(n,): |gamma|; `reduce`: sum, max or mean over the norms. Raises CutError where the group passes none."""
    norms = norms_of(group)
    if not norms:
        raise CutError(
            f"cut: criterion 'bn_scale': group {group.name} passes no batch norm; "
            "use criterion='l2' or protect the group"
        )
    return reduced((by_channel(in_single(weights[m.target]).abs(), m) for m in norms), reduce, group)


def norms_of(group: Group) -> list[Member]:
    """The scales of batch norms among the members: the weights of what has running statistics."""
    targets = {member.target for member in group.members}
    return [m for m in group.members if m.target.endswith("weight") and f"{m.target[:-6]}running_mean" in targets]
