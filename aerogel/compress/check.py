"""Stage 1: what can be cut, what cannot and why, and whether the goal can be reached at all. Writes nothing.

Latency does not depend on what the weights are, so the reach of cutting is measured before any training: on the
exported original and on the deepest cut there is.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from aerogel.compress.job import Job
from aerogel.compress.measure import compare_files, cost_of
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.graph import capture
from aerogel.prune import couple, cut, deepest


@dataclass(frozen=True)
class Checked:
    """fractions: {metric: share to keep}, latency's among them."""

    fractions: dict[str, float]
    frozen: dict[str, str]
    text: str


def check(job: Job) -> Checked:
    """Raises CaptureError, CutError or AerogelError when the goal cannot be reached, naming what can."""
    model, say = job.opened.model, job.console.say
    before = cost_of(job, model)
    coupling = couple(capture(model, job.example))
    channels = sum(len(group) for group in coupling.groups)
    weights = {name.partition(" ")[0] for name in coupling.frozen}
    text = f"{channels} channels in {len(coupling.groups)} groups can be cut; {len(weights)} weights hold channels that stay"
    say("check", text)
    for reason, names in _by_reason(coupling.frozen).items():
        say(
            "",
            f"stays: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}",
        )
    if before.uncounted:
        say("", f"not counted: {', '.join(sorted(before.uncounted))}; their work is in no total")
    fractions = {
        g.metric: g.fraction(getattr(before, g.metric, 1)) for g in job.goals if g.metric != "latency"
    }
    if fractions:
        cut(
            model, job.example, target=fractions, protect=job.settings.protect
        )  # refuses what is out of reach
        say("", "the goal is inside what cutting reaches")
    if job.latency_goal:
        fractions["latency"] = _latency_in_reach(job)
    return Checked(fractions, coupling.frozen, text)


def _latency_in_reach(job: Job) -> float:
    """The share of the latency to keep. Raises AerogelError when even the deepest cut takes longer."""
    goal = job.latency_goal
    assert goal is not None
    with tempfile.TemporaryDirectory() as folder:
        whole = export_onnx(job.opened.model, job.example, Path(folder) / "whole.onnx").path
        least = deepest(job.opened.model, job.example, protect=job.settings.protect)
        floor = export_onnx(least.model, job.example, Path(folder) / "least.onnx").path
        ratio = compare_files(job, whole, floor, seconds=1.0)
    fraction = goal.fraction(ratio.a.median_ms)
    reach = f"cutting reaches {ratio.b.median_ms:.3g} to {ratio.a.median_ms:.3g} ms (x{ratio.ratio.value:.2f} to x1)"
    if ratio.ratio.high > fraction:
        raise AerogelError(
            f"--target {goal.text} is out of reach: {reach}; ask for at least x{1.1 * ratio.ratio.high:.2f}"
        )
    job.console.say("", f"{reach}; the goal is inside")
    return fraction


def _by_reason(frozen: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
