"""Stage 2: the original, trained when it came without weights, exported and measured: candidates/000."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.measure import correct_on, cost_of, percent, summary
from aerogel.compress.run import Run
from aerogel.cost.latency import measure
from aerogel.stats import accuracy_interval
from aerogel.train import HardLabels

HERE = "candidates/000"


def baseline(job: Job, run: Run) -> dict[str, Any]:
    """Trains if need be, saves, measures. What it found is run["baseline"]."""
    if "baseline" in run:
        return run["baseline"]
    folder = run.path / HERE
    seconds = 0.0
    if not job.opened.trained:
        recipe = job.settings.train
        job.console.say(
            "baseline",
            f"no weights given: training for {recipe.epochs:g} epochs on {len(job.data.train):,} images",
        )
        began = time.monotonic()
        model = job.train(job.opened.model, HardLabels(), recipe, run, "baseline")
        seconds = time.monotonic() - began
    else:
        model = job.opened.model
    job.save(model, run.clear(HERE), {})
    found = _measured(job, folder / "model.onnx") | summary(cost_of(job, model)) | {"train_seconds": seconds}
    accuracy, latency = found["accuracy"], found["latency"]
    job.console.say(
        "baseline",
        f"top-1 {accuracy['value']:.2f} % [{accuracy['low']:.2f}, {accuracy['high']:.2f}] on {len(job.data.test):,} test images"
        f"   {latency['median_ms']:.3f} ms [{latency['low_ms']:.3f}, {latency['high_ms']:.3f}]   {found['params'] / 1e6:.3g} M params"
        f"   {found['macs'] / 1e6:.4g} M MACs   access {found['access_bytes'] / 2**20:.3g} MiB   peak {found['peak_bytes'] / 2**20:.3g} MiB"
        f"   file {found['file_bytes'] / 2**20:.3g} MiB",
    )
    run["baseline"] = found
    return found


def _measured(job: Job, file: Path) -> dict[str, Any]:
    test = accuracy_interval(correct_on(job, file, "test"))
    return {
        "accuracy": asdict(test),
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency": asdict(measure(file, threads=job.settings.threads, seconds=1.0)),
        "file_bytes": file.stat().st_size,
    }
