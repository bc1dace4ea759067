"""Stage 4: cut to the next sub-goal, recover by distillation from the original, keep what is on the frontier."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.compress.job import Job
from aerogel.compress.measure import compare_files, correct_on, cost_of, percent, summary
from aerogel.compress.plan import MARGIN, Probe
from aerogel.compress.run import Run
from aerogel.distill import SoftTargets
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import Cut, couple, cut
from aerogel.prune.plan import measure as measure_metric


def recover(job: Job, run: Run, plan: dict[str, Any], latency: float | None) -> list[dict[str, Any]]:
    """Every step's candidate, the original first. `latency`: the share to keep, when that is a goal."""
    teacher = job.load(run.path / "candidates/000")
    whole = _metrics(job, teacher)
    steps = len(plan["epochs"])
    for k in range(1, steps + 1):
        name = f"{k:03d}"
        if f"candidate {name}" in run:
            continue
        before = job.load(run.path / f"candidates/{k - 1:03d}")
        share = {metric: final ** (k / steps) for metric, final in plan["target"].items()}
        start, note = _cut_once(job, run, plan, before, whole, share, latency if k == steps else None, name)
        recipe = job.settings.train.model_copy(update={"epochs": plan["epochs"][k - 1]})
        objective = SoftTargets(
            teacher, job.settings.temperature, job.settings.hard_weight, job.settings.soft_weight
        )
        model = job.train(start, objective, recipe, run, f"step {name}")
        run[f"candidate {name}"] = _candidate(job, run, model, name, share) | note
        shutil.rmtree(run.path / "checkpoints" / f"step {name}", ignore_errors=True)
    return frontier(job, run, steps)


def _cut_once(
    job: Job, run: Run, plan: dict[str, Any], before: nn.Module, whole: dict[str, float], share: dict[str, float],
    latency: float | None, name: str,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The network to recover, saved so that a resumed run recovers the same one."""
    folder = run.path / "checkpoints" / f"cut {name}"
    key = f"cut {name}"
    if key in run:
        return job.load(folder), run[key]
    found = _cut_to(job, plan, before, whole, share)
    if latency is not None:
        found = _deeper_until(job, run, plan, before, whole, share, latency, found)
    job.save(found.model, run.clear("checkpoints", key), {})
    note = {"max_error": found.max_error, "frozen": found.frozen, "inexact": found.inexact}
    job.console.say(
        key, f"{len(found.kept)} weights sliced, MACs x{found.after.macs / whole['macs']:.3f}, "
        f"params x{found.after.params / whole['params']:.3f} of the original; cut = masked to {found.max_error:.1e}"
    )  # fmt: skip
    run[key] = note
    return found.model, note


def _cut_to(
    job: Job, plan: dict[str, Any], before: nn.Module, whole: dict[str, float], share: dict[str, float]
) -> Cut:
    """Cuts `before`, itself cut already, to shares of the original."""
    now = _metrics(job, before)
    target = {metric: min(1.0, s * whole[metric] / now[metric]) for metric, s in share.items()}
    settings = job.settings
    return cut(before, job.example, target=target, criterion=settings.criterion, round_to=plan["round_to"],
               protect=settings.protect)  # fmt: skip


def _deeper_until(
    job: Job, run: Run, plan: dict[str, Any], before: nn.Module, whole: dict[str, float], share: dict[str, float],
    latency: float, found: Cut,
) -> Cut:  # fmt: skip
    """Cuts a little deeper until the measured latency's upper bound is inside the goal."""
    share = dict(share)
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(job, run.path / "candidates/000/model.onnx", Path(folder), seconds=2.0)
        for _ in range(8):
            ratio = probe.time(found.model).ratio
            job.console.say(
                "",
                f"MACs x{share['macs']:.3f}: latency x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            )
            if ratio.high <= latency * MARGIN:
                break
            share["macs"] *= min(max(latency * MARGIN / ratio.high, 0.7), 0.95)
            try:
                found = _cut_to(job, plan, before, whole, share)
            except CutError:
                break  # as deep as these widths go; the verdict will say what was missed
    return found


def _candidate(job: Job, run: Run, model: nn.Module, name: str, share: dict[str, float]) -> dict[str, Any]:
    folder = job.save(model, run.clear("candidates", name), {})
    file = folder / "model.onnx"
    ratio = compare_files(job, run.path / "candidates/000/model.onnx", file, seconds=1.0).ratio
    found = {
        "name": name,
        "target": min(share.values()),
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency_ratio": ratio.value,
        **summary(cost_of(job, model)),
    }
    before = run["baseline"]
    job.console.say(
        f"step {name}",
        f"validation {found['val_accuracy']:.2f} % ({found['val_accuracy'] - before['val_accuracy']:+.2f})   "
        f"latency x{ratio.value:.3f}   MACs x{found['macs'] / before['macs']:.3f}   params x{found['params'] / before['params']:.3f}",
    )
    return found


def frontier(job: Job, run: Run, steps: int) -> list[dict[str, Any]]:
    """All candidates, marked; folders of those that another beats in both size and accuracy are removed."""
    base = run["baseline"]
    original = {"name": "000", "target": 1.0, "latency_ratio": 1.0, **{k: base[k] for k in ("val_accuracy", "params", "macs", "access_bytes", "peak_bytes")}}  # fmt: skip
    found = [original, *(run[f"candidate {k:03d}"] for k in range(1, steps + 1))]
    size = "latency_ratio" if job.size_metric == "latency" else job.size_metric
    size = size if size in original else "macs"
    for one in found:
        beaten = any(o[size] <= one[size] and o["val_accuracy"] > one["val_accuracy"] for o in found)
        one["frontier"], one["shipped"] = not beaten, one is found[-1]
        if beaten and not one["shipped"] and one is not original:
            shutil.rmtree(run.path / "candidates" / one["name"], ignore_errors=True)
    return found


def _metrics(job: Job, model: nn.Module) -> dict[str, float]:
    cost = cost_of(job, model)
    channels = measure_metric(couple(capture(model, job.example)), "channels")
    return {name: float(value) for name, value in summary(cost).items()} | {"channels": channels}
