"""`aerogel distill`: a student learns from its teachers, and what it gained is measured.

check -> teacher -> distil -> (alone) -> ship -> report. Every stage leaves what it found in the run's folder, so that a
stopped run goes on where it was. What is chosen is chosen on the validation split; the test split is read for the
report alone.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.compress.distil_story import tell
from aerogel.compress.job import Job, lead, open_job
from aerogel.compress.run import RESULT, Run, is_run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import SAMPLES
from aerogel.compress.stages import finished, resumable, stage
from aerogel.compress.teaching import Logits, School, open_school, open_teachers
from aerogel.console import Console
from aerogel.cost import count
from aerogel.cost.latency import compare
from aerogel.data import batches, normalise
from aerogel.distill.agreement import agreement, calibration, calibration_error, confusion
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.export.saved import read_tensors, write_tensors
from aerogel.export.verify import check_parity
from aerogel.files import refuse_existing, replacing
from aerogel.graph import capture
from aerogel.report import terminal, write
from aerogel.stats import accuracy_interval, paired_drop
from aerogel.train import HardLabels, Objective, State, load_checkpoint, predict, save_checkpoint, start
from aerogel.train.distributed import restarted

TEACHER, STUDENT, ALONE = "teacher", "distil", "alone"  # stages that train, and parts of candidates/
EVERY = 60.0  # seconds between two checkpoints, at the end of an epoch
COUNTS = ("params", "macs", "flops", "access_bytes", "peak_bytes")


def distill(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Trains the student; returns the report. Nothing is written before teachers, losses and taps are known to fit.

    Raises AerogelError for bad input, Interrupted when a signal stopped it (the run can be resumed).
    """
    lesson = settings.lesson
    lead(settings, out, open_teachers)
    if out is not None and restarted() and is_run(out):
        run = Run.open(out)
        run.check_code(settings.trust)
        return finished(run, console) or go_on(run, console)
    if out is not None:
        refuse_existing(out, "distill")
    console.say("distill", f"{settings.title}  <-  {settings.taught_by}")
    console.say("losses", f"{lesson.described}{'; no label is read' if lesson.label_free else ''}")
    began = time.monotonic()
    job = open_job(settings, console)
    school = open_school(job)
    text = _described(job, school)
    console.say("check", text)
    state = {"data": job.data.fingerprint(), "check": {"text": text}, "seconds": {"check": time.monotonic() - began}}
    run = Run.create(job.settings, out, state)
    console.say("run", f"{run.path}   (Ctrl-C is safe: `aerogel resume {quote(str(run.path))}` goes on)")
    return _finish(job, run, school)


def go_on(run: Run, console: Console) -> dict[str, Any]:
    """Finishes a stopped distillation. Raises AerogelError when the data are not those it began with."""
    settings = run.settings
    lead(settings, run.path, open_teachers)
    done = ", ".join(run.done)
    console.say("resume", f"{run.path}: {settings.title}  <-  {settings.taught_by}   done so far: {done}")
    job = open_job(settings, console)
    run.check_data(job.data)
    return _finish(job, run, open_school(job))


def _described(job: Job, school: School) -> str:
    own, student, taught = (
        sum(p.numel() for part in parts for p in part.parameters())
        for parts in ([school.objective], [job.opened.model], school.models)
    )
    text = f"student {student / 1e6:.3g} M parameters, teacher {taught / 1e6:.3g} M"
    return f"{text}; {own:,} more are trained beside the student and left out of it" if own else text


def _finish(job: Job, run: Run, school: School) -> dict[str, Any]:
    """The stages after the check; each returns at once when an earlier attempt finished it."""
    with job.signals, resumable(job, run):
        with stage(job, run, TEACHER):
            answers = ask(job, run, school)
        with stage(job, run, STUDENT):
            learn(job, run, STUDENT, school.objective, answers)
        if job.settings.lesson.alone:
            with stage(job, run, ALONE):
                learn(job, run, ALONE, HardLabels(), answers)
        with stage(job, run, "ship"):
            ship(job, run, school, answers)
        report = tell(job, run)
        page, _ = write(report, run.path)
        for part in ("checkpoints", f"candidates/{STUDENT}"):
            shutil.rmtree(run.path / part, ignore_errors=True)
        run["report"] = page.name
    job.console.say("report", f"{page}   (again, here or elsewhere: `aerogel verify {quote(str(run.path))}`)")
    job.console.show("\n" + terminal(report))
    return report


