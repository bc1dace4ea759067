"""Which channels matter: each criterion is a pure function `(group, weights) -> (n,) score`, low goes first.

A channel's score is taken over everything it touches in its group. To add one: write the function, add one row.

l1, l2   norm of the channel's weights: Li et al. 2017, arXiv:1608.08710, over a coupled group as in DepGraph
         (Fang et al. 2023, arXiv:2301.12900).
bn_scale |gamma| of the batch norms it passes: Liu et al. 2017, arXiv:1708.06519. A group without one has none.
random   the honest baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aerogel.errors import CutError
from aerogel.prune.coupling import Group, Member

Criterion = Callable[[Group, Mapping[str, Tensor]], Tensor]


def l1(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of |w| over the channel's slices of every weight of two or more dimensions."""
    return _total(group, weights, torch.abs)


def l2(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Root of the sum of squares over the channel's slices of every weight of two or more dimensions."""
    return _total(group, weights, torch.square).sqrt()


def bn_scale(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of |gamma| over the batch norms among the group's members. Raises CutError where there is none."""
    targets = {member.target for member in group.members}
    norms = [
        member
        for member in group.members
        if member.target.endswith("weight") and f"{member.target[:-6]}running_mean" in targets
    ]
    if not norms:
        raise CutError(
            f"cut: criterion 'bn_scale': group {group.name} passes no batch norm; "
            "use criterion='l2' or protect the group"
        )
    return torch.stack([_by_channel(weights[m.target].float().abs(), m) for m in norms]).sum(0)


def random(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Uniform in [0, 1) by torch's global generator: seed it."""
    return torch.rand(len(group))


def _total(group: Group, weights: Mapping[str, Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of `of` the weight, over the channel's slices of every weight of two or more dimensions."""
    sums = []
    for member in group.members:
        weight = weights[member.target].float()
        if weight.ndim > 1:
            sums.append(_by_channel(of(weight).transpose(0, member.dim).flatten(1).sum(1), member))
    return torch.stack(sums).sum(0) if sums else torch.zeros(len(group))


def _by_channel(by_index: Tensor, member: Member) -> Tensor:
    """(size of the dimension,) -> (n,): a channel's sum over the indices it takes there."""
    return by_index[torch.from_numpy(member.index).to(by_index.device)].sum(1)


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "bn_scale": bn_scale, "random": random}
