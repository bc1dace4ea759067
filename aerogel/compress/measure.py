"""What a saved candidate is worth: its cost, its accuracy, its latency beside the original's, all of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from aerogel.compress.job import Job
from aerogel.cost import Cost, count
from aerogel.cost.latency import Ratio, compare
from aerogel.data import batches
from aerogel.export.verify import run_onnx
from aerogel.graph import capture


def cost_of(job: Job, model: nn.Module) -> Cost:
    return count(capture(model, job.example))


def summary(cost: Cost) -> dict[str, Any]:
    """The totals of a cost, by name."""
    names = ("params", "macs", "flops", "access_bytes", "peak_bytes")
    return {name: getattr(cost, name) for name in names}


def compare_files(job: Job, before: Path, after: Path, seconds: float) -> Ratio:
    """Latency of `after` over `before`, interleaved, one image at a time."""
    return compare(before, after, threads=job.settings.threads, seconds=seconds, seed=job.settings.seed)


def correct_on(job: Job, file: Path, split: str) -> np.ndarray:
    """Which samples of a split the exported file gets right: bool (n,)."""
    answers = []
    for batch in batches(job.data, split, 256):
        logits = run_onnx(file, batch.inputs.numpy(), threads=torch.get_num_threads())
        answers.append(logits.argmax(1) == batch.labels.numpy())
    return np.concatenate(answers)


def percent(correct: np.ndarray) -> float:
    return 100.0 * float(correct.mean())
