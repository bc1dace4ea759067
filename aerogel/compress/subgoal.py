"""One cut of several, to its sub-goal, and the line that tells of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.compress.cutting import cut_by_method
from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, sizes
from aerogel.compress.plan import MARGIN, Probe
from aerogel.compress.run import ORIGINAL, Run
from aerogel.errors import CutError
from aerogel.prune import SCHEDULES, Cut
from aerogel.train import accuracy

DEEPER_TRIES = 8


def shares(job: Job, plan: dict[str, Any], k: int) -> dict[str, float]:
    """What is left of each metric of the original after cut number `k`, by the schedule."""
    kept = SCHEDULES[job.settings.schedule]
    return {metric: kept(k, job.settings.steps, final) for metric, final in plan["target"].items()}


def cut_number(job: Job, run: Run, plan: dict[str, Any], k: int, before: nn.Module, latency: float | None) -> Cut:
    """Cuts `before`, itself cut k - 1 times. latency: the share of it to keep, minded at the last cut alone."""
    share = shares(job, plan, k)
    found = _cut_to(job, plan, before, run["baseline"], share)
    if latency is not None and k == job.settings.steps:
        found = _deeper_until(job, run, plan, before, share, latency, found)
    return found


def told(job: Job, run: Run, k: int, found: Cut) -> dict[str, Any]:
    """Says what a cut did, before any recovery; the same for the run's record."""
    whole = run["baseline"]
    right = accuracy(found.model, job.data, "val")
    parts = [
        f"MACs x{found.after.macs / whole['macs']:.3f}",
        f"params x{found.after.params / whole['params']:.3f} of the original",
        f"validation {right:.2f} % before recovery",
        f"cut = masked to {found.max_error:.1e}",
    ]
    if found.difference:
        parts.append(f"what is inexact moves outputs by {found.difference:.1e}")
    job.console.say(f"cut {k:03d}", "   ".join(parts))
    record = {name: getattr(found, name) for name in ("max_error", "frozen", "inexact", "difference")}
    return record | {"unrecovered_accuracy": right}


def _cut_to(job: Job, plan: dict[str, Any], before: nn.Module, whole: dict[str, Any], share: dict[str, float]) -> Cut:
    """Cuts `before`, itself cut already, to shares of the original."""
    now, target = sizes(job, before), {}
    for metric, kept in share.items():
        counted = "weight_bytes" if metric == "file_bytes" else metric
        target[metric] = min(1.0, kept * whole[counted] / now[counted])
    return cut_by_method(job, before, target, plan["round_to"])


def _deeper_until(
    job: Job, run: Run, plan: dict[str, Any], before: nn.Module, share: dict[str, float], latency: float, found: Cut
) -> Cut:
    """Cuts a little deeper until the measured latency's upper bound is inside the goal."""
    share = dict(share)
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(job, run.path / ORIGINAL / "model.onnx", Path(folder), seconds=2 * BRIEF)
        for _ in range(DEEPER_TRIES):
            ratio = probe.time(found.model).ratio
            text = f"MACs x{share['macs']:.3f}: latency x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            job.console.say("", text)
            if ratio.high <= latency * MARGIN:
                break
            share["macs"] *= min(max(latency * MARGIN / ratio.high, 0.7), 0.95)
            try:
                found = _cut_to(job, plan, before, run["baseline"], share)
            except CutError:
                break  # as deep as these widths go; the verdict will say what was missed
    return found
