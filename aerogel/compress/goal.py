"""Goals as a user types them: `latency=0.5` (a fraction to keep), `latency=2.5ms`, `macs=150M`, `params=1M`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

from aerogel.compress.settings import Settings
from aerogel.cost.budget import BYTES, COUNTS, TIMES, quantity
from aerogel.errors import AerogelError, nearest

# Every metric, with the units of its absolute values: milliseconds, counts, bytes.
UNITS: dict[str, dict[str, float]] = {
    "latency": TIMES,
    "params": COUNTS,
    "macs": COUNTS,
    "access_bytes": BYTES,
    "peak_bytes": BYTES,
    "file_bytes": BYTES,
    "channels": {},
}
WEIGHTS = "nonzero_weights"  # of a network whose single weights are pruned; its goal is --sparsity


@dataclass(frozen=True)
class Goal:
    """Keep `limit` of a metric: a fraction of the original, or an absolute value (ms, counts, bytes)."""

    metric: str
    limit: float
    absolute: bool
    text: str  # as typed

    def fraction(self, before: float) -> float:
        """The share of `before` that may be left. Raises AerogelError when an absolute goal is already met."""
        if not self.absolute:
            return self.limit
        if self.limit >= before:
            now = typed(self.metric, before, absolute=True)
            raise AerogelError(f"--target {self.text}: the network is already within it ({now}); ask for less")
        return self.limit / before


def goals_of(settings: Settings) -> tuple[Goal, ...]:
    """None for a scan alone. Raises AerogelError as `parse_goals` does."""
    sparse = settings.sparse
    if sparse is not None:
        if sparse.sparsity or not sparse.exact:
            return (Goal(WEIGHTS, 1 - sparse.sparsity, False, sparse.text),)
        if settings.scan:
            return ()
        raise AerogelError("--sparsity 0 prunes nothing; ask for more, as 0.9, or for --scan")
    if settings.verb == "prune" and not settings.target:
        if settings.scan:
            return ()
        raise AerogelError("--target is missing; say what to reach, as --target macs=0.5, or ask for --scan alone")
    return parse_goals(settings.target)


def parse_goals(texts: Sequence[str]) -> tuple[Goal, ...]:
    """Raises AerogelError for no goal, a metric given twice, or whatever `parse_goal` refuses."""
    goals = tuple(parse_goal(text) for text in texts)
    if not goals:
        raise AerogelError("--target is missing; say what to reach, as --target latency=0.5 or --target macs=150M")
    metrics = [goal.metric for goal in goals]
    if len(set(metrics)) < len(metrics):
        raise AerogelError(f"--target: each metric is given once, got {', '.join(metrics)}")
    return goals


def parse_goal(text: str) -> Goal:
    """One METRIC=VALUE. Raises AerogelError for an unknown metric or unit, or a fraction outside (0, 1]."""
    name, equals, value = text.partition("=")
    metric = name.strip()
    if not equals or metric not in UNITS:
        raise AerogelError(f"--target {text!r} must be METRIC=VALUE; {nearest(metric, UNITS)}")
    found = quantity(value)
    if found is None:
        raise AerogelError(f"--target {text!r}: {value!r} is not a number with a unit; write {metric}=0.5")
    (number, unit), units = found, UNITS[metric]
    if unit == "" and 0 < number <= 1:
        return Goal(metric, number, False, text)
    if unit in units and number > 0:
        return Goal(metric, number * units[unit], True, text)
    examples = " or ".join(f"{metric}=3{unit}" for unit in list(units)[:3])
    absolute = f", an absolute value is positive and has a unit ({examples})" if units else ""
    raise AerogelError(f"--target {text!r}: a fraction to keep must be in (0, 1]{absolute}, got {value}")


def typed(metric: str, value: float, absolute: bool) -> str:
    """METRIC=VALUE as a user would type it, rounded up to three digits: `latency=2.51ms`, `macs=0.304`."""
    unit, factor = "", 1.0
    if metric == "latency" and absolute:
        unit = "ms"
    elif absolute:
        units = UNITS[metric]
        fitting = [name for name in units if units[name] <= value] or [min(units, key=lambda name: units[name])]
        unit = max(fitting, key=lambda name: units[name])
        factor = units[unit]
    digits = Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(float(value) / factor))
    return f"{metric}={digits.normalize():f}{unit}"
