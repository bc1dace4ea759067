"""What every stage of a run shares: the settings, the data, the original network and where to speak."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import data as datasets
from aerogel.compress.goal import Goal
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings
from aerogel.console import Console
from aerogel.data import Dataset, batch_count
from aerogel.data.files import Lazy
from aerogel.errors import AerogelError
from aerogel.export import InputSpec, Opened, load, open_model, read_config, save
from aerogel.export.onnx import export_onnx
from aerogel.export.saved import CONFIG
from aerogel.files import new_folder
from aerogel.graph import capture, evaluating
from aerogel.imports import import_factory
from aerogel.train import (
    Objective,
    Recipe,
    Signals,
    Speed,
    State,
    Step,
    check_room,
    fit,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    start,
)
from aerogel.train.distributed import crew, current, follow, restarts_allowed
from aerogel.train.fit import train_along

EVENTS = 200  # points of a stage's curve
PULL = 1.0  # from where batch-norm scales begin, to 0


@dataclass(frozen=True)
class Job:
    """opened: the original as the user named it, not yet trained unless it came with weights. own_scale: mean and std
    of the data set itself, where `data` has those of the network's weights; None where it was not asked."""

    settings: Settings
    goals: tuple[Goal, ...]
    data: Dataset
    opened: Opened
    console: Console
    signals: Signals = field(default_factory=Signals)
    own_scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def example(self) -> tuple[Tensor]:
        """The example input: one image."""
        return (torch.zeros(1, *self.data.input_shape),)

    @property
    def latency_goal(self) -> Goal | None:
        return next((goal for goal in self.goals if goal.metric == "latency"), None)

    @property
    def size_key(self) -> str:
        """Of a candidate, what the frontier is drawn against: the latency if that is a goal, else the first goal."""
        return "latency_ratio" if self.latency_goal else self.goals[0].metric

    def save(
        self, model: nn.Module, folder: Path, *, metrics: Mapping[str, Any] | None = None, onnx: bool = True
    ) -> Path:
        """A saved folder, with model.onnx in it unless told not to: whole or not at all."""
        spec = InputSpec(shape=self.data.input_shape, mean=self.data.mean, std=self.data.std)
        with new_folder(folder, "save") as temp:
            saved = save(
                model,
                temp / "saved",
                factory=self.opened.factory,
                input=spec,
                classes=self.data.classes,
                metrics=metrics,
            )
            if onnx:
                export_onnx(model, self.example, saved / "model.onnx")
            for file in saved.iterdir():
                file.rename(temp / file.name)
            saved.rmdir()
        return folder

    def load(self, folder: Path) -> nn.Module:
        factory = import_factory(self.opened.factory) if self.opened.factory else None
        return load(folder, factory=factory)

    def train(self, model: nn.Module, objective: Objective, recipe: Recipe, run: Run, stage: str) -> nn.Module:
        """Trains to the end of the recipe, from the run's newest whole checkpoint of that stage if there is one."""
        state = start(model, objective, self.data, recipe)
        if self.continued(state, run, stage):
            self.console.say(stage, f"goes on at step {state.step:,} of {state.total:,}")
        return self.fit(state, run, stage, stage)

    def continued(self, state: State, run: Run, part: str) -> bool:
        """Puts the newest whole checkpoint of that part of the run into the state, if there is one."""
        for problem in load_checkpoint(run.path / "checkpoints" / part, state):
            self.console.say("warning", f"skipped a damaged checkpoint: {problem}")
        return state.step > 0

    def fit(
        self, state: State, run: Run, stage: str, part: str, until: int | None = None,
        after_epoch: Callable[[State], None] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Trains to step `until` or to the end, with checkpoints in that part of the run; told under `stage`.

        after_epoch: called with the state after every epoch, and at the end; it may save.
        """
        folder = run.path / "checkpoints" / part
        check_room(folder, state)
        with self.console.progress(stage, state.total) as show:
            decoded = isinstance(self.data.train.images, Lazy)
            log = _Log(run, stage, show, max(1, state.total // EVENTS), decoded)
            for last in _pauses(state, until) if after_epoch else [until]:
                model = fit(state, self.data, on_step=log, save=lambda s: save_checkpoint(folder, s, within=run.path),
                            signals=self.signals, until=last,
                            on_trouble=lambda text: self.console.say("warning", text))  # fmt: skip
                if after_epoch:
                    after_epoch(state)
        log.tell(self.console)
        return model


def _pauses(state: State, until: int | None) -> Iterator[int]:
    """The ends of the epochs that are left, and of the training."""
    end = state.total if until is None else until
    while True:
        last = min(end, (state.step // state.steps_per_epoch + 1) * state.steps_per_epoch)
        yield last
        if last == end:
            return


class _Log:
    """Draws every step; writes the mean losses of every `every` steps to events.jsonl."""

    def __init__(
        self, run: Run, stage: str, show: Callable[[int, str], None], every: int, decoded: bool = False
    ) -> None:
        self._run, self._stage, self._show, self._every = run, stage, show, every
        self._sums: dict[str, float] = {}
        self._count = 0  # steps in the sums; fewer than `every` in the first group of a resumed stage
        self._speed = Speed(decoded=decoded)

    def __call__(self, step: Step) -> None:
        for name, loss in step.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        self._count += 1
        self._speed.add(step)
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in step.losses.items())
        self._show(step.number, f"epoch {step.epoch:.1f}  {losses}  lr {step.lr:.2g}  {self._speed.text()}")
        if step.number % self._every == 0 or step.number == step.total:
            means = {name: total / self._count for name, total in self._sums.items()}
            self._run.event(train=self._stage, step=step.number, **means)
            self._sums, self._count = {}, 0

    def tell(self, console: Console) -> None:
        """Says how fast it went and what would make it faster; kept for the report."""
        if self._speed.images:
            ranks = current().ranks
            found = self._speed.to_json(ranks)
            console.say(self._stage, found["text"])
            self._run.note_speed(self._stage, found)


def lead(settings: Settings, out: Path | None, prepare: Callable[[Job], object] | None = None) -> None:
    """Under torchrun: returns in rank 0, which runs the job; every other process trains along until that ends it, and
    exits with its code. Alone it only returns.

    prepare: what else those processes need before they can, the modules of a teacher's code for instance.

    Raises AerogelError where a restart by torchrun could not find the run again.
    """
    if out is None and restarts_allowed():
        raise AerogelError("torchrun may restart this job; give it --out RUN, by which a restart finds what was done")
    if crew().rank > 0:
        job = open_job(settings, Console(io.StringIO()))
        job.data.fingerprint()  # asked for at every training, and kept
        if prepare:
            prepare(job)
        sys.exit(follow(lambda payload: train_along(payload, job.data)))


def open_job(settings: Settings, console: Console, goals: tuple[Goal, ...] = ()) -> Job:
    """Reads the data and builds the network; its settings have the epochs, and slimming's penalty, filled in.

    Writes nothing. Raises AerogelError for whatever does not fit.
    """
    with _data_root(settings.data_root):
        data = datasets.load(settings.data, size=settings.input)
    settings = _for_this_many(settings, data)
    torch.manual_seed(settings.seed)
    opened = open_model(
        settings.model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        weights=settings.weights,
        trust=settings.trust,
    )
    if opened.input is not None and tuple(opened.input.shape) != data.input_shape:
        size, found = (",".join(map(str, shape)) for shape in (opened.input.shape, data.input_shape))
        raise AerogelError(f"the saved model reads images of {size}, {data.name} has {found}; pass --input {size}")
    own = (data.mean, data.std)
    spec = opened.input or _input_of_weights(settings.weights)
    if spec is not None:  # images are normalised as they were when the weights were trained
        data = dataclasses.replace(data, mean=spec.mean, std=spec.std)
    job = Job(settings, goals, data, opened, console, own_scale=own)
    _check_output(job)
    return job


def _for_this_many(settings: Settings, data: Dataset) -> Settings:
    """With what hangs on the number of images: the epochs, and slimming's penalty."""
    if "epochs" not in settings.train.model_fields_set:
        epochs = max(settings.train.epochs, 10 * round((20_000 / len(data.train)) ** 0.5))  # small sets need more
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": epochs})})
    if settings.slimming and not settings.penalty:
        settings = settings.model_copy(update={"penalty": _penalty(settings.slim_recipe, data)})
    return settings


def _penalty(recipe: Recipe, data: Dataset) -> float:
    """With which a scale that the loss does not hold moves by PULL in a whole training: sum(rates) / (1 - momentum)
    times it. Two digits."""
    per_epoch = batch_count(len(data.train), recipe.batch_size)
    total = max(1, round(recipe.epochs * per_epoch))
    rates = sum(learning_rate(recipe, step, total, per_epoch) for step in range(total))
    momentum = recipe.momentum if recipe.optimizer == "sgd" else 0.0
    return float(f"{PULL * (1 - momentum) / rates:.1e}")


@contextmanager
def _data_root(root: str | None) -> Iterator[None]:
    """$AEROGEL_DATA as it was when the run began, unless the user has set it now."""
    now = os.environ.get("AEROGEL_DATA")
    os.environ["AEROGEL_DATA"] = now or root or ""
    try:
        yield
    finally:
        if now is None:
            del os.environ["AEROGEL_DATA"]
        else:
            os.environ["AEROGEL_DATA"] = now


def _input_of_weights(weights: str | None) -> InputSpec | None:
    """What a saved folder given as --weights was trained to read; None when it is a bare file of weights."""
    if weights is None or not (Path(weights) / CONFIG).exists():
        return None
    return read_config(weights).input


def _check_output(job: Job) -> None:
    """Raises CaptureError naming the line that cannot be followed, AerogelError when the output is not logits."""
    model, classes = job.opened.model, job.data.num_classes
    capture(model, job.example)
    with torch.no_grad(), evaluating(model):
        output = model(*job.example)
    shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if shape != (1, classes):
        raise AerogelError(
            f"model {job.settings.model!r} gives {shape} for one image, {job.data.name} needs one output of "
            f"(1, {classes}): the logits of its {classes} classes"
        )
