"""Stage 4: cut to the next sub-goal, recover by distillation from the original, keep what is on the frontier."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, compare_files, correct_on, percent, sizes
from aerogel.compress.plan import MARGIN, Probe
from aerogel.compress.run import ORIGINAL, Run
from aerogel.distill import SoftTargets
from aerogel.errors import CutError
from aerogel.prune import Cut, cut

DEEPER_TRIES = 8


def recover(job: Job, run: Run, plan: dict[str, Any], latency: float | None) -> list[dict[str, Any]]:
    """Every step's candidate, the original first. `latency`: the share to keep, when that is a goal."""
    steps = len(plan["epochs"])
    if f"candidate {steps:03d}" in run:
        return frontier(job, run, steps)
    teacher = job.load(run.path / ORIGINAL)
    settings = job.settings
    objective = SoftTargets(teacher, settings.temperature, settings.hard_weight, settings.soft_weight)
    for k in range(1, steps + 1):
        name = f"{k:03d}"
        if f"candidate {name}" in run:
            continue
        job.signals.check()
        share = {metric: final ** (k / steps) for metric, final in plan["target"].items()}
        start, proof = _cut_once(job, run, plan, k, share, latency if k == steps else None)
        recipe = settings.train.model_copy(update={"epochs": plan["epochs"][k - 1]})
        model = job.train(start, objective, recipe, run, f"step {name}")
        run[f"candidate {name}"] = _candidate(job, run, model, name, share) | proof
        run.clear("checkpoints", f"cut {name}")
        run.clear("checkpoints", f"step {name}")
    return frontier(job, run, steps)


def _cut_once(
    job: Job, run: Run, plan: dict[str, Any], k: int, share: dict[str, float], latency: float | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to recover, read back from its file, so that a resumed run recovers the very same one."""
    key = f"cut {k:03d}"
    folder = run.path / "checkpoints" / key
    if key not in run:
        before = job.load(run.path / f"candidates/{k - 1:03d}")
        whole = run["baseline"]
        torch.manual_seed(job.settings.seed)  # for the random criterion
        found = _cut_to(job, plan, before, whole, share)
        if latency is not None:
            found = _deeper_until(job, run, plan, before, share, latency, found)
        job.save(found.model, run.clear("checkpoints", key), onnx=False)
        job.console.say(
            key, f"{len(found.kept)} weights sliced, MACs x{found.after.macs / whole['macs']:.3f}, "
            f"params x{found.after.params / whole['params']:.3f} of the original; cut = masked to {found.max_error:.1e}"
        )  # fmt: skip
        run[key] = {"max_error": found.max_error, "frozen": found.frozen, "inexact": found.inexact}
    return job.load(folder), run[key]


def _cut_to(job: Job, plan: dict[str, Any], before: nn.Module, whole: dict[str, Any], share: dict[str, float]) -> Cut:
    """Cuts `before`, itself cut already, to shares of the original."""
    now = sizes(job, before)
    target = {metric: min(1.0, s * whole[metric] / now[metric]) for metric, s in share.items()}
    settings = job.settings
    return cut(before, job.example, target=target, criterion=settings.criterion, ranking=settings.ranking,
               round_to=plan["round_to"], protect=settings.protect)  # fmt: skip


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


def _candidate(job: Job, run: Run, model: nn.Module, name: str, share: dict[str, float]) -> dict[str, Any]:
    file = job.save(model, run.clear("candidates", name)) / "model.onnx"
    ratio = compare_files(job, run.path / ORIGINAL / "model.onnx", file, BRIEF).ratio
    found = {
        "name": name,
        "target": min(share.values()),
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency_ratio": ratio.value,
        **sizes(job, model),
    }
    before = run["baseline"]
    parts = (
        f"validation {found['val_accuracy']:.2f} % ({found['val_accuracy'] - before['val_accuracy']:+.2f})",
        f"latency x{ratio.value:.3f}",
        f"MACs x{found['macs'] / before['macs']:.3f}",
        f"params x{found['params'] / before['params']:.3f}",
    )
    job.console.say(f"step {name}", "   ".join(parts))
    return found


def frontier(job: Job, run: Run, steps: int) -> list[dict[str, Any]]:
    """All candidates, marked; folders are removed of those beaten: another is better in one of size and accuracy and
    no worse in the other."""
    base = run["baseline"]
    names = ("val_accuracy", "params", "macs", "flops", "access_bytes", "peak_bytes", "channels")
    original = {"name": "000", "target": 1.0, "latency_ratio": 1.0} | {name: base[name] for name in names}
    found = [original, *(run[f"candidate {k:03d}"] for k in range(1, steps + 1))]
    size = job.size_key
    marked = []
    for one in found:
        beaten = any(_beats((o[size], -o["val_accuracy"]), (one[size], -one["val_accuracy"])) for o in found)
        shipped = one is found[-1]
        marked.append(one | {"frontier": not beaten, "shipped": shipped})
        if beaten and not shipped and one is not original:
            shutil.rmtree(run.path / "candidates" / one["name"], ignore_errors=True)
    return marked


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Both are (size, error): less is better."""
    return a != b and a[0] <= b[0] and a[1] <= b[1]
