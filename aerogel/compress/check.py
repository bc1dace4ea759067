"""Stage 1: what can be cut, what cannot and why, and whether the goal can be reached at all. Writes nothing.

Latency does not depend on what the weights are, so the reach of cutting is measured before any training: on the
exported original and on the deepest cut there is.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from aerogel.compress.cutting import cut_by_method, points
from aerogel.compress.goal import Goal, typed
from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, compare_files, coupling_of, sizes_of
from aerogel.cost import count
from aerogel.errors import AerogelError, CutError
from aerogel.export.onnx import export_onnx
from aerogel.prune import deepest

SHOWN = 3  # names or files in one line


@dataclass(frozen=True)
class Checked:
    """fractions: {metric: share to keep}, latency's among them. frozen: {dimension: why it stays}."""

    fractions: dict[str, float]
    frozen: dict[str, str]
    text: str


def check(job: Job) -> Checked:
    """Raises CaptureError, CutError or AerogelError when the goal cannot be reached, naming what can."""
    say, settings = job.console.say, job.settings
    if job.data.bad_files:
        names = [f"{path} ({reason})" for path, reason in job.data.bad_files]
        say("check", f"not read: {_some(names)}")
    coupling = coupling_of(job, job.opened.model)
    if settings.slimming and not coupling.groups:
        raise CutError(
            f"--method slimming goes by the scales of batch norms: {settings.short_model} has no channels that can be "
            "cut and pass one; choose --method l2, or a network with batch norms"
        )
    channels = sum(len(group) for group in coupling.groups)
    weights = {name.partition(" ")[0] for name in coupling.frozen}
    text = f"{channels} channels in {len(coupling.groups)} groups can be cut; channels of {len(weights)} weights stay"
    say("check", text)
    for reason, names in _by_reason(coupling.frozen).items():
        say("", f"stays: {_some(names)}: {reason}")
    uncounted = count(coupling.graph).uncounted
    if uncounted:
        say("", f"not counted: {', '.join(sorted(uncounted))}; their work is in no total")
    before = sizes_of(coupling)
    before["file_bytes"] = before["weight_bytes"]  # nearly; the exported file is weighed in the plan
    fractions = {g.metric: g.fraction(before[g.metric]) for g in job.goals if g.metric != "latency"}
    # Refuses what is out of reach; without a count to reach it still refuses a method that does not apply.
    cut_by_method(job, job.opened.model, fractions or {"channels": 1.0}, settings.round_to or 1)
    if settings.schedule == "gradual" and job.goals:
        points(job)
    if fractions:
        say("", f"{', '.join(fractions)}: the goal is inside what cutting reaches")
    if job.latency_goal:
        fractions["latency"] = _latency_in_reach(job, job.latency_goal)
    return Checked(fractions, coupling.frozen, text)


def _latency_in_reach(job: Job, goal: Goal) -> float:
    """The share of the latency to keep. Raises AerogelError when even the deepest cut takes longer."""
    settings = job.settings
    with tempfile.TemporaryDirectory() as folder:
        whole = export_onnx(job.opened.model, job.example, Path(folder) / "whole.onnx").path
        least = deepest(job.opened.model, job.example, protect=settings.protect, min_channels=settings.round_to or 1)
        floor = export_onnx(least.model, job.example, Path(folder) / "least.onnx").path
        ratio = compare_files(job, whole, floor, BRIEF)
    fraction = goal.fraction(ratio.a.median_ms)
    reach = f"cutting reaches {ratio.b.median_ms:.3g} to {ratio.a.median_ms:.3g} ms (x{ratio.ratio.value:.2f} to x1)"
    if ratio.ratio.high > fraction:
        nearest = 1.1 * ratio.ratio.high
        nearest_typed = typed("latency", nearest * (ratio.a.median_ms if goal.absolute else 1.0), goal.absolute)
        remedy = f"ask for {nearest_typed} or more" if nearest < 1 else "cutting makes this network no faster here"
        raise AerogelError(f"--target {goal.text} is out of reach: {reach}; {remedy}")
    job.console.say("", f"latency: {reach}; the goal is inside")
    return fraction


def _by_reason(frozen: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
