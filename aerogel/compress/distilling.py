"""`aerogel distill`: a student learns from its teachers, and what it gained is measured.

check -> teacher -> distil -> (alone) -> ship -> report. Every stage leaves what it found in the run's folder, so that a
stopped run goes on where it was. What is chosen is chosen on the validation split; the test split is read for the
report alone.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from aerogel.compress.distil_story import tell
from aerogel.compress.job import Job, lead, open_job
from aerogel.compress.measure import correct_on
from aerogel.compress.run import RESULT, Run, is_run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import parity_text
from aerogel.compress.stages import finished, resumable, stage
from aerogel.compress.teaching import School, identities, open_school, open_teachers
from aerogel.compress.worth import confused, counts, heard, judged, parity_of, reliability, right_on, seen, timed, worth
from aerogel.console import Console
from aerogel.errors import AerogelError
from aerogel.export.saved import read_tensors, write_tensors
from aerogel.files import refuse_existing, replacing
from aerogel.report import terminal, write
from aerogel.stats import accuracy_interval, paired_drop
from aerogel.train import HardLabels, Objective, State, load_checkpoint, predict, save_checkpoint, start
from aerogel.train.distributed import restarted

TEACHER, STUDENT, ALONE = "teacher", "distil", "alone"  # stages that train, and parts of candidates/
EVERY = 60.0  # seconds between two checkpoints, at the end of an epoch


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
    checked = {"text": text, **identities(job, school)}
    state = {"data": job.data.fingerprint(), "check": checked, "seconds": {"check": time.monotonic() - began}}
    run = Run.create(job.settings, out, state)
    console.say("run", f"{run.path}   (Ctrl-C is safe: `aerogel resume {quote(str(run.path))}` goes on)")
    return _finish(job, run, school)


def go_on(run: Run, console: Console) -> dict[str, Any]:
    """Finishes a stopped distillation. Raises AerogelError when data or networks are not those it began with."""
    settings = run.settings
    lead(settings, run.path, open_teachers)
    done = ", ".join(run.done)
    console.say("resume", f"{run.path}: {settings.title}  <-  {settings.taught_by}   done so far: {done}")
    job = open_job(settings, console)
    run.check_data(job.data)
    school = open_school(job)
    for who, identity in identities(job, school).items():
        if run["check"].get(who, identity) != identity:
            raise AerogelError(
                f"resume: the {who} is not the one with which {run.path} began; bring it back, or start a new run"
            )
    return _finish(job, run, school)


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
            if (cache := school.teacher.cache) is not None:
                told = f"the teacher was asked for {cache.asked:,} images of training, {cache.found:,} were there"
                job.console.say("cache", f"{cache.folder}: {told}")
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


def check_again(run: Run, console: Console) -> dict[str, Any]:
    """The shipped file against its model, and against the accuracy that the report tells, here and now."""
    job = open_job(run.settings, console)
    run.check_data(job.data)
    folder = run.path / RESULT
    parity = parity_of(job, job.load(folder), folder)
    told = next(one for one in run["ship"]["networks"] if one["name"] == "student")["accuracy"]
    found = accuracy_interval(correct_on(job, folder / "model.onnx", "test"))
    passed = parity["ok"] and told["low"] <= found.value <= told["high"]
    word = "PASS" if passed else "FAIL"
    text = (
        f"{word}   top-1 {found.value:.2f} % by the file, {told['value']:.2f} % when it was made\n{parity_text(parity)}"
    )
    return {"pass": passed, "text": text, "parity": parity, "accuracy": asdict(found)}


# ---------------------------------------------------------------- the stages


def ask(job: Job, run: Run, school: School) -> dict[str, Tensor]:
    """What the teachers say as one, {"val", "test": logits (n, classes)}; kept, so that they are asked once.

    run["teacher"]: {"accuracy", "val_accuracy", "ece", "members": [{"name", "val_accuracy", "accuracy"}]}.
    """
    file = run.path / "checkpoints" / TEACHER / "logits.safetensors"
    if TEACHER in run and file.exists():
        return read_tensors(file)
    said = {split: heard(job, school.teacher, split) for split in ("val", "test")}
    answers = {split: school.teacher.combined(members, 1.0) for split, members in said.items()}
    members = [
        {
            "name": one.name,
            "val_accuracy": right_on(job, "val", said["val"][i]),
            "accuracy": right_on(job, "test", said["test"][i]),
        }
        for i, one in enumerate(school.teachers)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temp:
        write_tensors(answers, temp)
    found = judged(job, answers, answers) | {"members": members}
    low, chance = found["accuracy"]["low"], 100 / job.data.num_classes
    job.console.say(TEACHER, worth(found))
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
    found = seen(job, model, answers["val"])
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
        found = seen(self._job, state.result, self._answers)
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
    taught = {key: value for key, value in run[TEACHER].items() if key != "members"}
    networks = [{"name": "teacher", "what": job.settings.taught_by, **taught, **counts(job, school.models)}]
    for name, given in logits.items():
        networks.append({"name": name, "what": job.settings.short_model, **judged(job, given, answers)})
    networks[2] |= counts(job, [student])
    labels = job.data.test.labels
    right = {name: (given["test"].argmax(1) == labels).numpy() for name, given in logits.items()}
    right["teacher"] = (answers["test"].argmax(1) == labels).numpy()
    found: dict[str, Any] = {
        "networks": networks,
        "gap": asdict(paired_drop(right["teacher"], right["student"])),
        "confusion": confused(job, logits["student"]["test"], answers["test"]),
        "reliability": {
            "teacher": reliability(job, answers["test"]),
            "student": reliability(job, logits["student"]["test"]),
        },
    }
    if "labels alone" in right:
        found["gain"] = asdict(paired_drop(right["student"], right["labels alone"]))
    metrics = {"accuracy": networks[2]["accuracy"], "data": job.settings.data, "taught_by": job.settings.taught_by}
    folder = job.save(student, run.clear(RESULT), metrics=metrics)
    found |= {"parity": parity_of(job, student, folder), **timed(job, school, folder)}
    job.console.say("ship", f"{folder}: {worth(networks[2])}")
    run["ship"] = found
