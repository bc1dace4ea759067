"""Which single weights go: each score is a pure function of one weight and what was seen of it, low goes first.

    masks = lowest(score("magnitude", model), 0.9)             # Masks; one ranking for the whole network
    masks = lowest(score("lamp", model), 0.9, before=masks)    # cumulative

One file a score. To add one: write the file, add one row. Channels have criteria of their own (aerogel.prune.criteria).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError, nearest
from aerogel.prune.masks import prunable
from aerogel.prune.weights.choose import RANKINGS as RANKINGS
from aerogel.prune.weights.choose import check_sparsity as check_sparsity
from aerogel.prune.weights.choose import lowest as lowest
from aerogel.prune.weights.choose import per_layer as per_layer
from aerogel.prune.weights.gradients import mean_gradients as mean_gradients
from aerogel.prune.weights.lamp import lamp as lamp
from aerogel.prune.weights.magnitude import below_threshold as below_threshold
from aerogel.prune.weights.magnitude import magnitude as magnitude
from aerogel.prune.weights.magnitude import quality_of as quality_of
from aerogel.prune.weights.movement import movement as movement
from aerogel.prune.weights.n_of_m import n_of_m as n_of_m
from aerogel.prune.weights.random import random as random
from aerogel.prune.weights.snip import snip as snip
from aerogel.prune.weights.taylor import taylor as taylor

SCORES: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "taylor": taylor,
    "movement": movement,
    "snip": snip,
    "random": random,
}
NEEDS = {"taylor": "gradients", "snip": "gradients", "movement": "earlier"}  # what each must be given


def score(
    name: str,
    model: nn.Module,
    *,
    layers: Sequence[str] = ("*",),
    protect: Sequence[str] = (),
    batches: Iterable[tuple[Any, ...]] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """{weight: score of its shape}, the lowest to go first, of what `prunable` names.

    batches: labelled ones, for taylor and snip. earlier: the weights before a training, for movement.
    Raises AerogelError for an unknown name, and where the score needs what is not given.
    """
    if name not in SCORES:
        raise AerogelError(f"score: {name!r} is unknown; {nearest(name, SCORES)}")
    weights = prunable(model, layers, protect)
    function, need = SCORES[name], NEEDS.get(name)
    if need == "gradients":
        if batches is None:
            raise AerogelError(f"score: {name!r} must see data; pass batches, as (inputs, labels)")
        seen: Mapping[str, Tensor] = mean_gradients(model, batches)
    elif need == "earlier":
        if earlier is None:
            raise AerogelError(f"score: {name!r} compares weights with those before a training; pass earlier")
        seen = earlier
    with torch.no_grad():
        if need is None:
            return {name: function(weight.detach()) for name, weight in weights.items()}
        missing = [name for name in weights if name not in seen]
        if missing:
            raise AerogelError(
                f"score: there is no {need} of {missing[0]}; it takes no part in the loss, so protect it"
            )
        return {name: function(weight.detach(), seen[name]) for name, weight in weights.items()}
