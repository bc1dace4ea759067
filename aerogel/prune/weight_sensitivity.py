"""Sensitivity scan of single weights: what a network loses when one layer is pruned and all others stay whole.

Han et al. 2015, arXiv:1506.02626, figure 6: their thresholds are set by it, layer by layer; the first convolution is
the most sensitive. With `retrain` every point is also trained again, the layer held to its mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.prune.masks import Masks, prunable
from aerogel.prune.weights.choose import lowest
from aerogel.prune.weights.magnitude import magnitude

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class WeightCurve:
    """One layer's. values (len(shares),): the evaluation with that share of its weights gone, lowest scores first.

    retrained: the same after training again; empty where nothing was.
    """

    weights: int
    values: tuple[float, ...]
    retrained: tuple[float, ...] = ()


def weight_sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    scores: Mapping[str, Tensor] | None = None,
    shares: Sequence[float] = SHARES,
    layers: Sequence[str] = ("*",),
    retrain: Callable[[nn.Module, Masks], nn.Module] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, WeightCurve]:
    """{weight: its curve}; the model itself is left as it is.

    scores: {weight: score}, by default magnitude. retrain(network, masks): trains a copy that is pruned already and
    returns it. progress is called with the weight's name before every point.
    Raises AerogelError for shares that do not rise within (0, 1), and for a layer that does not exist.
    """
    if not shares or list(shares) != sorted({*shares}) or not 0 < shares[0] <= shares[-1] < 1:
        raise AerogelError(f"weight_sensitivity: shares must rise within (0, 1), as (0.5, 0.9), got {tuple(shares)}")
    weights = prunable(model, layers)
    found = {}
    for name, weight in weights.items():
        score = magnitude(weight.detach()) if scores is None else scores[name]
        values, retrained = [], []
        for share in shares:
            if progress:
                progress(name)
            pruned, masks = copy.deepcopy(model), lowest({name: score}, share)
            masks.hold(pruned)
            values.append(evaluate(pruned))
            if retrain:
                retrained.append(evaluate(retrain(pruned, masks)))
        found[name] = WeightCurve(weight.numel(), tuple(values), tuple(retrained))
    return found
