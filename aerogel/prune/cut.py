"""`cut`: removes coupled channels from any captured network, and proves that the result is exact.

1. couple: labels find what must go together (aerogel.graph.labels, aerogel.prune.coupling);
2. plan: a criterion ranks the channels, the fewest go that meet the target (criteria, plan);
3. slice: every weight keeps its surviving indices, module attributes follow (aerogel.graph.resize);
4. prove: on random inputs, norm statistics and biases, the output of the cut network equals that of the whole
   network with the same indices set to zero: |cut - masked| <= 1e-4 x |output| in float32.
What fails the proof is frozen, with the reason, and the plan is made again: never a wrong network.
"""

from __future__ import annotations

import contextlib
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
from aerogel.graph.capture import quiet
from aerogel.graph.resize import resize, sliced
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.criteria import CRITERIA, Criterion
from aerogel.prune.plan import check_counts, check_target, is_protected, names_of, plan

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
    ranking: str = "global",
    round_to: int = 1,
    protect: Sequence[str] = (),
    min_channels: int = 1,
) -> Cut:
    """A smaller copy of `model`; the model itself is untouched.

    args, kwargs: example inputs. target: {metric: fraction to keep}, metrics channels (of those that can be
    cut), params, macs, access_bytes, peak_bytes. ranking: "global" compares channels through the whole network,
    "local" within their group, so that every group loses the same share. round_to: groups keep multiples of it, or
    all of their channels. protect: names or patterns of modules or weights that keep their shape.
    Raises CaptureError when the model cannot be read, CutError when a target is out of reach.
    """
    check_target(target)
    check_counts(round_to=round_to, min_channels=min_channels)
    score = find_criterion(criterion)
    weights = named_weights(model)

    def choose(coupling: Coupling) -> np.ndarray:
        ranks = scores(coupling, weights, score)
        return plan(coupling, ranks, target, round_to=round_to, min_channels=min_channels, ranking=ranking)

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
    check_counts(min_channels=min_channels)

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
    """Cuts what `choose` flags, and proves it; groups that fail the proof are frozen and it chooses again."""
    graph = capture(model, args, kwargs)
    coupling = protected(couple(graph), protect)
    while True:
        removed = choose(coupling)
        kept = to_tensors(coupling.kept(removed))
        error, problem = prove(model, args, kwargs, kept)
        if problem is None:
            break
        coupling = without_failing(model, args, kwargs, coupling, removed, problem)
    smaller = resize(_copy(model), slices(named_weights(model), kept))
    return Cut(smaller, count(graph), count(capture(smaller, args, kwargs)), error, kept, coupling.frozen)


def find_criterion(criterion: str | Criterion) -> Criterion:
    """The function behind a name, or the function itself. Raises CutError for an unknown name."""
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise CutError(f"cut: criterion {criterion!r} is unknown; {nearest(str(criterion), CRITERIA)}")
    return CRITERIA[criterion]


def scores(coupling: Coupling, weights: Mapping[str, Tensor], score: Criterion) -> list[np.ndarray]:
    """Each group's scores over their mean size, so that layers of different scale can be ranked together.

    Raises CutError unless the criterion gives one finite number a channel.
    """
    found = []
    for group in coupling.groups:
        raw = torch.as_tensor(score(group, weights)).detach().double().cpu()
        bad = int((~torch.isfinite(raw)).sum())
        if raw.shape != (len(group),) or bad:
            raise CutError(
                f"cut: the criterion must give one finite score for each of the {len(group)} channels of "
                f"{group.name}, got shape {tuple(raw.shape)} with {bad} not finite"
            )
        found.append((raw / raw.abs().mean().clamp_min(1e-30)).numpy())
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
    if isinstance(protect, str):
        raise CutError(f"cut: protect must be a list of patterns, got {protect!r}; write [{protect!r}]")
    weights = (value.target for value in coupling.graph.values.values() if value.is_weight)
    names = set[str]().union(*(names_of(target) for target in weights))
    for pattern in protect:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CutError(f"cut: protect pattern {pattern!r} names no layer; {nearest(pattern, names)}")
    hit = {group.name: is_protected(group, protect) for group in coupling.groups}
    return freeze(coupling, {name: f"protected by {pattern!r}" for name, pattern in hit.items() if pattern})


def freeze(coupling: Coupling, reasons: Mapping[str, str]) -> Coupling:
    """Takes groups out of what can be cut. reasons: {group name: why}."""
    groups = tuple(group for group in coupling.groups if group.name not in reasons)
    return dataclasses.replace(coupling, groups=groups, frozen=coupling.frozen | dict(reasons))


