"""Weights pruned between training steps, on a schedule. Zhu and Gupta 2017, "To prune, or not to prune: exploring the
efficacy of pruning for model compression", arXiv:1710.01878, section 3.

    for step in pruned_along(state, data, {100: 0.5, 200: 0.8}): ...

Between two prunings the network trains with the masks of the last one; what is gone never comes back. The paper's
cubic ramp is `aerogel.prune.schedule.gradual`, its points `cut_points`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from aerogel.data import Dataset
from aerogel.prune.masks import Masks
from aerogel.prune.weights.choose import check_sparsity, lowest
from aerogel.prune.weights.magnitude import magnitude
from aerogel.train import State, Step, steps

Scores = Callable[[nn.Module], Mapping[str, Tensor]]


def pruned_along(
    state: State, data: Dataset, plan: Mapping[int, float], scores: Scores | None = None, **choice: Any
) -> Iterator[Step]:
    """Trains as `steps` does; after step k it prunes to the sparsity plan[k], after "step 0" before the first one.

    Weights that are zero at the start stay zero. scores(model): {weight: score}, by default magnitude. choice: ranking,
    ratios and least of `lowest`. Raises AerogelError as `lowest` and `steps` do.
    """
    for sparsity in plan.values():
        check_sparsity("pruned_along", sparsity)
    if state.masks is None:
        Masks.of(state.model).put_on(state)
    if state.step in plan:
        prune(state, plan[state.step], scores, **choice)
    for step in steps(state, data):
        if step.number in plan:
            prune(state, plan[step.number], scores, **choice)
        yield step


def prune(state: State, sparsity: float, scores: Scores | None = None, **choice: Any) -> Masks:
    """Prunes what is trained, to that share of zeros; returns the masks that it is held to from now on."""
    before = Masks.of(state.model) if state.masks is None else state.masks
    if not isinstance(before, Masks):
        raise TypeError(f"prune: state.masks is a {type(before).__name__}, which says nothing of single weights")
    found = sizes(state.model, before) if scores is None else scores(state.model)
    masks = before & lowest(found, sparsity, before=before, **choice)
    masks.put_on(state)
    return masks


def sizes(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """The magnitudes of what is masked."""
    weights = dict(model.named_parameters())
    return {name: magnitude(weights[name].detach()) for name in masks}
