"""What every stage of a run shares: the settings, the data, the original network and where to speak."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aerogel import data as datasets
from aerogel.compress.goal import Goal
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings
from aerogel.console import Console
from aerogel.data import Dataset
from aerogel.errors import AerogelError
from aerogel.export import InputSpec, Opened, load, open_model, save
from aerogel.export.onnx import export_onnx
from aerogel.graph import capture
from aerogel.imports import import_factory
from aerogel.train import Objective, Recipe, Signals, Step, fit, load_checkpoint, save_checkpoint, start


@dataclass
class Job:
    settings: Settings
    goals: tuple[Goal, ...]
    data: Dataset
    opened: Opened
    console: Console
    signals: Signals = dataclasses.field(default_factory=Signals)

    @property
    def example(self) -> tuple[Tensor]:
        """The example input: one image."""
        return (torch.zeros(1, *self.data.input_shape),)

    @property
    def latency_goal(self) -> Goal | None:
        return next((goal for goal in self.goals if goal.metric == "latency"), None)

    @property
    def size_metric(self) -> str:
        """What the frontier is drawn against."""
        return "latency" if self.latency_goal else self.goals[0].metric

    def save(self, model: nn.Module, folder: Path, metrics: dict[str, object]) -> Path:
        """A saved folder with model.onnx in it."""
        spec = InputSpec(shape=self.data.input_shape, mean=self.data.mean, std=self.data.std)
        save(
            model, folder, factory=self.opened.factory, input=spec, classes=self.data.classes, metrics=metrics
        )
        export_onnx(model, self.example, folder / "model.onnx")
        return folder

    def load(self, folder: Path) -> nn.Module:
        factory = import_factory(self.opened.factory) if self.opened.factory else None
        return load(folder, factory=factory)

    def train(
        self, model: nn.Module, objective: Objective, recipe: Recipe, run: Run, stage: str
    ) -> nn.Module:
        """Trains to the end of the recipe, from the run's newest whole checkpoint of that stage if there is one."""
        folder = run.path / "checkpoints" / stage
        state = start(model, objective, self.data, recipe)
        for problem in load_checkpoint(folder, state):
            self.console.say("warning", f"skipped a damaged checkpoint: {problem}")
        if state.step:
            self.console.say(stage, f"continues at step {state.step} of {state.total}")
        with self.console.progress(stage, state.total) as show:
            log = _Log(run, stage, show, max(1, state.total // 200))
            return fit(
                state, self.data, on_step=log, save=lambda s: save_checkpoint(folder, s), signals=self.signals
            )


class _Log:
    """Draws every step; writes the mean losses of every `every` steps to events.jsonl."""

    def __init__(self, run: Run, stage: str, show: Callable[[int, str], None], every: int) -> None:
        self._run, self._stage, self._show, self._every = run, stage, show, every
        self._sums: dict[str, float] = {}

    def __call__(self, step: Step) -> None:
        for name, loss in step.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in step.losses.items())
        self._show(step.number, f"epoch {step.epoch:.1f}  {losses}  lr {step.lr:.2g}")
        if step.number % self._every == 0:
            means = {name: total / self._every for name, total in self._sums.items()}
            self._run.event(train=self._stage, step=step.number, **means)
            self._sums = {}


def open_job(settings: Settings, console: Console, goals: tuple[Goal, ...] = ()) -> Job:
    """Reads the data and builds the network. Raises AerogelError for whatever does not fit; writes nothing."""
    data = datasets.load(settings.data, size=settings.input)
    if "epochs" not in settings.train.model_fields_set:
        epochs = max(
            settings.train.epochs, 10 * round((20_000 / len(data.train)) ** 0.5)
        )  # small sets need more
        settings.train = settings.train.model_copy(update={"epochs": epochs})
    torch.manual_seed(settings.seed)
    opened = open_model(
        settings.model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        weights=settings.weights,
        trust=settings.trust,
    )
    if opened.input is not None and opened.trained:
        data = _as_the_model_reads(data, opened.input)
    job = Job(settings, goals, data, opened, console)
    _check_output(job)
    return job


def _as_the_model_reads(data: Dataset, spec: InputSpec) -> Dataset:
    """The data under the normalisation that the saved network was trained with."""
    if tuple(spec.shape) != data.input_shape:
        size = ",".join(map(str, spec.shape))
        raise AerogelError(
            f"the saved model reads images of {size}, {data.name} has {data.input_shape}; pass --input {size}"
        )
    return dataclasses.replace(data, mean=spec.mean, std=spec.std)


def _check_output(job: Job) -> None:
    graph = capture(job.opened.model, job.example)
    shapes = [graph.values[name].shape for name in graph.outputs]
    if shapes != [(1, job.data.num_classes)]:
        raise AerogelError(
            f"model {job.settings.model!r} gives {shapes}, {job.data.name} needs one output (1, {job.data.num_classes}): "
            "logits of its classes"
        )
