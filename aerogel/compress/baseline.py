"""Stage 2: the original, trained when it came without weights, exported and measured: candidates/000."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, correct_on, percent, sizes
from aerogel.compress.run import ORIGINAL, Run
from aerogel.cost.latency import measure
from aerogel.prune.l1 import L1
from aerogel.stats import accuracy_interval
from aerogel.train import HardLabels, Objective


def baseline(job: Job, run: Run) -> dict[str, Any]:
    """Trains if need be, saves, measures. run["baseline"]: accuracies, latency, sizes."""
    if "baseline" in run:
        return run["baseline"]
    model = job.opened.model
    if not job.opened.trained:
        recipe = job.settings.train
        images = len(job.data.train)
        job.console.say("baseline", f"no weights given: training for {recipe.epochs:g} epochs on {images:,} images")
        model = job.train(model, regularised(job, HardLabels()), recipe, run, "baseline")
    folder = job.save(model, run.clear(ORIGINAL))
    found = _measured(job, folder / "model.onnx") | sizes(job, model)
    job.console.say("baseline", _text(found, len(job.data.test)))
    run["baseline"] = found
    run.clear("checkpoints", "baseline")
    return found


def regularised(job: Job, objective: Objective) -> Objective:
    """With the penalty on |w|, where single weights are pruned and it is asked for."""
    sparse = job.settings.sparse
    return L1(objective, sparse.l1) if sparse is not None and sparse.l1 else objective


def _measured(job: Job, file: Path) -> dict[str, Any]:
    seconds = min(BRIEF, job.settings.seconds)
    return {
        "accuracy": asdict(accuracy_interval(correct_on(job, file, "test"))),
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency": asdict(measure(file, threads=job.settings.threads, seconds=seconds)),
        "file_bytes": file.stat().st_size,
    }


def _text(found: dict[str, Any], images: int) -> str:
    accuracy, latency = found["accuracy"], found["latency"]
    parts = (
        f"top-1 {accuracy['value']:.2f} % [{accuracy['low']:.2f}, {accuracy['high']:.2f}] on {images:,} test images",
        f"{latency['median_ms']:.3f} ms [{latency['low_ms']:.3f}, {latency['high_ms']:.3f}]",
        f"{found['params'] / 1e6:.3g} M params",
        f"{found['macs'] / 1e6:.4g} M MACs",
        f"access {found['access_bytes'] / 2**20:.3g} MiB",
        f"peak {found['peak_bytes'] / 2**20:.3g} MiB",
        f"file {found['file_bytes'] / 2**20:.3g} MiB",
    )
    return "   ".join(parts)
