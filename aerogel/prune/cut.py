"""`cut`: removes coupled channels from any captured network, and proves that the result is exact.

1. couple: labels find what must go together (aerogel.graph.labels, aerogel.prune.coupling);
2. plan: a criterion ranks the channels, the fewest go that meet the target (criteria, plan);
3. slice: every weight keeps its surviving indices, module attributes follow (aerogel.graph.resize);
4. prove: the cut network equals the masked one (aerogel.prune.proof).
What fails the proof is frozen, with the reason, and the plan is made again: never a wrong network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.optim import Optimizer

from aerogel.cost import Cost, count
from aerogel.errors import CutError, nearest
from aerogel.graph import capture
from aerogel.graph.resize import resize
from aerogel.prune.attributes import Key, follow_in_config, readings, set_attributes
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.criteria import Criterion
from aerogel.prune.latency import DoesNotRun, LatencyAfter
from aerogel.prune.plan import check_counts, check_target, is_protected, plan
from aerogel.prune.proof import Kept, copied, named_weights, prove_any, prove_inexact, slices, to_tensors
from aerogel.prune.rank import check_ranking, find_criterion, scores
from aerogel.prune.ratios import check_ratios, names_of
from aerogel.prune.surgery import Origin, apply_to, origin_of

HEADS = ("whole", "width")


@dataclass(frozen=True)
class Recount:
    """Captures and counts a network when called."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None

    def __call__(self) -> Cost:
        return count(capture(self.model, self.args, self.kwargs))


@dataclass(frozen=True)
class Cut:
    """A proven cut. `kept` {weight or buffer: kept indices by dimension, None for one left whole}.

    frozen {dimension: reason} stayed whole. max_error is the proof's largest relative error. inexact {group: reason}:
    what can only be cut inexactly; difference: where that was allowed, the largest relative difference from the masked
    network on random inputs; max_error is then what is left of it while those statistics are held fixed.
    """

    model: nn.Module
    before: Cost
    recount: Recount = field(repr=False, compare=False)
    max_error: float
    kept: Kept
    frozen: dict[str, str]
    inexact: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0
    origin: Origin = field(default_factory=lambda: Origin({}, {}), repr=False, compare=False)

    @cached_property
    def after(self) -> Cost:
        """What the cut network costs, as it is when first asked: captured anew, since code may take other ways now."""
        return self.recount()

    def apply_to(self, *holders: Optimizer | nn.Module) -> None:
        """Cuts optimizers of the network before the cut, and averages of its weights, along, in place."""
        apply_to(self.origin, self.model, self.kept, *holders)


def cut(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Mapping[str, float] | None = None,
    criterion: str | Criterion = "l2",
    ranking: str = "local",
    ratios: Mapping[str, float] | None = None,
    round_to: int = 1,
    protect: Sequence[str] = (),
    min_channels: int = 1,
    threads: int = 1,
    allow_inexact: bool = False,
    heads: str = "whole",
) -> Cut:
    """A smaller copy of `model`; the model itself is untouched.

    args, kwargs: example inputs. target: {metric: fraction to keep}, metrics channels (of those that can be
    cut), params, macs, access_bytes, peak_bytes, file_bytes, latency; latency_ms in milliseconds. A latency is that of
    ONNX Runtime here with `threads`, from its single kernels (aerogel.prune.latency): seconds to minutes.
    criterion: a name, a function (group, weights) -> scores, or what `aerogel.prune.criterion` makes of them.
    ranking: "local" compares channels within their group, so that every group loses the same share: the safe one
    (docs/log.md, 2026-11-26), "global" through the whole network, "isomorphic" between groups of one structure, "value"
    by score over what a channel costs of the target (aerogel.prune.rank). ratios: {pattern: share of
    a layer's channels to remove} for layers of which that is set; the target is met by the others. round_to: groups
    keep multiples of it, or all of their channels. protect: names or patterns of modules or weights that keep their
    shape. allow_inexact: cut what a statistic over channels couples too (a layer norm), and tell the difference from
    the masked network. heads: of attention "whole" heads are cut, or their "width".
    Raises CaptureError when the model cannot be read, CutError when a target is out of reach.
    """
    if target is not None or not ratios:
        check_target(target)
    check_ratios(ratios or {})
    check_ranking(ranking)
    check_counts(round_to=round_to, min_channels=min_channels, threads=threads)
    if heads not in HEADS:
        raise CutError(f"cut: heads {heads!r} is unknown; {nearest(str(heads), HEADS)}")
    score = find_criterion(criterion)
    weights = named_weights(model)
    after = LatencyAfter(Trial(model, args, kwargs).network, args, kwargs, threads)

    def choose(coupling: Coupling) -> np.ndarray:
        found = scores(coupling, weights, score)
        try:
            return plan(coupling, found, target or {}, round_to=round_to, min_channels=min_channels, ranking=ranking,
                        ratios=ratios, latency=lambda removed: after(coupling, removed))  # fmt: skip
        except DoesNotRun as failed:  # the proof will say of which group, and freeze it
            return failed.removed

    return proven(model, args, kwargs, protect, choose, allow_inexact=allow_inexact, whole_heads=heads == "whole")


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

    return proven(model, args, kwargs, protect, choose)


