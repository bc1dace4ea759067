"""The plain jobs beside `compress`: train, export, verify. Each is a few of its pieces."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from aerogel.compress.distilling import check_again
from aerogel.compress.goal import goals_of
from aerogel.compress.job import Job, lead, open_job
from aerogel.compress.run import ORIGINAL, RESULT, Run, is_run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import judge, parity_text
from aerogel.console import Console
from aerogel.cost.latency import compare
from aerogel.errors import AerogelError, Interrupted
from aerogel.export import input_of, open_model, read_config
from aerogel.export.onnx import export_onnx
from aerogel.export.saved import CONFIG
from aerogel.export.verify import check_parity
from aerogel.files import refuse_existing, replacing
from aerogel.stats import accuracy_interval
from aerogel.train import HardLabels, predict
from aerogel.train.distributed import restarted

RANDOM_SAMPLES = 64


def train_and_save(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Trains with hard labels and saves the folder `out`; a stopped training goes on when called again."""
    if out is None:
        raise AerogelError("train: --out is missing; name the folder to write the trained network to")
    lead(settings, out)
    if restarted() and (out / CONFIG).is_file():  # torchrun's; another process has died after all was done
        console.say("train", f"{out} is finished; nothing is left to do")
        accuracy = read_config(out).metrics["accuracy"]
        return {"model": settings.model, "data": settings.data, "accuracy": accuracy, "saved": str(out)}
    refuse_existing(out, "train")
    job = open_job(settings, console)
    run = _begun(job, out.with_name(f"{out.name}.part"))
    try:
        with job.signals:
            model = job.train(job.opened.model, HardLabels(), job.settings.train, run, "train")
    except Interrupted:
        console.say("stopped", f"what was done is kept in {run.path}; the same command goes on")
        raise
    except AerogelError:
        if not (run.path / "checkpoints").exists():
            shutil.rmtree(run.path)
        raise
    correct = (predict(model, job.data, "test").argmax(1) == job.data.test.labels).numpy()
    accuracy = accuracy_interval(correct)
    metrics = {"accuracy": asdict(accuracy), "data": settings.data, "epochs": job.settings.train.epochs}
    job.save(model, out, metrics=metrics)
    shutil.rmtree(run.path)
    console.say("train", f"top-1 {accuracy.value:.2f} % [{accuracy.low:.2f}, {accuracy.high:.2f}] on "
                f"{len(correct):,} test images; saved {out}")  # fmt: skip
    return {"model": settings.model, "data": settings.data, "accuracy": asdict(accuracy), "saved": str(out)}


def _begun(job: Job, path: Path) -> Run:
    """The training's own folder, beside the one it will become. Raises AerogelError when it holds another's."""
    fingerprint = job.data.fingerprint()
    if not path.exists():
        return Run.create(job.settings, path, {"data": fingerprint})
    run = Run.open(path)
    held, given = (settings.model_dump(exclude={"data_root"}) for settings in (run.settings, job.settings))
    if held != given or run["data"] != fingerprint:
        raise AerogelError(
            f"train: {path} holds a stopped training with other options or data; give the options of its config.toml "
            "again to go on, or remove it to begin anew"
        )
    return run


def export_and_check(
    model: str, weights: str | None, shape: tuple[int, int, int] | None, trust: bool, out: Path
) -> dict[str, Any]:
    """Writes `out` as ONNX; it appears once it agrees with the network on random inputs."""
    refuse_existing(out, "export")
    if not out.parent.is_dir():
        raise AerogelError(f"export: there is no folder {out.parent}; make it first, or write elsewhere")
    opened = open_model(model, input_shape=shape, weights=weights, trust=trust)
    shape = shape or input_of(opened.model, opened.input)
    with replacing(out) as temp:
        exported = export_onnx(opened.model, (torch.zeros(1, *shape),), temp)
        parity = check_parity(opened.model, temp, random_inputs(shape))
        if not parity.ok:
            raise AerogelError(
                f"export: the file gives other outputs than the network (by {parity.max_abs_diff:.1e}, "
                f"{100 * parity.top1_agreement:.2f} % top-1 agreement); {model} cannot be exported"
            )
    return {"file": str(out), "bytes": exported.bytes, "dynamic_batch": exported.dynamic_batch, **asdict(parity)}


def verify_folder(folder: Path, threads: int | None, trust: bool, console: Console) -> dict[str, Any]:
    """A run: its verdict again, measured here and now. A saved folder: model.onnx against model.safetensors."""
    if is_run(folder):
        return _verify_run(Run.open(folder), threads, trust, console)
    if not folder.is_dir():
        rule = "one file alone has nothing to be compared with" if folder.exists() else "there is no such folder"
        raise AerogelError(f"verify: {folder}: {rule}; give a run, a saved folder, or two of them or of .onnx files")
    opened = open_model(str(folder), trust=trust)
    parity = check_parity(opened.model, folder / "model.onnx", random_inputs(input_of(opened.model, opened.input)))
    text = f"{'PASS' if parity.ok else 'FAIL'}   {parity_text(asdict(parity))}, random inputs"
    return {"pass": parity.ok, "text": text, "parity": asdict(parity)}


def _verify_run(run: Run, threads: int | None, trust: bool, console: Console) -> dict[str, Any]:
    distilled = run.settings.verb == "distill"
    goals = () if distilled else goals_of(run.settings)
    if not goals and not distilled:
        raise AerogelError(f"verify: {run.path} is a sensitivity scan; there is no result in it to be checked")
    if "ship" not in run:
        again = f"aerogel resume {quote(str(run.path))}"
        raise AerogelError(f"verify: {run.path} has no result yet; finish it with `{again}`")
    run.check_code(trust)
    if distilled:
        return check_again(run, console)
    settings = run.settings if threads is None else run.settings.model_copy(update={"threads": threads})
    job = open_job(settings, console, goals)
    run.check_data(job.data)
    found = judge(job, run.path / ORIGINAL, run.path / RESULT)
    text = f"{found['verdict']['text']}\n{parity_text(found['parity'])}"
    return {**found, "pass": found["verdict"]["pass"], "text": text}


def compare_two(first: Path, second: Path, threads: int) -> dict[str, Any]:
    """Latency of two files, interleaved; a saved folder stands for its model.onnx, a run for its result's."""
    ratio = compare(_onnx_of(first), _onnx_of(second), threads=threads)
    share = ratio.ratio
    faster = f"B / A = x{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
    text = f"A {ratio.a.describe()}\nB {ratio.b.describe()}\n{faster}"
    return {"text": text, "a": asdict(ratio.a), "b": asdict(ratio.b), "ratio": asdict(ratio.ratio)}


def _onnx_of(path: Path) -> Path:
    if is_run(path):
        path = path / RESULT
    return path / "model.onnx" if path.is_dir() else path


def random_inputs(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(RANDOM_SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
