"""How many channels, and which: the fewest, lowest-ranked ones whose removal meets every target.

Each candidate is priced on the captured graph resized on paper, so a plan costs milliseconds a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from aerogel.cost import Cost, count
from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Coupling, Group

RANKINGS = ("global", "local")
METRICS = ("channels", "params", "macs", "access_bytes", "peak_bytes")


def check_target(target: Mapping[str, float]) -> None:
    """Raises CutError unless every target is a known metric with a fraction in (0, 1]."""
    if not isinstance(target, Mapping) or not target:
        raise CutError(f"cut: target must name fractions to keep, as {{'macs': 0.5}}, got {target!r}")
    for metric, fraction in target.items():
        if metric == "latency":
            raise CutError("cut: latency is measured on the exported file; use `aerogel compress --target latency=...`")
        if metric not in METRICS:
            raise CutError(f"cut: target {metric!r} is unknown; {nearest(str(metric), METRICS)}")
        if not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise CutError(f"cut: target {metric} must be a fraction to keep in (0, 1], got {fraction!r}")


def check_counts(**counts: int) -> None:
    """Raises CutError unless each is an integer of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise CutError(f"cut: {name} must be an integer of at least 1, got {value!r}")


def plan(
    coupling: Coupling,
    scores: Sequence[np.ndarray],
    target: Mapping[str, float],
    *,
    round_to: int = 1,
    min_channels: int = 1,
    ranking: str = "global",
) -> np.ndarray:
    """The components to remove, as flags (coupling.count,).

    scores: for each group, (n,). ranking: "global" compares them as they are through the whole network, equal ones
    spread over the groups; "local" only within a group, so that every group loses the same share. Every group keeps
    at least `min_channels`, and a multiple of `round_to` (or all of its channels).
    Raises CutError when even the deepest cut misses a target, saying how far it reaches.
    """
    check_counts(round_to=round_to, min_channels=min_channels)
    if ranking not in RANKINGS:
        raise CutError(f"cut: ranking {ranking!r} is unknown; {nearest(str(ranking), RANKINGS)}")
    sizes = [len(group) for group in coupling.groups]
    order = [np.argsort(score, kind="stable") for score in scores]
    ranks = _ranks(scores, order, ranking)

    def removed(k: int) -> np.ndarray:
        """Flags when the k lowest-ranked channels of the network are asked for."""
        flags = np.zeros(coupling.count, bool)
        for group, rank, lowest in zip(coupling.groups, ranks, order, strict=True):
            keep = _round_up(max(int((rank >= k).sum()), min_channels), round_to, len(group))
            flags[group.units[lowest[: len(group) - keep]]] = True
        return flags

    before = _measures(coupling, target)

    def met(k: int) -> bool:
        return all(f <= target[m] for m, f in fractions(coupling, removed(k), before).items())

    if not met(sum(sizes)):
        reach = fractions(coupling, removed(sum(sizes)), before)
        missed = ", ".join(f"{m}={target[m]:g} (cutting reaches {f:.3g})" for m, f in reach.items() if f > target[m])
        held = "" if coupling.groups else "; nothing can be cut: every channel is frozen"
        raise CutError(
            f"cut: target {missed} is out of reach{held}; ask for a larger fraction or free protected layers"
        )
    return removed(_first(met, sum(sizes)))


def measure(coupling: Coupling, metric: str, removed: np.ndarray | None = None) -> float:
    """A metric of the network after a planned cut (none: as it is); `channels` are those that can be cut."""
    return _measures(coupling, [metric], removed)[metric]


def names_of(target: str) -> set[str]:
    """A weight's name and those of the modules it stands in: a.b.weight -> {a.b.weight, a.b, a}."""
    parts = target.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def is_protected(group: Group, protect: Sequence[str]) -> str | None:
    """The pattern that names one of the group's weights or modules, if any: 'features.0', '*.conv1'."""
    names = set[str]().union(*(names_of(member.target) for member in group.members))
    return next((p for p in protect if any(fnmatchcase(name, p) for name in names)), None)


def _measures(coupling: Coupling, metrics: Iterable[str], removed: np.ndarray | None = None) -> dict[str, float]:
    cost: Cost = count(coupling.graph if removed is None else coupling.resized(removed))
    gone = 0 if removed is None else int(removed.sum())
    channels = sum(len(group) for group in coupling.groups) - gone
    return {m: float(channels if m == "channels" else getattr(cost, m)) for m in metrics}


def fractions(coupling: Coupling, removed: np.ndarray, before: Mapping[str, float]) -> dict[str, float]:
    """What share of each metric would be left; all of it where there is nothing to begin with."""
    after = _measures(coupling, before, removed)
    return {m: after[m] / whole if whole else 1.0 for m, whole in before.items()}


def _ranks(scores: Sequence[np.ndarray], order: Sequence[np.ndarray], ranking: str) -> list[np.ndarray]:
    """For each group, the rank (n,) of its channels in the whole network.

    global: by score, then by place in the group (a share, 0 to 1); local: by place, then by score.
    """
    places = np.concatenate([[], *(np.argsort(lowest) / len(lowest) for lowest in order)])
    values = np.concatenate([[], *scores])
    lowest_first = np.lexsort((places, values) if ranking == "global" else (values, places))
    ranks = np.empty(len(lowest_first), dtype=int)
    ranks[lowest_first] = np.arange(len(lowest_first))
    return np.split(ranks, np.cumsum([len(score) for score in scores], dtype=int))[:-1]


def _round_up(keep: int, multiple: int, whole: int) -> int:
    return min(-(-keep // multiple) * multiple, whole)


def _first(met: Callable[[int], bool], high: int) -> int:
    """The least k in [0, high] for which `met` holds, given that it holds at high and grows with k."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return low
