"""Stage 3: sub-goals, and how long it will take.

A latency goal becomes a MACs goal by measuring: cut, export, time beside the original, and close in; of widths in
multiples of 1 and of 8, those are taken that keep more MACs at the goal. Nothing is trained for it.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.compress.check import Checked
from aerogel.compress.cutting import cut_by_method
from aerogel.compress.goal import Goal
from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, compare_files
from aerogel.compress.run import ORIGINAL, Run
from aerogel.compress.slim import uncut
from aerogel.console import duration
from aerogel.cost.latency import Ratio
from aerogel.errors import CutError
from aerogel.export.onnx import export_onnx
from aerogel.prune import SCHEDULES
from aerogel.train import HardLabels, start, steps
from aerogel.train.distributed import ALONE

MARGIN = 0.97  # aim this far inside a latency goal: the verdict is on the upper bound
TRIES = 6
MULTIPLES = (1, 8)  # of channels, to choose from when round_to is 0


def plan(job: Job, run: Run, checked: Checked) -> dict[str, Any]:
    """run["plan"]: {"round_to", "target": {metric: final fraction}, "epochs": [per step], "seconds", "text"}."""
    if "plan" in run:
        return run["plan"]
    model = job.load(uncut(run))
    target = {metric: share for metric, share in checked.fractions.items() if metric != "latency"}
    for goal in job.goals:
        if goal.metric == "file_bytes":
            target["file_bytes"] = _weights_for_file(goal, run["baseline"])
    round_to = job.settings.round_to or MULTIPLES[0]
    if "latency" in checked.fractions:
        with tempfile.TemporaryDirectory() as folder:
            probe = Probe(job, run.path / ORIGINAL / "model.onnx", Path(folder), BRIEF)
            share, round_to = _macs_for_latency(job, probe, model, checked.fractions["latency"])
        target["macs"] = min(share, target.get("macs", 1.0))
    epochs = job.settings.recoveries
    seconds = _seconds(job, model, target, epochs)
    settings, shares = job.settings, ", ".join(f"{metric} x{share:.3f}" for metric, share in target.items())
    cuts = f"{settings.steps} {'cuts' if settings.steps > 1 else 'cut'} by {settings.method}, {settings.schedule}"
    text = f"{cuts}, to {shares}, widths in multiples of {round_to}, about {duration(seconds)}"
    job.console.say("plan", text)
    found = {"round_to": round_to, "target": target, "epochs": epochs, "seconds": seconds, "text": text}
    run["plan"] = found
    return found


@dataclass(frozen=True)
class Probed:
    """A cut to `share` of the MACs (asked), which kept `macs` of them (widths come in steps) and took `ratio` of
    the original's latency."""

    share: float
    macs: float
    ratio: float


class Probe:
    """Cuts a copy, exports it and times it beside the original; the weights are as they come."""

    def __init__(self, job: Job, whole: Path, folder: Path, seconds: float) -> None:
        self._job, self._whole, self._folder, self._seconds = job, whole, folder, seconds
        self._count = 0

    def __call__(self, model: nn.Module, share: float, round_to: int) -> Probed:
        """Raises CutError when the share is out of reach with such widths."""
        less = cut_by_method(self._job, model, {"macs": share}, round_to)
        return Probed(share, less.after.macs / less.before.macs, self.time(less.model).ratio.value)

    def time(self, model: nn.Module) -> Ratio:
        """Raises Interrupted when a signal came: timing many networks takes a while."""
        self._job.signals.check()
        self._count += 1
        file = export_onnx(model, self._job.example, self._folder / f"{self._count}.onnx").path
        return compare_files(self._job, self._whole, file, self._seconds)


def _macs_for_latency(job: Job, probe: Probe, model: nn.Module, goal: float) -> tuple[float, int]:
    """(the share of MACs to ask for, the multiple for widths): whichever keeps the most MACs within the goal.

    When no try is within it, the fastest: the last step cuts deeper still, and the verdict says what was missed.
    """
    multiples = (job.settings.round_to,) if job.settings.round_to else MULTIPLES
    tried = {multiple: _close_in(probe, model, goal * MARGIN, multiple) for multiple in multiples}
    every = [(probed, multiple) for multiple, found in tried.items() for probed in found]
    within = [(probed, multiple) for probed, multiple in every if probed.ratio <= goal * MARGIN]
    if not every:
        raise CutError(
            f"plan: no cut was found in {TRIES} tries; ask for a larger latency, or set round_to in --config"
        )
    if within:
        best, round_to = max(within, key=lambda pair: pair[0].macs)
    else:
        best, round_to = min(every, key=lambda pair: pair[0].ratio)
    text = f"MACs x{best.macs:.3f} in widths of {round_to} give latency x{best.ratio:.3f}, goal x{goal:.3f}"
    job.console.say("plan", text)
    return best.share, round_to


def _weights_for_file(goal: Goal, whole: dict[str, Any]) -> float:
    """The share of the weights to keep: what else is in the exported file stays as long as it is."""
    rest = whole["file_bytes"] - whole["weight_bytes"]
    share = (goal.fraction(whole["file_bytes"]) * whole["file_bytes"] - rest) / whole["weight_bytes"]
    if share <= 0:
        raise CutError(f"--target {goal.text} is out of reach: the file holds {rest:,} bytes beside the weights")
    return min(share, 1.0)


def _close_in(probe: Probe, model: nn.Module, goal: float, multiple: int) -> list[Probed]:
    """The cuts tried on the way to the largest share of MACs within the goal.

    By regula falsi between 0 and 1, which crawls where latency is far from linear: an end moved twice is bisected.
    """
    low, high = Probed(0.0, 0.0, 0.0), Probed(1.0, 1.0, 1.0)
    share, tried, before = goal, [], None
    for _ in range(TRIES):
        try:
            now = probe(model, share, multiple)
        except CutError:  # past what such widths reach
            now = Probed(share, share, 0.0)
        else:
            tried.append(now)
        within = now.ratio <= goal
        low, high = (now, high) if within else (low, now)
        if goal * 0.92 <= now.ratio <= goal or high.share - low.share < 0.02:
            break
        inside = (goal * 0.97 - low.ratio) / max(high.ratio - low.ratio, 1e-9)
        inside = 0.5 if within == before else min(max(inside, 0.2), 0.8)
        share, before = low.share + (high.share - low.share) * inside, within
    return tried


def _seconds(job: Job, model: nn.Module, target: dict[str, float], epochs: list[float]) -> float:
    """A step of the student costs its share of MACs; the teacher's forward pass a third of a whole step."""
    per_epoch = time_an_epoch(job, model)
    final = target.get("macs", max(target.values()))
    kept = SCHEDULES[job.settings.schedule]
    shares = [final if len(epochs) == 1 else kept(k + 1, len(epochs), final) for k in range(len(epochs))]
    return sum(e * per_epoch * (share + 1 / 3) for e, share in zip(epochs, shares, strict=True))


def time_an_epoch(job: Job, model: nn.Module) -> float:
    """Seconds of one epoch of training the original, from the fastest of three steps of a copy."""
    state = start(copy.deepcopy(model), HardLabels(), job.data, job.settings.train)
    return min(step.seconds for step in islice(steps(state, job.data, world=ALONE), 3)) * state.steps_per_epoch
