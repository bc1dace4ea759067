"""Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", arXiv:1503.02531, section 3, on all of
MNIST; and how far the same student gets. Writes results/hinton2015_mnist.json; a seed that is there already is not run
again, every network is kept in runs/, and a stopped one goes on from its last checkpoint.

    AEROGEL_DATA=... python reproduce/hinton2015_mnist.py [--seeds 0 1 2 3 4] [--only ROW ...]

Errors are of the 10,000 test images. Validation: 10,000 of the 60,000 training images, the others called "fit".
Networks that choose something are trained on "fit"; with what they chose others are trained on all 60,000.

- teacher: 784-1200-1200-10, dropout 0.5, max-norm, images moved by up to 2 pixels; trained twice, from the rate's peak
  to 0 (teacher_first), and from there once more. Students share the teacher of seed 0.
- student_hard: 784-800-800-10 on the labels alone. student_soft_T20: the same on them and, "the additional task", on
  the teacher's soft targets at T = 20, images not moved. student_soft_alone: on the soft targets without the labels.
- no_threes, only_7_8: as student_soft_T20 without 3s, with 7s and 8s alone. bias_validation: the omitted class's bias
  (those of 7 and 8) moved by what is best on validation for one network of "fit"; bias_test: as in the paper, by what
  is best on the test images, which no one may know.
  All these students start from small weights, and those of soft targets learn from images less their mean image.
- grid_*: widths and temperatures, soft targets alone, on validation; the teacher is teacher_first.
- student_best: the student of 784-800-800-10 again, taught without labels by several small convolutional networks
  (their geometric mean) on affine and elastic views, some of them mixed (function matching, Beyer et al. 2022,
  arXiv:2106.05237). The views are made once and kept with the teachers' logits for exactly these pixels; all seeds
  read the same views, each in its own order from its own start.

The paper does not give rates, batches, epochs or seeds: see `Job`. Why the perceptrons have a loop of their own:
fast_mlp.py. The convolutional networks are trained by aerogel.train. One thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from fast_mlp import Source, keep_memory, logits_of, train
from results import add, held_seeds
from tables import hinton2015
from torch import Tensor, nn
from views import views

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.data import Batch, Dataset, Split
from aerogel.distill import Teacher, mixed, soft_target_loss
from aerogel.export import read_config
from aerogel.files import replacing
from aerogel.nets.blocks import Net, initialise, named
from aerogel.train import HardLabels, Recipe, fit, start
from aerogel.train.objective import Objective

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproduce" / "results" / "hinton2015_mnist.json"
TEACHER = {"widths": "1200-1200", "dropout": 0.5, "max_norm": 3.87}  # of the paper's reference 5; sqrt(15)
STUDENT = "800-800"
WIDTHS, TEMPERATURES = (30, 100, 300, 800), (1.0, 2.0, 2.5, 4.0, 8.0, 20.0, 40.0)
OMITTED = {"no_threes": (range(10), (3,)), "only_7_8": ((7, 8), ())}  # classes kept, of them left out
SHIFTED = {"no_threes": (3,), "only_7_8": (7, 8)}  # whose biases are moved
CENTRED = ("student_soft_T20", "student_soft_alone", *OMITTED)  # the mean image is taken away, then folded into a bias
SMALL = ("student_hard", "student_best", *CENTRED)  # the weights that they start from
SHIFTS = np.arange(-20, 20.05, 0.1)
PAPER = {
    "teacher": 67, "student_hard": 146, "student_soft_T20": 74, "no_threes": 206, "no_threes_on_3s": 133,
    "no_threes_bias_test": 109, "no_threes_bias_test_on_3s": 14, "no_threes_bias_test_shift": 3.5, "only_7_8": 4730,
    "only_7_8_bias_test": 1320, "only_7_8_bias_test_shift": -7.6,
}  # fmt: skip


def recipe(epochs: float, lr: float, **others: Any) -> Recipe:
    """SGD with Nesterov momentum 0.9 or Adam, one epoch of warm-up, cosine to 0, batches of 500; no weight decay."""
    settings: dict[str, Any] = {"batch_size": 500, "warmup": 1.0, "weight_decay": 0.0, "clip": None}
    return Recipe(epochs=epochs, lr=lr, **settings | others)


# ---------------------------------------------------------------- the images


@dataclass(frozen=True)
class Digits:
    """uint8 (N, 784) pixels and labels (N,). Of those to learn from the last `held_out` validate."""

    pixels: Tensor
    labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    held_out: int = 10_000

    @classmethod
    def mnist(cls) -> Digits:
        data = ag.data.load("mnist")
        order = torch.from_numpy(np.random.default_rng(2015).permutation(60_000))
        pixels, labels = (
            torch.cat([getattr(part, kind) for part in (data.train, data.val)])[order] for kind in ("images", "labels")
        )
        return cls(pixels.flatten(1), labels, data.test.images.flatten(1), data.test.labels)

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """all, fit, val or test."""
        if name == "test":
            return self.test_pixels, self.test_labels
        kept = {"all": slice(None), "fit": slice(-self.held_out), "val": slice(-self.held_out, None)}[name]
        return self.pixels[kept], self.labels[kept]

    def dataset(self, part: str) -> Dataset:
        """For aerogel.train, pixels in [0, 1]."""
        splits = [Split(pixels.view(-1, 1, 28, 28), labels) for pixels, labels in map(self.part, (part, "val", "test"))]
        return Dataset("mnist", *splits, tuple("0123456789"), mean=(0.0,), std=(1.0,), augment="none")


def labelled(pixels: Tensor, labels: Tensor) -> Source:
    def draw(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        index = torch.from_numpy(rows)
        return pixels[index], lambda logits: F.cross_entropy(logits, labels[index])

    return draw


def jittered(pixels: Tensor, labels: Tensor, reach: int = 2) -> Source:
    """Each image moved by up to `reach` pixels each way, zeros come in."""
    padded = F.pad(pixels.view(-1, 28, 28), (reach, reach, reach, reach))
    windows = padded.unfold(1, 28, 1).unfold(2, 28, 1)  # (N, 5, 5, 28, 28), no copy

    def draw(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        index = torch.from_numpy(rows)
        down, across = torch.from_numpy(rng.integers(0, 2 * reach + 1, (2, len(rows))))
        return windows[index, down, across].flatten(1), lambda logits: F.cross_entropy(logits, labels[index])

    return draw


def softened(pixels: Tensor, targets: Tensor, temperature: float, labels: Tensor, hard: float = 0.0) -> Source:
    """targets: the teacher's logits, a row an image. hard: weight of the labels beside them."""

    def draw(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        index = torch.from_numpy(rows)

        def loss(logits: Tensor) -> Tensor:
            soft = soft_target_loss(logits, targets[index], temperature)
            return soft + hard * F.cross_entropy(logits, labels[index]) if hard else soft

        return pixels[index], loss

    return draw


# ---------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Job:
    """Budgets, and where networks are kept. shards: sets of views, each as many as there are images; mix: which share
    of the sets is mixed; cnns: teachers of student_best."""

    digits: Digits
    runs: Path = ROOT / "runs" / "hinton2015_mnist"
    teacher_first: Recipe = field(default_factory=lambda: recipe(60, 0.3))
    teacher: Recipe = field(default_factory=lambda: recipe(300, 0.3))
    hard: Recipe = field(default_factory=lambda: recipe(20, 0.2, batch_size=200))
    soft: Recipe = field(default_factory=lambda: recipe(40, 0.06, batch_size=200))
    grid: Recipe = field(default_factory=lambda: recipe(12, 0.002, optimizer="adamw"))
    cnn: Recipe = field(default_factory=lambda: recipe(20, 0.2, batch_size=250, weight_decay=1e-4))
    best: Recipe = field(default_factory=lambda: recipe(300, 0.004, optimizer="adamw"))
    cnns: int = 4
    shards: int = 40
    mix: float = 0.5
    hard_weight: float = 1.0  # of the labels beside soft targets at T = 20
    starts: tuple[float, ...] = (0.25, 0.5, 0.5)  # of SMALL: shares of He's standard deviation, by layer
    temperature: float = 20.0  # of student_best
    teachers: dict[str, int] = field(default_factory=lambda: {"all": 1, "fit": 1})  # of how many seeds students learn

    def network(self, row: str, seed: int, part: str = "all") -> Net:
        """The network of that row and seed: from runs/ if it is there, else made and kept."""
        folder = self.folder(row, seed, part)
        if not folder.exists():
            began = time.perf_counter()
            checkpoint = folder.with_suffix(".part") / "checkpoint.safetensors"
            made = make(self, row, seed, part, checkpoint)
            ag.save(made, folder, metrics={"seconds": time.perf_counter() - began})
            shutil.rmtree(checkpoint.parent, ignore_errors=True)
        net = ag.load(folder)
        assert isinstance(net, Net)
        return net

    def folder(self, row: str, seed: int, part: str) -> Path:
        return self.runs / part / row / str(seed)

    def seconds(self, row: str, seed: int, part: str = "all") -> float:
        return float(read_config(self.folder(row, seed, part)).metrics["seconds"])


def make(job: Job, row: str, seed: int, part: str, checkpoint: Path) -> Net:
    """Trains the network of a row on "all" or "fit"."""
    pixels, labels = job.digits.part(part)
    if row == "cnn":
        return cnn_teacher(job, seed, part)
    if row in ("teacher_first", "teacher"):
        settings, shape = getattr(job, row), TEACHER
        source = jittered(pixels, labels)
    elif row == "student_hard":
        source, settings, shape = labelled(pixels, labels), job.hard, {"widths": STUDENT}
    elif row == "student_best":
        source, settings, shape = from_shards(job, part), job.best, {"widths": STUDENT}
    else:
        settings, hard = job.soft, job.hard_weight
        width, temperature, kept = STUDENT, 20.0, torch.ones(len(labels), dtype=torch.bool)
        if row in OMITTED:
            classes, out = OMITTED[row]
            kept = torch.isin(labels, torch.tensor([c for c in classes if c not in out]))
        elif row == "student_soft_alone":
            hard = 0.0
        elif row != "student_soft_T20":
            units, temperature, settings, hard = *grid_cell(row), job.grid, 0.0
            width = f"{units}-{units}"
        taught = pixels[kept]
        targets = logits_of(job.network(teacher_of(row), seed % job.teachers[part], part), taught)
        source = softened(taught, targets, temperature, labels[kept], hard)
        pixels, shape = taught, {"widths": width}
    torch.manual_seed(seed)
    net = job.network("teacher_first", seed, part) if row == "teacher" else ag.nets.build("mlp", **shape)
    if row in SMALL:
        shrink(net, job.starts)
    mean = pixels.float().mean(dim=0) / 255 if row in CENTRED else None
    return train(net, source, len(pixels), settings.model_copy(update={"seed": seed}), checkpoint, mean=mean)


def shrink(net: Net, scales: tuple[float, ...]) -> None:
    """Multiplies the linear layers' weights, each layer's by its number, in place."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight.mul_(scale)


def teacher_of(row: str) -> str:
    """Whose student the row is; the grid makes do with the first run of epochs."""
    return "teacher_first" if row.startswith("grid_") else "teacher"


def grid_cell(row: str) -> tuple[int, float]:
    """grid_800_T2.5 -> (800, 2.5)"""
    _, width, temperature = row.split("_")
    return int(width), float(temperature[1:])


GRID = [f"grid_{width}_T{temperature:g}" for width in WIDTHS for temperature in TEMPERATURES]


# ---------------------------------------------------------------- the moonshot


def small_cnn(*, num_classes: int = 10, in_channels: int = 1, input_size: int = 28) -> Net:
    """5x5 conv 32, pool, 3x3 conv 64, 3x3 conv 64, pool, fc 256, fc 10; batch norm and ReLU after each but the last:
    0.65 M parameters, 9.4 M MACs."""
    side = ((input_size - 4) // 2) // 2
    features = named(
        conv1=nn.Conv2d(in_channels, 32, 5, bias=False), bn1=nn.BatchNorm2d(32), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(64), relu2=nn.ReLU(),
        conv3=nn.Conv2d(64, 64, 3, padding=1, bias=False), bn3=nn.BatchNorm2d(64), relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2), flatten=nn.Flatten(),
        fc4=nn.Linear(64 * side * side, 256, bias=False), bn4=nn.BatchNorm1d(256), relu4=nn.ReLU(),
    )  # fmt: skip
    net = Net(features, named(fc=nn.Linear(256, num_classes)))
    initialise(net)
    return net


ag.nets.NETS["small_cnn"] = small_cnn


class OnViews:
    """An objective on changed views of the batch; the loop seeds torch's random state by step."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast("cpu", enabled=False):
            inputs = views(batch.inputs)
        return self.objective(student, batch._replace(inputs=inputs))


def cnn_teacher(job: Job, seed: int, part: str) -> Net:
    torch.manual_seed(seed)
    net, data = ag.nets.build("small_cnn"), job.digits.dataset(part)
    settings = job.cnn.model_copy(update={"seed": seed, "autocast": "bf16"})
    fit(start(net, OnViews(HardLabels()), data, settings), data)
    return net


def ensemble(job: Job, part: str) -> Teacher:
    """Channels-last: a third of the time."""
    nets = [job.network("cnn", seed, part).to(memory_format=torch.channels_last) for seed in range(job.cnns)]
    return Teacher(nets, combine="geometric", autocast="bf16")


def shard(job: Job, part: str, number: int) -> tuple[Tensor, Tensor]:
    """One view of every image, uint8 (N, 784), and the teachers' logits for it (N, 10); made once."""
    path = job.runs / part / f"views_{job.cnns}_mix{job.mix:g}" / f"{number}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = list(_shard(job, part, number))
        pixels, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        with replacing(path) as temp:
            safetensors.torch.save_file({"pixels": pixels, "logits": logits.half()}, temp)
    held = safetensors.torch.load_file(path)
    return held["pixels"], held["logits"].float()


def _shard(job: Job, part: str, number: int, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    generator, teacher = torch.Generator().manual_seed(number), ensemble(job, part)
    mixing = int((number + 1) * job.mix) > int(number * job.mix)
    pixels = job.digits.part(part)[0]
    order = torch.randperm(len(pixels), generator=generator)  # who is mixed with whom
    for rows in order.split(batch):
        seen = views(pixels[rows].float().view(-1, 1, 28, 28), generator)
        seen = mixed(seen, generator) if mixing else seen
        kept = seen.round().clamp(0, 255).to(torch.uint8)
        yield kept.flatten(1), teacher(kept.float().div_(255))


def from_shards(job: Job, part: str) -> Source:
    """Epoch e reads set e, from the first again after the last."""
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def draw(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        number = epoch % job.shards
        if number not in held:
            held.clear()
            held[number] = shard(job, part, number)
        index = torch.from_numpy(rows)
        pixels, targets = (tensor[index] for tensor in held[number])
        return pixels, lambda logits: soft_target_loss(logits, targets, job.temperature)

    return draw


# ---------------------------------------------------------------- what is counted


def errors(logits: Tensor, labels: Tensor, of: int | None = None) -> int:
    """How many are wrong; `of`: among those of that class alone."""
    wrong = logits.argmax(dim=1) != labels
    return int(wrong.sum() if of is None else wrong[labels == of].sum())


def moved(logits: Tensor, classes: tuple[int, ...], shift: float) -> Tensor:
    """Logits as they are with the biases of these classes raised by `shift`."""
    raised = logits.clone()
    raised[:, list(classes)] += shift
    return raised


def best_shift(logits: Tensor, labels: Tensor, classes: tuple[int, ...]) -> float:
    """The shift of SHIFTS with fewest errors; of several the middle one."""
    wrong = np.array([errors(moved(logits, classes, shift), labels) for shift in SHIFTS])
    best = np.flatnonzero(wrong == wrong.min())
    return float(SHIFTS[best[len(best) // 2]].round(1))


def count(job: Job, row: str, seed: int) -> dict[str, float]:
    """{row of the results: value} of one network and those it needs."""
    if row.startswith("grid_"):
        pixels, labels = job.digits.part("val")
        return {row: errors(logits_of(job.network(row, seed, "fit"), pixels), labels)}
    pixels, labels = job.digits.part("test")
    if row == "cnn_ensemble":
        teacher = ensemble(job, "all")
        logits = torch.cat([teacher(part.float().div_(255).view(-1, 1, 28, 28)) for part in pixels.split(1000)])
        return {row: errors(logits, labels)}
    logits = logits_of(job.network(row, seed), pixels)
    found: dict[str, float] = {row: errors(logits, labels)}
    if row in OMITTED:
        val_pixels, val_labels = job.digits.part("val")
        on_val = logits_of(job.network(row, 0, "fit"), val_pixels)
        shifts = {
            "bias_validation": best_shift(on_val, val_labels, SHIFTED[row]),
            "bias_test": best_shift(logits, labels, SHIFTED[row]),
        }
        for name, shift in shifts.items():
            found |= {f"{row}_{name}": errors(moved(logits, SHIFTED[row], shift), labels)}
            found |= {f"{row}_{name}_shift": shift}
        if row == "no_threes":
            found |= {"no_threes_on_3s": errors(logits, labels, of=3)}
            for name, shift in shifts.items():
                found |= {f"no_threes_{name}_on_3s": errors(moved(logits, (3,), shift), labels, of=3)}
    return found


# ---------------------------------------------------------------- the runs

ROWS = (
    "teacher_first",
    "teacher",
    "student_hard",
    "student_soft_T20",
    "student_soft_alone",
    "no_threes",
    "only_7_8",
    "cnn",
    "cnn_ensemble",
    "student_best",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="which, 0 1 2 3 4 by default")
    parser.add_argument("--only", nargs="+", choices=(*ROWS, "grid"), default=[*ROWS, "grid"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    job = Job(Digits.mnist())
    for row in options.only:
        for name in GRID if row == "grid" else [row]:
            for seed in [0] if row == "cnn_ensemble" else options.seeds:
                learn(job, name, seed)
    print(hinton2015())


def learn(job: Job, row: str, seed: int, *, path: Path = RESULTS) -> None:
    """Puts one seed of a row into the results, if it is not there; the row itself last: then it counts as there."""
    if seed in held_seeds(path, row):
        return
    found = count(job, row, seed)
    part = "fit" if row.startswith("grid_") else "all"
    seconds = 0.0 if row == "cnn_ensemble" else job.seconds(row, seed, part)
    print(row, f"seed {seed}:", *(f"{name} {value:g}" for name, value in found.items()), f"{seconds:.0f} s", flush=True)
    for name in reversed(found):
        unit = "logits" if name.endswith("_shift") else "validation errors" if part == "fit" else "errors"
        add(
            path, name, seed, found[name], unit=unit, command="python reproduce/hinton2015_mnist.py",
            hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=seconds, paper=PAPER.get(name),
        )  # fmt: skip


if __name__ == "__main__":
    main()
