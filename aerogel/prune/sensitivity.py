"""Sensitivity scan: what a network loses when one coupled group is cut and all others stay whole.

Han et al. 2015, arXiv:1506.02626, figure 6, scan layer by layer; Li et al. 2017, arXiv:1608.08710, figure 2, filters,
without retraining. Here the unit is the coupled group, because no layer of a residual stage can be cut alone.
Channels are masked, every index they take set to zero. That is what the cut network computes (aerogel.prune.proof) and
needs no capture, so a point costs one evaluation. Groups whose cut is inexact are left out: masked they are not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune.coupling import Group, couple
from aerogel.prune.criteria import Criterion
from aerogel.prune.cut import freeze, protected
from aerogel.prune.plan import measure
from aerogel.prune.proof import copied, named_weights
from aerogel.prune.rank import find_criterion, scores

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Curve:
    """One group's. values (len(shares),): the evaluation with that share of its channels gone, lowest scores first.

    removed: how many channels that was. macs: the share of the whole network's MACs that was left.
    """

    channels: int
    removed: tuple[int, ...]
    values: tuple[float, ...]
    macs: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """whole: the evaluation of the uncut network. groups: {name: its curve}, in the network's order."""

    shares: tuple[float, ...]
    whole: float
    groups: dict[str, Curve]


def sensitivity(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    evaluate: Callable[[nn.Module], float],
    criterion: str | Criterion = "l2",
    shares: Sequence[float] = SHARES,
    protect: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Evaluates the network with each share of each group's channels masked; `model` itself is untouched.

    args, kwargs: example inputs. evaluate: a number of a network, as its accuracy on held-out images; it must not train
    it. shares: of a group's channels to remove, rising, in (0, 1); one channel stays. progress: called before every
    evaluation with (done, total, group). Raises CaptureError or CutError, as `cut` does.
    """
    shares = tuple(shares)
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
        raise CutError(f"sensitivity: shares must rise within (0, 1), as (0.1, 0.5, 0.9), got {shares}")
    coupling = protected(couple(capture(model, args, kwargs)), protect)
    coupling = freeze(coupling, {group.name: group.inexact for group in coupling.groups if group.inexact})
    ranks = scores(coupling, named_weights(model), find_criterion(criterion))
    masked = copied(model)
    weights = named_weights(masked)
    whole, macs = evaluate(masked), measure(coupling, "macs")
    total, found = len(coupling.groups) * len(shares), dict[str, Curve]()
    for group, score in zip(coupling.groups, ranks, strict=True):
        lowest = np.argsort(score, kind="stable")
        held = {member.target: weights[member.target].clone() for member in group.members}
        points: dict[int, tuple[float, float]] = {}  # channels removed: value, MACs; of few, two shares are one number
        counts = tuple(min(round(share * len(group)), len(group) - 1) for share in shares)
        for number, count in enumerate(counts):
            if progress:
                progress(len(found) * len(shares) + number, total, group.name)
            if count not in points:
                mask(group, weights, lowest[:count])
                flags = np.zeros(coupling.count, bool)
                flags[group.units[lowest[:count]]] = True
                points[count] = evaluate(masked), measure(coupling, "macs", flags) / macs
        for target, tensor in held.items():
            weights[target].copy_(tensor)
        values, left = zip(*(points[count] for count in counts), strict=True)
        found[group.name] = Curve(len(group), counts, values, left)
    return Sensitivity(shares, whole, found)


@torch.no_grad()
def mask(group: Group, weights: Mapping[str, Tensor], channels: Iterable[int]) -> None:
    """Sets all that these channels of the group take in any weight to zero, in place."""
    chosen = np.fromiter(channels, int)
    for member in group.members:
        weight = weights[member.target]
        weight.index_fill_(member.dim, torch.from_numpy(member.index[chosen].ravel()).to(weight.device), 0)
