"""How many channels, and which: the fewest, lowest-ranked ones whose removal meets every target.

Each candidate is priced on the captured graph resized on paper, so a plan costs milliseconds a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from aerogel.cost import Cost, count
from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Coupling, Group

METRICS = ("channels", "params", "macs", "access_bytes", "peak_bytes")


def check_target(target: Mapping[str, float]) -> None:
    """Raises CutError unless every target is a known metric with a fraction in (0, 1]."""
    if not target:
        raise CutError("cut: target is empty; give a fraction to keep, as target={'macs': 0.5}")
    for metric, fraction in target.items():
        if metric == "latency":
            raise CutError(
                "cut: latency is measured on the exported file; use `aerogel compress --target latency=...`"
            )
        if metric not in METRICS:
            raise CutError(f"cut: target {metric!r} is unknown; {nearest(metric, METRICS)}")
        if not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise CutError(f"cut: target {metric} must be a fraction to keep in (0, 1], got {fraction!r}")


def plan(
    coupling: Coupling,
    scores: Sequence[np.ndarray],
    target: Mapping[str, float],
    *,
    round_to: int = 1,
    min_channels: int = 1,
) -> np.ndarray:
    """The components to remove, as flags (coupling.count,).

    scores: for each group, (n,); ranked globally as they are. Every group keeps at least `min_channels`, and a
    multiple of `round_to` (or all of its channels).
    Raises CutError when even the deepest cut misses a target, saying how far it reaches.
    """
    if round_to < 1 or min_channels < 1:
        raise CutError(f"cut: round_to and min_channels must be at least 1, got {round_to=}, {min_channels=}")
    order = [np.argsort(score, kind="stable") for score in scores]
    ranked = np.sort(np.concatenate([np.zeros(0), *scores]))

    def removed(k: int) -> np.ndarray:
        """Flags when the k lowest-ranked channels of the network are asked for."""
        flags = np.zeros(coupling.count, bool)
        limit = ranked[k - 1] if k else -np.inf
        for group, score, lowest in zip(coupling.groups, scores, order, strict=True):
            keep = _round_up(max(int((score > limit).sum()), min_channels), round_to, len(group))
            flags[group.units[lowest[: len(group) - keep]]] = True
        return flags

    before = {metric: measure(coupling, metric) for metric in target}

    def met(k: int) -> bool:
        return all(f <= target[m] for m, f in fractions(coupling, removed(k), before).items())

    if not met(len(ranked)):
        reach = fractions(coupling, removed(len(ranked)), before)
        missed = ", ".join(
            f"{m}={target[m]:g} (cutting reaches {f:.3g})" for m, f in reach.items() if f > target[m]
        )
        held = "" if coupling.groups else "; nothing can be cut: every channel is frozen"
        raise CutError(
            f"cut: target {missed} is out of reach{held}; ask for a larger fraction or free protected layers"
        )
    return removed(_first(met, len(ranked)))


def measure(coupling: Coupling, metric: str, removed: np.ndarray | None = None) -> float:
    """A metric of the network after a planned cut (none: as it is)."""
    if metric == "channels":
        gone = 0 if removed is None else removed.sum()
        return float(sum(len(group) for group in coupling.groups) - gone)
    cost: Cost = count(coupling.graph if removed is None else coupling.resized(removed))
    return float(getattr(cost, metric))


def fractions(coupling: Coupling, removed: np.ndarray, before: Mapping[str, float]) -> dict[str, float]:
    """What share of each metric would be left."""
    return {m: measure(coupling, m, removed) / max(whole, 1.0) for m, whole in before.items()}


def is_protected(group: Group, protect: Sequence[str]) -> str | None:
    """The pattern that names one of the group's weights or modules, if any: 'features.0', '*.conv1'."""
    names = {name for m in group.members for name in (m.target, m.target.rpartition(".")[0])}
    return next((p for p in protect if any(fnmatchcase(name, p) for name in names)), None)


def _round_up(keep: int, multiple: int, whole: int) -> int:
    return min(-(-keep // multiple) * multiple, whole)


def _first(met: Callable[[int], bool], high: int) -> int:
    """The least k in [0, high] for which `met` holds, given that it holds at high and grows with k."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return low
