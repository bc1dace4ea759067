"""Goals as a user types them: `latency=0.5` (a fraction to keep), `latency=2.5ms`, `macs=150M`, `params=1M`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aerogel.errors import AerogelError, nearest
from aerogel.prune.plan import METRICS

UNITS = {
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    **dict.fromkeys(("params", "macs"), {"K": 1e3, "M": 1e6, "G": 1e9, "": 1.0}),
    **dict.fromkeys(("access_bytes", "peak_bytes"), {"B": 1.0, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
                                                      "KB": 1e3, "MB": 1e6, "GB": 1e9}),
    "channels": {},
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """Keep `limit` of a metric: a fraction of the original, or an absolute value (ms, counts, bytes)."""

    metric: str
    limit: float
    absolute: bool
    text: str  # as typed

    def fraction(self, before: float) -> float:
        """The share of `before` that may be left. Raises AerogelError when the goal is already met."""
        if not self.absolute:
            return self.limit
        share = self.limit / before
        if share >= 1:
            raise AerogelError(
                f"--target {self.text}: the network is already within it ({before:.6g}); ask for less"
            )
        return share


def parse_goals(texts: Sequence[str]) -> tuple[Goal, ...]:
    """Raises AerogelError for no goal, a metric given twice, or whatever `parse_goal` refuses."""
    goals = tuple(parse_goal(text) for text in texts)
    if not goals:
        raise AerogelError(
            "--target is missing; say what to reach, as --target latency=0.5 or --target macs=150M"
        )
    metrics = [goal.metric for goal in goals]
    if len(set(metrics)) < len(metrics):
        raise AerogelError(f"--target: each metric is given once, got {', '.join(metrics)}")
    return goals


def parse_goal(text: str) -> Goal:
    """One METRIC=VALUE. Raises AerogelError for an unknown metric or unit, or a fraction outside (0, 1]."""
    metric, equals, value = text.partition("=")
    known = (*METRICS, "latency")
    if not equals or metric not in known:
        raise AerogelError(f"--target {text!r} must be METRIC=VALUE; {nearest(metric, known)}")
    match = re.fullmatch(r"\s*([0-9.eE+-]*[0-9.])\s*([A-Za-z]*)\s*", value)
    try:
        number, unit = float(match[1]), match[2]  # type: ignore[index]
    except (TypeError, ValueError):
        raise AerogelError(
            f"--target {text!r}: {value!r} is not a number with a unit; write {metric}=0.5"
        ) from None
    units = UNITS[metric]
    if unit == "" and 0 < number <= 1:
        return Goal(metric, number, False, text)
    if unit not in units or number <= 0:
        allowed = " or ".join(f"{metric}={'3' + u}" for u in list(units)[:3] if u)
        rule = "a fraction to keep must be in (0, 1]" + (
            f", an absolute value has a unit ({allowed})" if allowed else ""
        )
        raise AerogelError(f"--target {text!r}: {rule}, got {value}")
    return Goal(metric, number * units[unit], True, text)
