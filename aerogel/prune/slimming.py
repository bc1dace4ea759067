"""Network slimming. Liu, Li, Shen, Huang, Yan, Zhang 2017, "Learning efficient convolutional networks through network
slimming", arXiv:1708.06519.

train   sum over the batch of l(f(x, W), y) + lambda * sum |gamma|     (eq. 1) over the scales of all batch norms;
        autograd's d|gamma|/d gamma, sign(gamma) with sign(0) = 0, is the paper's sub-gradient step
cut     the channels whose |gamma| lies below one percentile of the whole network's, 70 % say: {"channels": 0.3}
tune    fine-tune what is left; repeat from the top for a multi-pass run
Paper: lambda 1e-4 (VGG), 1e-5 (ResNet, DenseNet) over 160 epochs at rate 0.1; every gamma starts from 0.5
(`set_scales`). A scale can move by at most lambda * sum(rates) / (1 - momentum): a shorter run needs a larger lambda.

A channel of a plain network passes one batch norm, and its score is that |gamma|. In pre-activation and dense networks
a norm reads what other layers read too, each with a gamma of its own; the paper puts a channel selection layer before
each, which leaves the shared channels in place. Here what is shared is one coupled channel (`aerogel.prune.coupling`):
it goes from every layer that makes or reads it, and its score is the largest (`reduce`) of the |gamma| that it passes,
so that it goes only once no layer asks for it.
Differs: coupled channels instead of the selection layer; weight decay spares gamma (Recipe), where the paper decays
it; every group keeps `min_channels`, where the paper's threshold may wipe out a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError, CutError
from aerogel.graph import tensor_names
from aerogel.prune.coupling import Coupling, Group
from aerogel.prune.criteria.slices import by_channel, check_reduce, in_single, reduced
from aerogel.prune.cut import Cut, freeze, proven
from aerogel.prune.plan import LATENCIES, check_counts, check_target, plan
from aerogel.prune.proof import named_weights
from aerogel.train.objective import Objective


def scales(model: nn.Module) -> dict[str, Tensor]:
    """{name: gamma (channels,)} of every batch norm that has one, in the model's order; gradients flow."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    names = tensor_names(model)
    return {names[id(norm.weight)]: norm.weight for norm in norms if norm.weight is not None}


def set_scales(model: nn.Module, value: float = 0.5) -> None:
    """Every gamma of a batch norm to `value`, in place. Raises AerogelError when it is not positive and finite."""
    if not 0 < value < math.inf:
        raise AerogelError(f"set_scales: value must be > 0 and finite, got {value}; the paper starts from 0.5")
    with torch.no_grad():
        for gamma in scales(model).values():
            gamma.fill_(value)


def scale_penalty(model: nn.Module) -> Tensor:
    """Sum of |gamma| over the batch norms in training: (). Raises AerogelError where there is none."""
    trained = [gamma.abs().sum() for gamma in scales(model).values() if gamma.requires_grad]
    if not trained:
        raise AerogelError(
            f"slimming: {type(model).__name__} has no batch norm whose scale is trained; "
            "unfreeze its norms, or prune by another criterion"
        )
    return torch.stack(trained).sum()


class Slimming(nn.Module):
    """The objective: another one's losses, and "slimming": penalty * sum |gamma|.

    Raises AerogelError when the penalty is negative or not finite.
    """

    def __init__(self, objective: Objective, penalty: float = 1e-4) -> None:
        super().__init__()
        if not 0 <= penalty < math.inf:
            raise AerogelError(f"Slimming: penalty must be >= 0 and finite, got {penalty}; the paper has 1e-5 to 1e-4")
        self.objective, self.penalty = objective, penalty

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {**self.objective(student, batch), "slimming": self.penalty * scale_penalty(student)}


def threshold(model: nn.Module, ratio: float) -> float:
    """The |gamma| below which that share of all batch-norm channels lies: the paper's global percentile.

    Raises AerogelError for a ratio outside [0, 1) and for a model without batch norms.
    """
    if not 0 <= ratio < 1:
        raise AerogelError(f"threshold: ratio must be in [0, 1), got {ratio}; the paper removes 0.4 to 0.7")
    ordered = np.sort(_sizes(model))
    return float(ordered[int(len(ordered) * ratio)])


def histograms(*models: nn.Module, bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """How many |gamma| of each model fall into each bin: counts (models, bins) over common edges (bins + 1,) from 0.

    Raises AerogelError for no model, bins below 1, and a model without batch norms.
    """
    if not models or bins < 1:
        raise AerogelError(f"histograms: give at least one model and one bin, got {len(models)} and {bins=}")
    found = [_sizes(model) for model in models]
    edges = np.linspace(0.0, max(float(sizes.max()) for sizes in found) or 1.0, bins + 1)
    return np.stack([np.histogram(sizes, edges)[0] for sizes in found]), edges


def slim(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Mapping[str, float],
    reduce: str = "max",
    protect: Sequence[str] = (),
    round_to: int = 1,
    min_channels: int = 1,
) -> Cut:
    """A copy of `model` without its channels of smallest |gamma|, one threshold for the whole network.

    Options as of `cut`. target: {"channels": 0.3} removes the lowest 70 %; other metrics ask for the lowest threshold
    that meets them. reduce: how a channel that passes several norms is scored, by the max, mean or sum of |gamma|.
    Groups that pass no batch norm stay whole and are named in `frozen`.
    Raises CutError when no group passes one or a target is out of reach, CaptureError when the model cannot be read.
    """
    check_target(target)
    if timed := [metric for metric in target if metric in LATENCIES]:
        raise CutError(
            f"slim: {timed[0]} is a target of cut alone; use cut(criterion=criterion('bn_scale', reduce={reduce!r}, "
            "normalize='none'))"
        )
    check_counts(round_to=round_to, min_channels=min_channels)
    check_reduce(reduce)
    weights = named_weights(model)
    gammas = {name: in_single(weights[name]).abs().cpu() for name in scales(model)}
    unscaled: dict[str, str] = {}

    def choose(coupling: Coupling) -> np.ndarray:
        scores = {group.name: scale_of(group, gammas, reduce) for group in coupling.groups}
        unscaled.update({name: "passes no batch norm" for name, score in scores.items() if score is None})
        coupling = freeze(coupling, unscaled)
        if not coupling.groups:
            what = f"slim: {type(model).__name__}: no channels that can be cut pass a batch norm"
            raise CutError(f"{what}; prune by another criterion, cut(criterion='l2')")
        ranked = [score for score in scores.values() if score is not None]
        return plan(coupling, ranked, target, round_to=round_to, min_channels=min_channels)

    made = proven(model, args, kwargs, protect, choose)
    return dataclasses.replace(made, frozen=unscaled | made.frozen)


def scale_of(group: Group, gammas: Mapping[str, Tensor], reduce: str = "max") -> np.ndarray | None:
    """(n,): for each channel of the group, the max, mean or sum of |gamma| over all the norms that it passes.

    gammas: {name: |gamma|}. None where the group passes none of them.
    """
    passed = [by_channel(gammas[member.target], member) for member in group.members if member.target in gammas]
    return reduced(passed, reduce, group).numpy() if passed else None


def _sizes(model: nn.Module) -> np.ndarray:
    """|gamma| of every batch-norm channel: (channels,)."""
    found = scales(model)
    if not found:
        raise AerogelError(f"slimming: {type(model).__name__} has no batch norm with a scale; nothing can be slimmed")
    return torch.cat([gamma.detach().float().abs().flatten() for gamma in found.values()]).cpu().numpy()
