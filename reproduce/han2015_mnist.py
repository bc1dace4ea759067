"""Learning both weights and connections (Han, Pool, Tran, Dally 2015, arXiv:1506.02626): LeNet-300-100 and Caffe's
LeNet-5 on MNIST. Writes results/han2015_mnist.json; a seed that is there already is not run again, and every network is
kept in runs/, so that a stopped run goes on.

    AEROGEL_DATA=... python reproduce/han2015_mnist.py [--net lenet5] [--seeds 5] [--only STAGE ...]

dense      trained with L2, no augmentation: the paper's reference
12x        pruned by magnitude to the paper's shares of every layer, in rounds, retrained: Table 1, Tables 3 and 4
tradeoff   accuracy against the weights kept: L1 or L2, with and without retraining, one-shot and iterative: figure 5
sensitivity   one layer pruned, the others whole: figure 6
ladder     how far it goes: a teacher on distorted copies of the training images, one ranking of all weights, rung by
           rung, each from the one before
One thread. 55,000 images train, 5,000 validate: every choice below was made on those with seed 0, the best rung by the
mean of all seeds there. The test images are looked at once a row and seed. "kept" counts weights, biases are neither
pruned nor counted.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from results import add, held_seeds
from torch import Tensor, nn

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.data import Batch, Dataset, Split
from aerogel.distill import soft_target_loss
from aerogel.export import read_config
from aerogel.prune import SCHEDULES, cut_points
from aerogel.prune.masks import Masks
from aerogel.prune.weights.along import pruned_along
from aerogel.train import HardLabels, Objective, Recipe, accuracy, start, steps
from aerogel.train.steps import lay_out

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproduce" / "results" / "han2015_mnist.json"
COPIES = 12  # of every training image for the teacher's pupils: itself, and distorted


@dataclass(frozen=True)
class Job:
    """One network. kept: the paper's share of each layer. paper: its errors, whole and pruned."""

    name: str
    kept: Mapping[str, float]
    paper: tuple[float, float]
    epochs: float  # of the dense network
    round: float  # of every round of pruning but the last, which has twice as many
    rungs: tuple[int, ...]  # weights over weights kept
    rung: float  # epochs of every rung
    recipe: Recipe
    taught: Recipe
    runs: Path = ROOT / "runs" / "han2015_mnist"
    given: Dataset | None = field(default=None, compare=False)
    copies: int = COPIES

    @cached_property
    def dataset(self) -> Dataset:
        return self.given or ag.data.load("mnist")

    def network(self, stage: str, seed: int) -> nn.Module:
        """The network of that stage and seed: from runs/ if it is there, else made and kept."""
        folder = self.runs / self.name / f"{stage}_{seed}"
        if not folder.exists():
            began = time.perf_counter()
            made = MAKE[stage.partition("_")[0]](self, stage, seed)
            ag.save(made, folder, metrics={"seconds": time.perf_counter() - began})
        return ag.load(folder)

    def seconds(self, stage: str, seed: int) -> float:
        return float(read_config(self.runs / self.name / f"{stage}_{seed}").metrics["seconds"])


# ---------------------------------------------------------------- the paper's networks


def dense(job: Job, stage: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained(job, ag.nets.build(job.name), HardLabels(), job.recipe, job.epochs, seed)


def twelve(job: Job, stage: str, seed: int) -> nn.Module:
    """Pruned in rounds to the paper's shares, each layer by its own threshold, at a tenth of the rate."""
    net, rounds = job.network("dense", seed), 4
    recipe = job.recipe.model_copy(update={"lr": job.recipe.lr / 10, "warmup": 0.0})
    for k in range(1, rounds + 1):
        shares = {layer: 1 - kept ** (k / rounds) for layer, kept in job.kept.items()}
        epochs = job.round * (2 if k == rounds else 1)
        net = trained(job, net, HardLabels(), recipe, epochs, seed, {0: 0.0}, ratios=shares)
    return net


def trained(
    job: Job, net: nn.Module, objective: Objective, recipe: Recipe, epochs: float, seed: int,
    plan: Mapping[int, float] | None = None, data: Dataset | None = None, **choice: Any,
) -> nn.Module:  # fmt: skip
    """By the library's loop; `plan` says after which steps it is pruned how far."""
    data = data or job.dataset
    state = start(net, objective, data, recipe.model_copy(update={"epochs": epochs, "seed": seed}))
    made = steps(state, data) if plan is None else pruned_along(state, data, plan, **choice)
    for step in made:
        if step.number % 1000 == 0:
            losses = " ".join(f"{name} {loss:.4f}" for name, loss in step.losses.items())
            print(f"    {job.name} seed {seed} epoch {step.epoch:.2f} {losses}", flush=True)
    lay_out(state.result, torch.contiguous_format)
    return state.result.eval()


def kept_of(net: nn.Module) -> tuple[int, int]:
    """(weights that are not zero, weights)."""
    masks = Masks.of(net)
    return masks.survivors, masks.weights


# ---------------------------------------------------------------- the runs


def learn(job: Job, row: str, stage: str, seed: int, *, paper: float | None = None, path: Path = RESULTS) -> None:
    """Puts the test error of one network into the results, with what is left of it."""
    net = job.network(stage, seed)
    survivors, weights = kept_of(net)
    more = {"ratio": weights / survivors, "kept": survivors, "val": 100 - accuracy(net, job.dataset, "val")}
    error = 100 - accuracy(net, job.dataset, "test")
    print(f"{row} seed {seed}: {error:.2f} % error, validation {more['val']:.2f}, x{more['ratio']:.1f}", flush=True)
    add(
        path, row, seed, error, unit="% error", paper=paper, more=more, seconds=job.seconds(stage, seed),
        command=f"python reproduce/han2015_mnist.py --net {job.name}", hardware=f"{cpu_name()}, {os.cpu_count()} cores",
    )  # fmt: skip


def paper_rows(job: Job, seed: int) -> None:
    for row, stage, error in ((f"{job.name}_dense", "dense", job.paper[0]), (f"{job.name}_12x", "12x", job.paper[1])):
        if seed not in held_seeds(RESULTS, row):
            learn(job, row, stage, seed, paper=error)


MAKE: dict[str, Callable[[Job, str, int], nn.Module]] = {"dense": dense, "12x": twelve}
PLAIN = Recipe(batch_size=128, lr=0.05, weight_decay=5e-4, augment="none")
JOBS = {
    job.name: job
    for job in (
        Job(
            "lenet_300_100", {"features.fc1": 0.08, "features.fc2": 0.09, "classifier.fc": 0.26}, (1.64, 1.59),
            epochs=25, round=8, rungs=(12, 25, 40, 60, 80, 100), rung=15, recipe=PLAIN, taught=PLAIN,
        ),
        Job(
            "lenet5",
            {"features.conv1": 0.66, "features.conv2": 0.12, "classifier.ip1": 0.08, "classifier.ip2": 0.19},
            (0.80, 0.77), epochs=8, round=2, rungs=(12, 40, 120, 200, 300, 400), rung=6,
            recipe=PLAIN.model_copy(update={"autocast": "bf16"}), taught=PLAIN,
        ),
    )
}  # fmt: skip
STAGES: dict[str, Callable[[Job, int], None]] = {"paper": paper_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=JOBS, default="lenet_300_100")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--only", nargs="+", choices=STAGES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for stage in options.only or STAGES:
        for seed in range(options.first, options.first + options.seeds):
            STAGES[stage](JOBS[options.net], seed)


if __name__ == "__main__":
    main()
