"""`cut`: removes coupled channels from any captured network, and proves that the result is exact.

1. couple: labels find what must go together (aerogel.graph.labels, aerogel.prune.coupling);
2. plan: a criterion ranks the channels, the fewest go that meet the target (criteria, plan);
3. slice: every weight keeps its surviving indices, module attributes follow (aerogel.graph.resize);
4. prove: on random inputs and random norm statistics, the cut network's output equals that of the whole network
   with the same indices set to zero: |cut - masked| <= 1e-4 x |output| in float32.
What fails the proof is frozen, with the reason, and the plan is made again: never a wrong network.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aerogel.cost import Cost, count
from aerogel.errors import CutError, nearest
from aerogel.graph import capture, evaluating, tensor_names
from aerogel.graph.resize import resize, sliced
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.criteria import CRITERIA, Criterion
from aerogel.prune.plan import check_target, is_protected, plan

TOLERANCE = 1e-4
Kept = dict[str, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Cut:
    """A proven cut. `kept` {weight or buffer: kept indices by dimension, None for one left whole}.

    frozen {dimension: reason} stayed whole. max_error is the proof's largest relative error.
    """

    model: nn.Module
    before: Cost
    after: Cost
    max_error: float
    kept: Kept
    frozen: dict[str, str]
    inexact: dict[str, str] = field(default_factory=dict)


def cut(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Mapping[str, float],
    criterion: str | Criterion = "l2",
    round_to: int = 1,
    protect: Sequence[str] = (),
    min_channels: int = 1,
) -> Cut:
    """A smaller copy of `model`; the model itself is untouched.

    args, kwargs: example inputs. target: {metric: fraction to keep}, metrics channels, params, macs, access_bytes,
    peak_bytes. protect: names or patterns of modules or weights whose channels stay.
    Raises CaptureError when the model cannot be read, CutError when a target is out of reach.
    """
    check_target(target)
    score = find_criterion(criterion)
    weights = named_weights(model)

    def choose(coupling: Coupling) -> np.ndarray:
        ranks = scores(coupling, weights, score)
        return plan(coupling, ranks, target, round_to=round_to, min_channels=min_channels)

    return _proven(model, args, kwargs, protect, choose)


def deepest(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    protect: Sequence[str] = (),
    min_channels: int = 1,
) -> Cut:
    """As far as cutting can go: `min_channels` left in every group. To ask what a goal may be, not for use."""

    def choose(coupling: Coupling) -> np.ndarray:
        flags = np.zeros(coupling.count, bool)
        for group in coupling.groups:
            flags[group.units[min_channels:]] = True
        return flags

    return _proven(model, args, kwargs, protect, choose)


def _proven(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    protect: Sequence[str],
    choose: Callable[[Coupling], np.ndarray],
) -> Cut:
    """Couples, cuts what `choose` flags, and proves it; groups that fail the proof are frozen and it chooses again."""
    coupling = protected(couple(capture(model, args, kwargs)), protect)
    weights = named_weights(model)
    while True:
        kept = to_tensors(coupling.kept(choose(coupling)))
        error, problem = prove(model, args, kwargs, kept)
        if problem is None:
            break
        coupling = without_failing(model, args, kwargs, coupling, problem)
    smaller = resize(_copy(model), slices(weights, kept))
    after = count(capture(smaller, args, kwargs))
    return Cut(smaller, count(coupling.graph), after, error, kept, coupling.frozen)


def find_criterion(criterion: str | Criterion) -> Criterion:
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise CutError(f"cut: criterion {criterion!r} is unknown; {nearest(criterion, CRITERIA)}")
    return CRITERIA[criterion]


def scores(coupling: Coupling, weights: Mapping[str, Tensor], score: Criterion) -> list[np.ndarray]:
    """Each group's scores over their mean, so that layers of different scale can be ranked together."""
    found = []
    for group in coupling.groups:
        raw = score(group, weights).double()
        if raw.shape != (len(group),) or not torch.isfinite(raw).all():
            raise CutError(
                f"cut: the criterion must give one finite score a channel, got {tuple(raw.shape)} for group {group.name}"
            )
        found.append((raw / raw.mean().clamp_min(1e-30)).numpy())
    return found


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name, detached."""
    tensors = [*model.parameters(), *model.buffers()]
    names = tensor_names(model)
    return {names[id(tensor)]: tensor.detach() for tensor in tensors}


def to_tensors(kept: Mapping[str, tuple[np.ndarray | None, ...]]) -> Kept:
    return {t: tuple(None if k is None else torch.from_numpy(k) for k in dims) for t, dims in kept.items()}


def slices(weights: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    return {target: sliced(weights[target], dims) for target, dims in kept.items()}


def protected(coupling: Coupling, protect: Sequence[str]) -> Coupling:
    """Freezes the groups that a pattern names. Raises CutError for a pattern that names nothing."""
    hit = {group.name: is_protected(group, protect) for group in coupling.groups}
    names = [name for key, _ in coupling.dims for name in (key, key.rpartition(".")[0])]
    for pattern in protect:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CutError(f"cut: protect pattern {pattern!r} names no layer; {nearest(pattern, set(names))}")
    return freeze(coupling, {name: f"protected by {pattern!r}" for name, pattern in hit.items() if pattern})


def freeze(coupling: Coupling, reasons: Mapping[str, str]) -> Coupling:
    """Takes groups out of what can be cut. reasons: {group name: why}."""
    groups = tuple(group for group in coupling.groups if group.name not in reasons)
    return dataclasses.replace(coupling, groups=groups, frozen=coupling.frozen | dict(reasons))


def prove(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, kept: Kept, seed: int = 0
) -> tuple[float, str | None]:
    """(largest relative error, what is wrong or None): the cut network against the masked one.

    Masked: every removed index of every weight set to zero, in the shapes of the whole network.
    """
    generator = torch.Generator().manual_seed(seed)
    masked = _copy(model)
    _randomise_norms(masked, generator)
    smaller = resize(_copy(masked), slices(named_weights(masked), kept))
    for target, tensor in named_weights(masked).items():
        for dim, index in enumerate(kept.get(target, ())):
            if index is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[index] = False
                tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
    args, kwargs = tree_map(lambda x: _random_like(x, generator), (args, dict(kwargs or {})))
    with torch.no_grad(), evaluating(masked), evaluating(smaller):
        whole = masked(*args, **kwargs)
        try:
            less = smaller(*args, **kwargs)
        except Exception as error:  # the user's own code may fail in any way once sizes change
            return float(
                "inf"
            ), f"forward fails once it is cut: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    error = _relative_error(tree_leaves(whole), tree_leaves(less))
    return (
        error,
        None if error <= TOLERANCE else f"cut and masked outputs differ by {error:.1e} of the output",
    )


def without_failing(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    coupling: Coupling,
    problem: str,
) -> Coupling:
    """Cuts half of each group alone and freezes the groups that fail. Raises CutError when none does."""
    reasons = {}
    for group in coupling.groups:
        removed = np.zeros(coupling.count, bool)
        removed[group.units[: len(group) // 2]] = True
        _, wrong = prove(model, args, kwargs, to_tensors(coupling.kept(removed)))
        if wrong:
            reasons[group.name] = wrong
    if not reasons:
        raise CutError(
            f"cut: {type(model).__name__}: {problem}, and no single group is to blame; protect layers by name"
        )
    return freeze(coupling, reasons)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CutError(
            f"cut: {type(model).__name__} cannot be copied ({error}); remove what deepcopy refuses"
        ) from error


def _randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            # a mean below zero keeps most units alive, so that the comparison sees signal in every layer
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 2 - 0.5)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


def _random_like(x: Any, generator: torch.Generator) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x)
    return x


def _relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    pairs = [(e, g) for e, g in zip(expected, got, strict=True) if isinstance(e, Tensor)]
    if any(e.shape != g.shape for e, g in pairs):
        return float("inf")
    errors = [
        ((e - g).abs().max() / e.abs().max().clamp_min(1e-12)).item()
        for e, g in pairs
        if e.is_floating_point()
    ]
    return max((float("inf") if np.isnan(e) else e for e in errors), default=0.0)
