"""Stage 4: cut to the next sub-goal, recover by distillation from the original, keep what is on the frontier."""

from __future__ import annotations

import shutil
from typing import Any

from torch import nn

from aerogel.compress.cutting import training_batches
from aerogel.compress.gradual import gradually
from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, compare_files, correct_on, percent, sizes
from aerogel.compress.run import ORIGINAL, Run
from aerogel.compress.slim import still_slimming, uncut
from aerogel.compress.subgoal import cut_number, shares, told
from aerogel.distill import SoftTargets
from aerogel.prune import recalibrate
from aerogel.train import Objective


def recover(job: Job, run: Run, plan: dict[str, Any], latency: float | None) -> list[dict[str, Any]]:
    """Every round's candidate, the original first. `latency`: the share to keep, when that is a goal."""
    rounds = len(plan["epochs"])
    if f"candidate {rounds:03d}" in run:
        return frontier(job, run, rounds)
    settings = job.settings
    teacher = job.load(run.path / ORIGINAL)
    objective = SoftTargets(teacher, settings.temperature, settings.hard_weight, settings.soft_weight)
    for k in range(1, rounds + 1):
        name = f"{k:03d}"
        if f"candidate {name}" in run:
            continue
        job.signals.check()
        epochs = plan["epochs"][k - 1]
        if settings.schedule == "gradual":
            model, proof = gradually(job, run, plan, objective, latency)
        else:
            start, proof = _cut_once(job, run, plan, k, latency)
            model = _recovered(job, run, start, still_slimming(job, objective, k), epochs, name)
        last = k if settings.schedule != "gradual" else settings.steps
        run[f"candidate {name}"] = _candidate(job, run, model, name, shares(job, plan, last)) | proof
        for part in (f"cut {last:03d}", f"step {name}", f"leg {last:03d}"):
            run.clear("checkpoints", part)
    return frontier(job, run, rounds)


def _cut_once(
    job: Job, run: Run, plan: dict[str, Any], k: int, latency: float | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to recover, read back from its file, so that a resumed run recovers the very same one."""
    key = f"cut {k:03d}"
    folder = run.path / "checkpoints" / key
    if key not in run:
        before = job.load(uncut(run) if k == 1 else run.path / f"candidates/{k - 1:03d}")
        found = cut_number(job, run, plan, k, before, latency)
        job.save(found.model, run.clear("checkpoints", key), onnx=False)
        run[key] = told(job, run, k, found)
    return job.load(folder), run[key]


def _recovered(job: Job, run: Run, model: nn.Module, objective: Objective, epochs: float, name: str) -> nn.Module:
    """Trained again; without epochs for it, only its batch norms are measured again."""
    if not epochs:
        return recalibrate(model, training_batches(job))
    recipe = job.settings.train.model_copy(update={"epochs": epochs})
    return job.train(model, objective, recipe, run, f"step {name}")


def _candidate(job: Job, run: Run, model: nn.Module, name: str, share: dict[str, float]) -> dict[str, Any]:
    file = job.save(model, run.clear("candidates", name)) / "model.onnx"
    ratio = compare_files(job, run.path / ORIGINAL / "model.onnx", file, BRIEF).ratio
    found = {
        "name": name,
        "target": min(share.values()),
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency_ratio": ratio.value,
        "file_bytes": file.stat().st_size,
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
    names = ("val_accuracy", "params", "macs", "flops", "access_bytes", "peak_bytes", "channels", "file_bytes")
    held = [name for name in (*names, "weights", "nonzero_weights", "sparse_bytes") if name in base]
    original = {"name": "000", "target": 1.0, "latency_ratio": 1.0} | {name: base[name] for name in held}
    found = [original, *(run[f"candidate {k:03d}"] | {"name": f"{k:03d}"} for k in range(1, steps + 1))]
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
