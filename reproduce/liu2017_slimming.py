"""Network slimming (Liu et al. 2017, arXiv:1708.06519): one threshold over all batch-norm scales, beside uniform L1
pruning to the same size and the small network trained from scratch ("Rethinking the value of network pruning", Liu et
al. 2019, arXiv:1810.05270). Writes results/liu2017_slimming.json; a seed that is there already is not run again, and
every network is kept in runs/, so that a stopped run goes on.

    AEROGEL_DATA=... python reproduce/liu2017_slimming.py [--seeds 3] [--job fashion_vgg11] [--only ROW ...]
    AEROGEL_DATA=... python reproduce/liu2017_slimming.py --tune --job fashion_vgg11   # lambda and share, on validation

One recipe for every training of a job, the paper's where a CPU allows: Nesterov SGD from rate 0.1, weight decay 1e-4,
every gamma from 0.5; but 2 to 4 epochs instead of 160 (so a cosine instead of two steps, and a larger lambda, since a
gamma can move by no more than lambda * sum(rates) / (1 - momentum)), batches of 128 and bf16 in the forward pass.
lambda and the share of channels of fashion_vgg11 were chosen on the validation images with seed 0, those of the cifar_
jobs not at all: the paper's shares of parameters, and a lambda that carries gamma as far as the paper's does in its
ResNets. The test images are looked at once a row and seed. One thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from results import add, held_seeds
from tables import slimming
from torch import nn

import aerogel as ag
from aerogel.cost import Cost
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset
from aerogel.export import read_config
from aerogel.nets.blocks import initialise
from aerogel.prune import cut
from aerogel.prune.slimming import Slimming, set_scales, slim
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproduce" / "results" / "liu2017_slimming.json"
GOALS = {"params": 0.2, "macs": 0.5}  # of the unpruned network, at most
PAPER_ROWS = ("unpruned", "sparse", "slimmed", "tuned")


@dataclass(frozen=True)
class Job:
    """One network on one data set. penalty: lambda; keep: the share of its channels (or other `metric`) that stays."""

    name: str
    net: str
    data: str
    epochs: float
    penalty: float
    keep: float
    metric: str = "channels"
    rows: tuple[str, ...] = PAPER_ROWS
    penalties: tuple[float, ...] = ()  # what --tune tries
    shares: tuple[float, ...] = ()
    runs: Path = ROOT / "runs" / "liu2017_slimming"
    given: Dataset | None = field(default=None, compare=False)

    @cached_property
    def dataset(self) -> Dataset:
        return self.given or ag.data.load(self.data)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(epochs=self.epochs, lr=0.1, weight_decay=1e-4, autocast="bf16")

    @property
    def example(self) -> tuple[torch.Tensor]:
        return (torch.zeros(1, *self.dataset.input_shape),)

    def cost(self, net: nn.Module) -> Cost:
        return ag.cost.count(ag.capture(net, self.example))

    def network(self, row: str, seed: int) -> nn.Module:
        """The network of that row and seed: from runs/ if it is there, else made and kept."""
        folder = self.folder(row, seed)
        if not folder.exists():
            began = time.perf_counter()
            made = ROWS[row](self, seed)
            ag.save(made, folder, metrics={"seconds": time.perf_counter() - began})
        return ag.load(folder)

    def folder(self, row: str, seed: int) -> Path:
        return self.runs / self.name / "_".join([row, *self.depends_on(row), str(seed)])

    def depends_on(self, row: str) -> list[str]:
        """What of the job's choices a row's network comes from, for its folder's name."""
        if row.startswith("unpruned"):
            return []
        metric = "" if self.metric == "channels" else self.metric
        return [f"{self.penalty:g}"] if row == "sparse" else [f"{self.penalty:g}", f"{metric}{self.keep:g}"]


# ---------------------------------------------------------------- the networks


def fresh(job: Job, seed: int) -> nn.Module:
    """The network as it starts: every gamma at 0.5, as in the paper."""
    torch.manual_seed(seed)
    net, arguments = ag.nets.parse(job.net)
    channels, side, _ = job.dataset.input_shape
    built = ag.nets.build(net, **arguments, num_classes=job.dataset.num_classes, in_channels=channels, input_size=side)
    set_scales(built)
    return built


def forgotten(net: nn.Module, seed: int) -> nn.Module:
    """The same shapes with weights as `fresh` has them."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    initialise(net)
    set_scales(net)
    return net


def trained(job: Job, net: nn.Module, seed: int, *, penalty: float = 0.0, longer: float = 1.0) -> nn.Module:
    """The job's recipe, `longer` times its epochs."""
    objective = Slimming(HardLabels(), penalty) if penalty else HardLabels()
    recipe = job.recipe.model_copy(update={"seed": seed, "epochs": longer * job.epochs})
    return fit(start(net, objective, job.dataset, recipe), job.dataset)


def unpruned(job: Job, seed: int) -> nn.Module:
    return trained(job, fresh(job, seed), seed)


def unpruned_twice(job: Job, seed: int) -> nn.Module:
    """As many epochs as the slimmed network has behind it when it is fine-tuned."""
    return trained(job, fresh(job, seed), seed, longer=2)


def sparse(job: Job, seed: int) -> nn.Module:
    return trained(job, fresh(job, seed), seed, penalty=job.penalty)


def slimmed(job: Job, seed: int) -> nn.Module:
    return slim(job.network("sparse", seed), job.example, target={job.metric: job.keep}).model