def proven(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    protect: Sequence[str],
    choose: Callable[[Coupling], np.ndarray],
    *,
    allow_inexact: bool = False,
    whole_heads: bool = True,
) -> Cut:
    """Cuts what `choose` flags, and proves it; groups that fail the proof are frozen and it chooses again."""
    if any(p.is_meta for p in model.parameters()):
        what = f"cut: {type(model).__name__} has weights on the meta device, without numbers to cut"
        raise CutError(f"{what}; give them some, model.to_empty(device='cpu') and load_state_dict, or only couple()")
    graph = capture(model, args, kwargs)
    coupling = protected(couple(graph, whole_heads=whole_heads), protect)
    coupling = freeze(coupling, untrained(model, coupling))
    inexact = {group.name: group.inexact for group in coupling.groups if group.inexact}
    exact = dataclasses.replace(coupling, groups=tuple(g for g in coupling.groups if not g.inexact))
    if not allow_inexact:
        coupling = exact
    trial = Trial(model, args, kwargs)
    while True:
        try:
            removed = choose(coupling)
        except CutError as missed:
            if inexact and not allow_inexact and "out of reach" in str(missed):
                example = next(iter(inexact))
                more = f"{len(inexact)} more groups pass a statistic ({example}: {inexact[example]})"
                raise CutError(f"{missed}; {more}: allow_inexact=True cuts them too and tells the change") from missed
            if not coupling.groups:
                raise CutError(f"{missed}{_commonest(coupling.frozen)}") from missed
            raise
        error, problem, attributes, difference = trial(coupling, sure := _exact_part(coupling, removed))
        if problem is None and (sure != removed).any():
            inexact_error, problem, attributes, difference = trial(coupling, removed)
            error = max(error, inexact_error)
        if problem is None:
            break
        coupling = without_failing(trial, coupling, removed, problem)
    kept = to_tensors(coupling.kept(removed))
    smaller = made(model, kept, attributes)
    untold = follow_in_config(smaller, model, coupling, removed)
    return Cut(
        smaller,
        count(graph),
        Recount(smaller, args, kwargs),
        error,
        kept,
        coupling.frozen | untold,
        inexact,
        difference,
        origin=origin_of(model, smaller),
    )


def _exact_part(coupling: Coupling, removed: np.ndarray) -> np.ndarray:
    """Of a planned cut what is exact: beside an inexact one nothing would show whether it is."""
    sure = removed.copy()
    for group in coupling.groups:
        if group.inexact:
            sure[group.units] = False
    return sure


