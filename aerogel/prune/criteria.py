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
from aerogel.prune.coupling import Group

Criterion = Callable[[Group, Mapping[str, Tensor]], Tensor]


def l1(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of |w| over the channel's slices of every weight of two or more dimensions."""
    return _sum(group, weights, lambda w: w.abs())


def l2(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Root of the sum of squares over the channel's slices of every weight of two or more dimensions."""
    return _sum(group, weights, lambda w: w.square()).sqrt()


def bn_scale(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of |gamma| over the batch norms among the group's members. Raises CutError where there is none."""
    norms = {
        m.target.removesuffix("running_mean") for m in group.members if m.target.endswith("running_mean")
    }
    scales = [m for m in group.members if any(m.target == f"{norm}weight" for norm in norms)]
    if not scales:
        raise CutError(f"bn_scale: group {group.name} passes no batch norm; use criterion='l2' or protect it")
    return torch.stack([weights[m.target][torch.from_numpy(m.index)].abs().sum(1) for m in scales]).sum(0)


def random(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Uniform in [0, 1) by torch's global generator: seed it."""
    return torch.rand(len(group))


def _sum(group: Group, weights: Mapping[str, Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    total = torch.zeros(len(group))
    for member in group.members:
        weight = weights[member.target]
        if weight.ndim > 1:
            by_index = of(weight.float()).transpose(0, member.dim).flatten(1).sum(1)
            total += by_index[torch.from_numpy(member.index)].sum(1)
    return total


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "bn_scale": bn_scale, "random": random}