def prove(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, kept: Kept, seed: int = 0
) -> tuple[float, str | None]:
    """(largest relative error, what is wrong or None): the cut network against the masked one.

    Masked: every removed index of every weight set to zero, in the shapes of the whole network. In float32; where
    that fails, once more in float64: some networks amplify rounding, a wrong index stays wrong.
    """
    error, wrong = _compared(model, args, kwargs, kept, seed, torch.float32)
    if wrong and np.isfinite(error):
        with contextlib.suppress(CutError):  # code that insists on float32 has had its verdict
            finer, still_wrong = _compared(model, args, kwargs, kept, seed, torch.float64)
            if not still_wrong:
                return finer, None
    return error, wrong


def _compared(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    kept: Kept,
    seed: int,
    precision: torch.dtype,
) -> tuple[float, str | None]:
    """The proof in one precision."""
    generator = torch.Generator().manual_seed(seed)
    masked = _copy(model).to(precision)
    _randomise(masked, generator)
    smaller = resize(_copy(masked), slices(named_weights(masked), kept))
    for target, tensor in named_weights(masked).items():
        for dim, index in enumerate(kept.get(target, ())):
            if index is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[index] = False
                tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
    args, kwargs = tree_map(lambda x: _random_like(x, precision, generator), (args, dict(kwargs or {})))
    again, again_named = copy.deepcopy((args, kwargs))  # a network may write into its input
    with torch.no_grad(), evaluating(masked), evaluating(smaller), quiet():
        try:
            whole = masked(*args, **kwargs)
        except Exception as failure:
            what = f"{_brief(failure)}; make it take any numbers of the example's shape"
            raise CutError(f"cut: {type(model).__name__} fails on random inputs: {what}") from failure
        try:
            less = smaller(*again, **again_named)
        except Exception as failure:  # the user's own code may fail in any way once sizes change
            return float("inf"), f"forward fails once it is cut: {_brief(failure)}"
    error = _relative_error(tree_leaves(whole), tree_leaves(less))
    wrong = None if error <= TOLERANCE else f"cut and masked outputs differ by {error:.1e} of the output"
    return error, wrong


def without_failing(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    coupling: Coupling,
    removed: np.ndarray,
    problem: str,
) -> Coupling:
    """Makes the planned cut group by group and freezes the groups with which the proof fails.

    Raises CutError where the network fails its proof uncut.
    """
    if prove(model, args, kwargs, {})[1]:
        raise CutError(
            f"cut: {type(model).__name__}: nothing can be proven, its output on random inputs is not finite "
            "or not the same twice; make forward() deterministic"
        )
    reasons: dict[str, str] = {}
    passed = np.zeros_like(removed)
    for group in coupling.groups:
        tried = passed.copy()
        tried[group.units] = removed[group.units]
        _, wrong = prove(model, args, kwargs, to_tensors(coupling.kept(tried)))
        if wrong:
            reasons[group.name] = wrong
        else:
            passed = tried
    assert reasons, problem  # at the last group all that was planned has been tried
    return freeze(coupling, reasons)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CutError(
            f"cut: {type(model).__name__} cannot be copied ({error}); remove what deepcopy refuses"
        ) from error


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random norm statistics, scales and biases of the size that they had.

    Fresh ones (all 0 or all 1) and dead channels would hide a wrong index.
    """

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.weight is not None:
                scale = module.weight.detach()
                scale.copy_((scale.abs().mean() or 1.0) * (0.5 + noise(scale)))
            if module.running_mean is not None and module.running_var is not None:
                mean, variance = module.running_mean, module.running_var
                # a mean below the true one keeps most units alive: every layer sends a signal on
                mean.sub_(variance.sqrt() * noise(mean))
                variance.mul_(0.5 + noise(variance))
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and bias is not None:  # noise no larger than the signal that it is added to
            signal = weight.detach().reshape(len(weight), -1).norm(dim=1).mean()
            bias.detach().add_(signal * (noise(bias) - 0.5))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _random_like(x: Any, precision: torch.dtype, generator: torch.Generator) -> Any:
    """Random numbers in the shape of a float tensor; of any other tensor a copy."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x.device, precision)
    return x.clone() if isinstance(x, Tensor) else x


def _relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest |got - expected| / max |expected| over the tensors; for whole numbers the share that differs.

    Infinite where shapes differ, where a number is not finite, and where there is nothing to compare.
    """
    expected, got = ([x for x in leaves if isinstance(x, Tensor)] for leaves in (expected, got))
    if [e.shape for e in expected] != [g.shape for g in got]:
        return float("inf")
    errors = []
    for e, g in zip(expected, got, strict=True):
        if not (e.is_floating_point() or e.is_complex()):
            errors.append((e != g).double().mean().item())
        elif e.numel():
            errors.append(((e - g).abs().max() / e.abs().max().clamp_min(1e-12)).item())
    return max((error if np.isfinite(error) else float("inf") for error in errors), default=float("inf"))