def _commonest(frozen: Mapping[str, str]) -> str:
    """Why most of it stays, with a name for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in frozen.items():
        if why not in ("network output", "tied to the network's input or to a constant"):
            reasons.setdefault(why, []).append(name)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    return "".join(f"; {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in most)


def made(model: nn.Module, kept: Kept, attributes: Mapping[Key, Any]) -> nn.Module:
    """The cut copy."""
    smaller = resize(copied(model, besides=kept), slices(named_weights(model), kept))
    set_attributes(smaller, attributes)
    return smaller


class Tried(NamedTuple):
    """The proof's relative error, what is wrong or None, the attributes with which nothing is, what the cut changes."""

    error: float
    wrong: str | None
    attributes: dict[Key, Any]
    difference: float


@dataclass(frozen=True)
class Trial:
    """Cuts a copy and proves it, with every reading of the numbers that its modules hold."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None

    def __call__(self, coupling: Coupling, removed: np.ndarray) -> Tried:
        """Where no inexact group is cut the outputs must be equal, else equal while the statistics are held fixed."""
        kept = to_tensors(coupling.kept(removed))
        exact = not any(group.inexact and removed[group.units].any() for group in coupling.groups)
        possible = readings(self.model, coupling, removed)
        if exact:
            error, wrong, attributes = prove_any(self.model, self.args, self.kwargs, kept, possible)
            return Tried(error, wrong, attributes, 0.0)
        first: Tried | None = None
        for attributes in possible:
            error, wrong, difference = prove_inexact(self.model, self.args, self.kwargs, kept, attributes)
            if wrong is None:
                return Tried(error, None, attributes, difference)
            first = first or Tried(error, wrong, attributes, difference)
        assert first is not None
        return first

    def network(self, coupling: Coupling, removed: np.ndarray) -> nn.Module | None:
        """The network cut like that; None where something is wrong with it."""
        tried = self(coupling, removed)
        return None if tried.wrong else made(self.model, to_tensors(coupling.kept(removed)), tried.attributes)


def untrained(model: nn.Module, coupling: Coupling) -> dict[str, str]:
    """{group: why}: groups that hold a parameter frozen by requires_grad, unless all are (a network only used)."""
    held = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if not any(p.requires_grad for p in model.parameters()):
        return {}
    found = {group.name: [m.target for m in group.members if m.target in held] for group in coupling.groups}
    return {
        name: f"{targets[0]} is frozen: requires_grad is False; set it True to let it be cut"
        for name, targets in found.items()
        if targets
    }


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


def without_failing(trial: Trial, coupling: Coupling, removed: np.ndarray, problem: str) -> Coupling:
    """Makes the planned cut part by part and freezes the groups with which the proof fails.

    Groups that pass together are tried no further. Raises CutError where the network fails its proof uncut.
    """
    whole = trial(coupling, np.zeros_like(removed))
    if whole.wrong:
        what = "not the same twice" if np.isfinite(whole.error) else "not finite, or not the same twice"
        raise CutError(
            f"cut: {type(trial.model).__name__}: nothing can be proven, its output on random inputs is {what}; make "
            "forward() deterministic, and defined for any numbers"
        )
    reasons: dict[str, str] = {}
    passed = np.zeros_like(removed)
    # exact ones first: beside an inexact one nothing shows whether they are
    waiting = [[g for g in coupling.groups if g.inexact], [g for g in coupling.groups if not g.inexact]]
    while waiting:
        groups = waiting.pop()
        tried = passed.copy()
        for group in groups:
            tried[group.units] = removed[group.units]
        if (tried == passed).all():
            continue
        wrong = trial(coupling, tried).wrong
        if wrong is None:
            passed = tried
        elif len(groups) == 1:
            reasons[groups[0].name] = wrong
        else:
            waiting += [groups[len(groups) // 2 :], groups[: len(groups) // 2]]
    if not reasons:  # all that was planned has passed this time
        raise CutError(
            f"cut: {type(trial.model).__name__}: nothing can be proven, its output is not the same twice ({problem}); "
            "make forward() deterministic"
        )
    return freeze(coupling, reasons)