def tuned(job: Job, seed: int) -> nn.Module:
    return trained(job, job.network("slimmed", seed), seed)


def uniform(metric: str) -> Callable[[Job, int], nn.Module]:
    """Every layer of the unpruned network loses the same share, its filters of least L1 norm, to equal `metric`."""

    def make(job: Job, seed: int) -> nn.Module:
        net = job.network("unpruned", seed)
        share = share_left(job, seed, metric)
        made = cut(net, job.example, target={metric: share}, criterion="l1", ranking="local")
        return trained(job, made.model, seed)

    return make


def scratch_e(job: Job, seed: int) -> nn.Module:
    return trained(job, forgotten(job.network("slimmed", seed), seed), seed)


def scratch_b(job: Job, seed: int) -> nn.Module:
    """Epochs for the compute of the unpruned network's training, at most twice as many, as in the paper."""
    longer = min(2.0, 1 / share_left(job, seed, "macs"))
    return trained(job, forgotten(job.network("slimmed", seed), seed), seed, longer=longer)


def share_left(job: Job, seed: int, metric: str) -> float:
    small, whole = job.cost(job.network("slimmed", seed)), job.cost(job.network("unpruned", seed))
    return getattr(small, metric) / getattr(whole, metric)


ROWS: dict[str, Callable[[Job, int], nn.Module]] = {
    "unpruned": unpruned,
    "sparse": sparse,
    "slimmed": slimmed,
    "tuned": tuned,
    "uniform_macs": uniform("macs"),
    "uniform_params": uniform("params"),
    "scratch_e": scratch_e,
    "scratch_b": scratch_b,
    "unpruned_twice": unpruned_twice,
}
JOBS = {
    job.name: job
    for job in (
        Job("fashion_vgg11", "vgg11:width=0.25", "fashion_mnist", epochs=4, penalty=1e-3, keep=0.45,
            rows=tuple(ROWS), penalties=(1e-3, 2e-3), shares=(0.45, 0.5)),
        # the paper's shares of parameters: 88.5, 35.2 and 35.7 % removed
        Job("cifar_vgg19", "vgg19:width=0.25", "cifar10", epochs=2, penalty=2e-3, keep=0.115, metric="params"),
        Job("cifar_resnet29", "resnet29:width=0.5", "cifar10", epochs=2, penalty=2e-3, keep=0.648, metric="params"),
        Job("cifar_densenet40", "densenet40:growth=4", "cifar10", epochs=2, penalty=2e-3, keep=0.643, metric="params"),
    )
}  # fmt: skip


# ---------------------------------------------------------------- the runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--job", choices=JOBS, default="fashion_vgg11")
    parser.add_argument("--only", nargs="+", choices=ROWS)
    parser.add_argument("--tune", action="store_true", help="lambda and the share of channels, on validation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    job = JOBS[options.job]
    if options.tune:
        tune(job)
        return
    for seed in range(options.seeds):
        for row in options.only or job.rows:
            if seed not in held_seeds(RESULTS, f"{job.name}_{row}_top1"):
                learn(job, row, seed)
    print(slimming())


def learn(job: Job, row: str, seed: int, *, path: Path = RESULTS) -> None:
    """Makes the network of one row; its accuracy is put into the results last: then the seed counts as there."""
    net = job.network(row, seed)
    cost = job.cost(net)
    held = {
        "params": (float(cost.params), "parameters"),
        "macs": (float(cost.macs), "MACs"),
        "val": (accuracy(net, job.dataset, "val"), "%"),
        "top1": (accuracy(net, job.dataset, "test"), "%"),
    }
    seconds = read_config(job.folder(row, seed)).metrics["seconds"]
    record(f"{job.name}_{row}", seed, held, path=path, seconds=seconds, option=f" --job {job.name}")


def tune(job: Job, seed: int = 0, *, path: Path = RESULTS) -> None:
    """What every lambda and share of channels leaves, by the validation images; fine-tunes where the goals are met."""
    for share, penalty in itertools.product(job.shares, job.penalties):
        tried = dataclasses.replace(job, penalty=penalty, keep=share, given=job.dataset)
        began = time.perf_counter()
        net = tried.network("slimmed", seed)
        held = {metric: (share_left(tried, seed, metric), "of unpruned") for metric in GOALS}
        held["sparse_val"] = (accuracy(tried.network("sparse", seed), job.dataset, "val"), "%")
        held["slimmed_val"] = (accuracy(net, job.dataset, "val"), "%")
        if all(held[metric][0] <= goal for metric, goal in GOALS.items()):
            held["tuned_val"] = (accuracy(tried.network("tuned", seed), job.dataset, "val"), "%")
        name = f"{job.name}_lambda={penalty:g}_channels={share:g}"
        record(name, seed, held, path=path, seconds=time.perf_counter() - began, option=f" --job {job.name} --tune")


def record(
    name: str, seed: int, held: dict[str, tuple[float, str]], *, path: Path, seconds: float, option: str = ""
) -> None:
    """Puts {row: (value, unit)} of one network and seed into the results."""
    shown = (f"{row} {value:.6g}" for row, (value, _) in held.items())
    print(name, f"seed {seed}:", *shown, f"{seconds:.0f} s", flush=True)
    for row, (value, unit) in held.items():
        add(
            path, f"{name}_{row}", seed, value, unit=unit, command=f"python reproduce/liu2017_slimming.py{option}",
            hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=seconds,
        )  # fmt: skip


if __name__ == "__main__":
    main()
