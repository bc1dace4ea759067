"""What teachers and students are worth: on the validation split while they learn, on the test split for the report."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.compress.job import Job
from aerogel.compress.ship import SAMPLES
from aerogel.compress.teaching import Logits, School
from aerogel.cost import count
from aerogel.cost.latency import compare
from aerogel.data import batches, normalise
from aerogel.distill import Teacher
from aerogel.distill.agreement import agreement, calibration, calibration_error, confusion
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import check_parity
from aerogel.graph import capture
from aerogel.stats import accuracy_interval
from aerogel.train import predict

CLASSES = 100  # of a confusion that the report holds
COUNTS = ("params", "macs", "flops", "access_bytes", "peak_bytes")


def heard(job: Job, teacher: Teacher, split: str) -> Tensor:
    """Each teacher's logits of a split: (K, n, classes)."""
    found = []
    for batch in batches(job.data, split, 256):
        job.signals.check()
        found.append(teacher.members(batch.inputs))
    return torch.cat(found, dim=1)


def right_on(job: Job, split: str, logits: Tensor) -> float:
    return 100 * float((logits.argmax(1) == getattr(job.data, split).labels).double().mean())


def seen(job: Job, model: nn.Module, answers: Tensor) -> dict[str, float]:
    """Of a network on the validation split, in percent."""
    logits = predict(model, job.data, "val")
    ece = calibration_error(logits, job.data.val.labels)
    return {"val_accuracy": right_on(job, "val", logits), "agreement": 100 * agreement(logits, answers),
            "ece": 100 * ece}  # fmt: skip


def judged(job: Job, logits: dict[str, Tensor], answers: dict[str, Tensor]) -> dict[str, Any]:
    """Of what a network says on validation and test: {"accuracy": interval, "val_accuracy", "ece", "val_ece",
    "agreement"}, in percent."""
    labels = job.data.test.labels
    return {
        "accuracy": asdict(accuracy_interval((logits["test"].argmax(1) == labels).numpy())),
        "val_accuracy": right_on(job, "val", logits["val"]),
        "ece": 100 * calibration_error(logits["test"], labels),
        "val_ece": 100 * calibration_error(logits["val"], job.data.val.labels),
        "agreement": 100 * agreement(logits["test"], answers["test"]),
    }


def confused(job: Job, logits: Tensor, answers: Tensor) -> dict[str, Any]:
    """{"of": classes, "classes": names, "counts": teacher down, student across}; of many those that differ most."""
    counts = confusion(logits, answers)
    unlike = counts.sum(0) + counts.sum(1) - 2 * counts.diag()
    kept = unlike.argsort(descending=True, stable=True)[:CLASSES].sort().values
    names = [job.data.classes[i] for i in kept.tolist()]
    return {"of": len(counts), "classes": names, "counts": counts[kept][:, kept].tolist()}


def reliability(job: Job, logits: Tensor) -> dict[str, list[float]]:
    """{"counts", "confidence", "accuracy"}, a number a bin, on the test split."""
    return {key: value.tolist() for key, value in vars(calibration(logits, job.data.test.labels)).items()}


def worth(found: dict[str, Any]) -> str:
    accuracy = found["accuracy"]
    return (
        f"top-1 {accuracy['value']:.2f} % [{accuracy['low']:.2f}, {accuracy['high']:.2f}] on test   "
        f"validation {found['val_accuracy']:.2f} %   ECE {found['ece']:.2f} %"
    )


def counts(job: Job, models: list[nn.Module]) -> dict[str, Any]:
    """The sums over networks, of peak memory the largest; without what cannot be read as a graph."""
    try:
        costs = [count(capture(Logits(model), job.example)) for model in models]
    except AerogelError:
        return {"params": sum(p.numel() for model in models for p in model.parameters())}
    totals = {name: [getattr(cost, name) for cost in costs] for name in COUNTS}
    return {name: max(row) if name == "peak_bytes" else sum(row) for name, row in totals.items()}


def parity_of(job: Job, model: nn.Module, folder: Path) -> dict[str, Any]:
    images = normalise(job.data.test.images[:SAMPLES], job.data.mean, job.data.std)
    return asdict(check_parity(model, folder / "model.onnx", images))


def timed(job: Job, school: School, folder: Path) -> dict[str, Any]:
    """{"latency": the student's over its one teacher's, of the files}; {} where the teacher cannot be exported."""
    if len(school.teachers) > 1:
        return {}
    with tempfile.TemporaryDirectory() as temp:
        try:
            whole = export_onnx(Logits(school.models[0]), job.example, Path(temp) / "teacher.onnx").path
        except AerogelError as error:
            job.console.say("", f"the teacher is not timed: {error}")
            return {}
        settings = job.settings
        ratio = compare(whole, folder / "model.onnx", threads=settings.threads, seconds=settings.seconds,
                        seed=settings.seed)  # fmt: skip
    return {"latency": asdict(ratio)}