# ---------------------------------------------------------------- the stages


def ask(job: Job, run: Run, school: School) -> dict[str, Tensor]:
    """What the teachers say as one, {"val", "test": logits (n, classes)}; kept, so that they are asked once.

    run["teacher"]: {"accuracy", "val_accuracy", "ece", "members": [{"name", "val_accuracy", "accuracy"}]}.
    """
    file = run.path / "checkpoints" / TEACHER / "logits.safetensors"
    if TEACHER in run and file.exists():
        return read_tensors(file)
    heard = {split: _heard(job, school, split) for split in ("val", "test")}
    answers = {split: school.teacher.combined(members, 1.0) for split, members in heard.items()}
    members = [
        {"name": one.name, **{f"{split} accuracy": _right(job, split, heard[split][i]) for split in heard}}
        for i, one in enumerate(school.teachers)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temp:
        write_tensors(answers, temp)
    found = _judged(job, answers, answers) | {"members": members}
    low, chance = found["accuracy"]["low"], 100 / job.data.num_classes
    job.console.say(TEACHER, _worth(found))
    if low <= chance:
        job.console.say("warning", f"the teacher answers no better than by chance ({chance:.3g} %): is it trained?")
    run[TEACHER] = found
    return answers


def learn(job: Job, run: Run, name: str, objective: Objective, answers: dict[str, Tensor]) -> None:
    """Trains a copy of the student by an objective into candidates/NAME; run[name] says how far it came."""
    if name in run:
        return
    settings = job.settings
    keep_best = settings.lesson.keep == "best"
    state = start(copy.deepcopy(job.opened.model), objective, job.data, settings.train)
    if job.continued(state, run, name):
        job.console.say(name, f"goes on at step {state.step:,} of {state.total:,}")
    watch = _Watch(job, run, name, answers["val"], keep_best)
    model = job.fit(state, run, name, name, after_epoch=watch)
    if keep_best:
        load_checkpoint(watch.folder, state, best=True)
        model = state.result.eval()
    job.save(model, run.clear("candidates", name), onnx=False)
    found = _seen(job, model, answers["val"])
    epoch = state.step / state.steps_per_epoch
    job.console.say(name, f"validation {found['val_accuracy']:.2f} %   agreement {found['agreement']:.2f} %   "
                    f"ECE {found['ece']:.2f} %   after {epoch:g} epochs")  # fmt: skip
    run[name] = found | {"epoch": epoch}
    run.clear("checkpoints", name)


class _Watch:
    """After every epoch: what the student is worth on the validation split, and a checkpoint where one is due."""

    def __init__(self, job: Job, run: Run, name: str, answers: Tensor, keep_best: bool) -> None:
        self._job, self._run, self._name, self._answers = job, run, name, answers
        self.folder = run.path / "checkpoints" / name
        self._keep_best, self._best, self._saved = keep_best, -1.0, time.monotonic()

    def __call__(self, state: State) -> None:
        found = _seen(self._job, state.result, self._answers)
        self._run.event(train=f"{self._name}, validation", step=state.step, **found)
        score = found["val_accuracy"]
        better = self._keep_best and score > self._best
        due = time.monotonic() - self._saved > EVERY or self._job.signals.caught is not None
        if better or due:
            save_checkpoint(self.folder, state, best=score if self._keep_best else None, within=self._run.path)
            self._best, self._saved = max(self._best, score), time.monotonic()
        self._job.signals.check()


def ship(job: Job, run: Run, school: School, answers: dict[str, Tensor]) -> None:
    """The student alone as files in model/, checked against each other; run["ship"]: what everyone is worth on test."""
    if "ship" in run:
        return
    student = job.load(run.path / "candidates" / STUDENT)
    models = {"student before": job.opened.model, "student": student}
    if job.settings.lesson.alone:
        models["labels alone"] = job.load(run.path / "candidates" / ALONE)
    logits = {name: {split: predict(model, job.data, split) for split in answers} for name, model in models.items()}
    networks = [{"name": "teacher", "what": job.settings.taught_by, **run[TEACHER], **_counts(job, school.models)}]
    for name, given in logits.items():
        networks.append({"name": name, "what": job.settings.short_model, **_judged(job, given, answers)})
    networks[2] |= _counts(job, [student])
    labels = job.data.test.labels
    right = {name: (given["test"].argmax(1) == labels).numpy() for name, given in logits.items()}
    right["teacher"] = (answers["test"].argmax(1) == labels).numpy()
    found: dict[str, Any] = {
        "networks": networks,
        "gap": asdict(paired_drop(right["teacher"], right["student"])),
        "confusion": confusion(logits["student"]["test"], answers["test"]).tolist(),
        "reliability": {
            name: {key: value.tolist() for key, value in vars(calibration(given, labels)).items()}
            for name, given in (("teacher", answers["test"]), ("student", logits["student"]["test"]))
        },
    }
    if "labels alone" in right:
        found["gain"] = asdict(paired_drop(right["student"], right["labels alone"]))
    metrics = {"accuracy": networks[2]["accuracy"], "data": job.settings.data, "taught_by": job.settings.taught_by}
    folder = job.save(student, run.clear(RESULT), metrics=metrics)
    found |= {"parity": _parity(job, student, folder), **_timed(job, school, folder)}
    job.console.say("ship", f"{folder}: {_worth(networks[2])}")
    run["ship"] = found


# ---------------------------------------------------------------- what they are worth


def _heard(job: Job, school: School, split: str) -> Tensor:
    """Each teacher's logits of a split: (K, n, classes)."""
    found = []
    for batch in batches(job.data, split, 256):
        job.signals.check()
        found.append(school.teacher.members(batch.inputs))
    return torch.cat(found, dim=1)


def _right(job: Job, split: str, logits: Tensor) -> float:
    return 100 * float((logits.argmax(1) == getattr(job.data, split).labels).double().mean())


def _seen(job: Job, model: nn.Module, answers: Tensor) -> dict[str, float]:
    """Of a network on the validation split, in percent."""
    logits = predict(model, job.data, "val")
    ece = calibration_error(logits, job.data.val.labels)
    return {"val_accuracy": _right(job, "val", logits), "agreement": 100 * agreement(logits, answers),
            "ece": 100 * ece}  # fmt: skip


def _judged(job: Job, logits: dict[str, Tensor], answers: dict[str, Tensor]) -> dict[str, Any]:
    """Of what a network says on validation and test: {"accuracy": interval, "val_accuracy", "ece", "val_ece",
    "agreement"}, in percent."""
    labels = job.data.test.labels
    return {
        "accuracy": asdict(accuracy_interval((logits["test"].argmax(1) == labels).numpy())),
        "val_accuracy": _right(job, "val", logits["val"]),
        "ece": 100 * calibration_error(logits["test"], labels),
        "val_ece": 100 * calibration_error(logits["val"], job.data.val.labels),
        "agreement": 100 * agreement(logits["test"], answers["test"]),
    }


def _worth(found: dict[str, Any]) -> str:
    accuracy = found["accuracy"]
    return (
        f"top-1 {accuracy['value']:.2f} % [{accuracy['low']:.2f}, {accuracy['high']:.2f}] on test   "
        f"validation {found['val_accuracy']:.2f} %   ECE {found['ece']:.2f} %"
    )


def _counts(job: Job, models: list[nn.Module]) -> dict[str, Any]:
    """The sums over networks, of peak memory the largest; without what cannot be read as a graph."""
    try:
        costs = [count(capture(Logits(model), job.example)) for model in models]
    except AerogelError:
        return {"params": sum(p.numel() for model in models for p in model.parameters())}
    totals = {name: [getattr(cost, name) for cost in costs] for name in COUNTS}
    return {name: max(row) if name == "peak_bytes" else sum(row) for name, row in totals.items()}


def _parity(job: Job, model: nn.Module, folder: Path) -> dict[str, Any]:
    images = normalise(job.data.test.images[:SAMPLES], job.data.mean, job.data.std)
    return asdict(check_parity(model, folder / "model.onnx", images))


def _timed(job: Job, school: School, folder: Path) -> dict[str, Any]:
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
