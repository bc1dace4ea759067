"""The plain jobs beside `compress`: train, export, verify. Each is a few of its pieces."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aerogel.compress.goal import parse_goals
from aerogel.compress.job import open_job
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import judge
from aerogel.console import Console
from aerogel.cost.latency import compare
from aerogel.errors import AerogelError, Interrupted
from aerogel.export import input_of, open_model
from aerogel.export.onnx import export_onnx
from aerogel.export.saved import CONFIG
from aerogel.export.verify import check_parity
from aerogel.files import refuse_existing
from aerogel.stats import accuracy_interval
from aerogel.train import HardLabels, predict

RANDOM_SAMPLES = 64


def train_and_save(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Trains with hard labels and saves the folder `out`; a stopped training goes on when called again."""
    if out is None:
        raise AerogelError("train: --out is missing; name the folder to write the trained network to")
    refuse_existing(out, "train")
    job = open_job(settings, console)
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    run = Run(part, settings, {})
    try:
        with job.signals:
            model = job.train(job.opened.model, HardLabels(), settings.train, run, "train")
    except Interrupted:
        console.say("stopped", f"what was done is kept in {part}; the same command goes on")
        raise
    correct = (predict(model, job.data, "test").argmax(1) == job.data.test.labels).numpy()
    accuracy = accuracy_interval(correct)
    job.save(
        model, out, {"accuracy": asdict(accuracy), "data": settings.data, "epochs": settings.train.epochs}
    )
    shutil.rmtree(part)
    console.say("train", f"top-1 {accuracy.value:.2f} % [{accuracy.low:.2f}, {accuracy.high:.2f}] on "
                f"{len(correct):,} test images; saved {out}")  # fmt: skip
    return {"model": settings.model, "data": settings.data, "accuracy": asdict(accuracy), "saved": str(out)}


def export_and_check(
    model: str, weights: str | None, shape: tuple[int, int, int] | None, trust: bool, out: Path
) -> dict[str, Any]:
    """Writes `out` as ONNX and compares it with the network on random inputs."""
    refuse_existing(out, "export")
    opened = open_model(model, input_shape=shape, weights=weights, trust=trust)
    shape = shape or input_of(opened.model, opened.input)
    exported = export_onnx(opened.model, (torch.zeros(1, *shape),), out)
    parity = check_parity(opened.model, out, random_inputs(shape))
    if not parity.ok:
        out.unlink()
        raise AerogelError(
            f"export: the file computes something else ({parity}); this network cannot be exported"
        )
    return {
        "file": str(out),
        "bytes": exported.bytes,
        "dynamic_batch": exported.dynamic_batch,
        **asdict(parity),
    }


def verify_folder(folder: Path, trust: bool, console: Console) -> dict[str, Any]:
    """A run: its verdict again, measured here and now. A saved folder: model.onnx against model.safetensors."""
    if (folder / "state.json").exists():
        run = Run.open(folder)
        result = folder / "model"
        if not (result / CONFIG).exists():
            raise AerogelError(
                f"verify: {folder} has no result yet; finish it with `aerogel resume {folder}`"
            )
        job = open_job(run.settings, console, parse_goals(run.settings.target))
        found = judge(job, folder / "candidates/000", result)
        return {**found, "pass": found["verdict"]["pass"], "text": found["verdict"]["text"]}
    opened = open_model(str(folder), trust=trust)
    shape = input_of(opened.model, opened.input)
    parity = check_parity(opened.model, folder / "model.onnx", random_inputs(shape))
    text = f"{'PASS' if parity.ok else 'FAIL'}  {parity.samples} random inputs, largest difference {parity.max_abs_diff:.1e}"
    return {"pass": parity.ok, "text": text, "parity": asdict(parity)}


def compare_two(first: Path, second: Path, threads: int) -> dict[str, Any]:
    """Latency of two files, interleaved in one run; a folder stands for its model.onnx."""
    a, b = (path / "model.onnx" if path.is_dir() else path for path in (first, second))
    ratio = compare(a, b, threads=threads)
    text = f"A {ratio.a.describe()}\nB {ratio.b.describe()}\nB / A = x{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]"
    return {"text": text, "a": asdict(ratio.a), "b": asdict(ratio.b), "ratio": asdict(ratio.ratio)}


def random_inputs(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(RANDOM_SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
