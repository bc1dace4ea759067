"""How many channels, and which: the fewest, lowest-ranked ones whose removal meets every target.

Each candidate is priced on the captured graph resized on paper, so a plan costs milliseconds a step. A latency is
priced by exporting the network as it would be cut (`aerogel.prune.latency`), which takes seconds, so that few are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Coupling, Group
from aerogel.prune.price import METRICS as METRICS
from aerogel.prune.price import measure as measure
from aerogel.prune.price import measures, shares_left
from aerogel.prune.rank import check_ranking, ranks, worth
from aerogel.prune.ratios import fixed_counts, matches, names_of

LATENCIES = ("latency", "latency_ms")  # a fraction to keep; milliseconds
COARSE, FINE = 8, 128  # steps in which a latency is searched: of the way to the deepest cut
Milliseconds = Callable[[np.ndarray], float]


def check_target(target: Mapping[str, float] | None) -> None:
    """Raises CutError unless every target is a known metric with a fraction in (0, 1], or milliseconds above 0."""
    if not isinstance(target, Mapping) or not target:
        raise CutError(f"cut: target must name fractions to keep, as {{'macs': 0.5}}, got {target!r}")
    for metric, goal in target.items():
        if metric not in (*METRICS, *LATENCIES):
            raise CutError(f"cut: target {metric!r} is unknown; {nearest(str(metric), (*METRICS, *LATENCIES))}")
        number = isinstance(goal, int | float)
        if metric == "latency_ms" and not (number and 0 < goal < math.inf):
            raise CutError(f"cut: target latency_ms must be milliseconds above 0, got {goal!r}")
        if metric != "latency_ms" and not (number and 0 < goal <= 1):
            raise CutError(f"cut: target {metric} must be a fraction to keep in (0, 1], got {goal!r}")


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
    ratios: Mapping[str, float] | None = None,
    latency: Milliseconds | None = None,
) -> np.ndarray:
    """The components to remove, as flags (coupling.count,).

    scores: for each group, (n,). ranking: who competes with whom, see `aerogel.prune.rank`. Every group keeps at least
    `min_channels`, and a multiple of `round_to` (or all of its channels). ratios: {pattern: share to remove} of the
    groups for which that is set; the target is met by what the others lose. latency: milliseconds after a planned cut,
    for a latency target; ranked by "value" it is asked for once more for every group. It falls with the width only
    roughly, in steps of the processor's vectors; taken is the first cut in COARSE steps that meets it, then the first
    in FINE steps before that one: not always the smallest.
    Raises CutError when even the deepest cut misses a target, saying how far it reaches.
    """
    check_counts(round_to=round_to, min_channels=min_channels)
    check_ranking(ranking)
    fixed = fixed_counts(coupling, ratios or {})
    counted = {metric: goal for metric, goal in target.items() if metric in METRICS}
    before = dict(measures(coupling, counted))
    free = [i for i, group in enumerate(coupling.groups) if group.name not in fixed]
    competing, compared = [coupling.groups[i] for i in free], [scores[i] for i in free]
    if ranking == "value" and target:
        timed = latency if counted.keys() != target.keys() else None
        whole = timed(np.zeros(coupling.count, bool)) if timed else math.nan

        def shares(flags: np.ndarray) -> list[float]:
            return [s for _, s in shares_left(coupling, flags, before)] + ([timed(flags) / whole] if timed else [])

        compared = worth(competing, compared, coupling.count, shares)
    ranked = ranks(competing, compared, coupling.graph, ranking)
    rank_of = dict(zip(free, ranked, strict=True))
    order = [np.argsort(score, kind="stable") for score in scores]
    most = sum(map(len, ranked))

    @cache
    def removed(k: int) -> np.ndarray:
        """Flags when the k lowest-ranked channels of the network are asked for."""
        flags = np.zeros(coupling.count, bool)
        for i, (group, lowest) in enumerate(zip(coupling.groups, order, strict=True)):
            wanted = int((rank_of[i] >= k).sum()) if i in rank_of else len(group) - fixed[group.name]
            keep = _round_up(max(wanted, min_channels), round_to, len(group))
            flags[group.units[lowest[: len(group) - keep]]] = True
        return flags

    @cache
    def met(k: int) -> bool:
        return all(share <= counted[m] for m, share in shares_left(coupling, removed(k), before))

    if not met(most):
        reach = dict(shares_left(coupling, removed(most), before))
        missed = ", ".join(f"{m}={counted[m]:g} (cutting reaches {f:.3g})" for m, f in reach.items() if f > counted[m])
        raise CutError(_out_of_reach(missed, coupling))
    enough = _first(met, most)
    if counted.keys() == target.keys():
        return removed(enough)
    if latency is None:
        raise CutError("plan: a latency target needs latency=, the milliseconds after a planned cut; `cut` gives it")
    return removed(_first_fast(lambda k: latency(removed(k)), target, enough, most, coupling))


def is_protected(group: Group, protect: Sequence[str]) -> str | None:
    """The pattern that names one of the group's weights or modules, if any: 'features.0', '*.conv1'."""
    names = set[str]().union(*(names_of(member.target) for member in group.members))
    return next((pattern for pattern in protect if matches(pattern, names)), None)


def _out_of_reach(missed: str, coupling: Coupling) -> str:
    held = "" if coupling.groups else "; nothing can be cut: every channel is frozen"
    return f"cut: target {missed} is out of reach{held}; ask for a larger fraction or free protected layers"


def _round_up(keep: int, multiple: int, whole: int) -> int:
    return min(-(-keep // multiple) * multiple, whole)


def _first(met: Callable[[int], bool], high: int) -> int:
    """The least k in [0, high] for which `met` holds, given that it holds at high and grows with k."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return low


def _first_fast(
    ms: Callable[[int], float], target: Mapping[str, float], low: int, high: int, coupling: Coupling
) -> int:
    """The first k of [low, high], in coarse and then in fine steps, whose milliseconds meet the latency target."""
    whole = ms(0) if "latency" in target else math.nan
    goal = min(target.get("latency", math.inf) * whole if "latency" in target else math.inf,
               target.get("latency_ms", math.inf))  # fmt: skip
    tried: dict[int, float] = {}

    def fast(k: int) -> bool:
        tried[k] = ms(k)
        return tried[k] <= goal

    stops = sorted({low + (high - low) * step // COARSE for step in range(COARSE + 1)})
    found = next((k for k in stops if fast(k)), None)
    if found is None:
        best = min(tried.values())
        name = "latency" if "latency" in target else "latency_ms"
        reached = best / whole if name == "latency" else best
        raise CutError(_out_of_reach(f"{name}={target[name]:g} (cutting reaches {reached:.3g})", coupling))
    slower = max((k for k in tried if k < found), default=found)
    while found - slower > max(1, high // FINE):
        middle = (slower + found) // 2
        slower, found = (slower, middle) if fast(middle) else (middle, found)
    return found
