"""Learning both weights and connections (Han, Pool, Tran, Dally 2015, arXiv:1506.02626): LeNet-300-100 and Caffe's
LeNet-5 on MNIST, and a quarter as wide an AlexNet on Fashion-MNIST. Writes results/han2015_mnist.json; a seed that is
there already is not run again, and every network is kept in runs/, so that a stopped run goes on.

    AEROGEL_DATA=... python reproduce/han2015_mnist.py [--net lenet5] [--seeds 5] [--only STAGE ...]

dense      trained with L2, no augmentation: the paper's reference
12x        pruned by magnitude to the paper's shares of every layer, in rounds, retrained: Table 1, Tables 3 and 4;
           9x for AlexNet, whose dropout shrinks as the layer before it does (section 3.2)
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
import copy
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from fast_mlp import keep_memory
from han2015_lessons import Lessons
from PIL import Image
from results import add, held_seeds, rows
from torch import Tensor, nn

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset, batch_count
from aerogel.errors import AerogelError
from aerogel.export import read_config
from aerogel.files import write_json
from aerogel.prune import cut_points
from aerogel.prune.dropout import dropout_rates, set_dropout
from aerogel.prune.l1 import L1
from aerogel.prune.masks import Masks, prunable
from aerogel.prune.neurons import bury, without_dead
from aerogel.prune.weight_sensitivity import SHARES, weight_sensitivity
from aerogel.prune.weights import lowest
from aerogel.prune.weights.along import pruned_along
from aerogel.prune.weights.along import sizes as magnitudes
from aerogel.sparse import fewest_bits, iid_bits
from aerogel.train import HardLabels, Objective, Recipe, accuracy, start, steps
from aerogel.train.steps import lay_out

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproduce" / "results" / "han2015_mnist.json"
PICTURE = ROOT / "docs" / "han2015_first_layer.png"
COPIES = 8  # of every training image for the teacher's pupils: itself, and distorted
LARGE, SMALL = 4.0, 2.0  # temperatures, up to the rung PLAINER and after it
PLAINER = 12  # the rung after which half of what is learnt from is not distorted
PRUNINGS = 20  # in the first half of a rung
BIAS_BITS = (4, 6, 8)
MAX_DROP = 0.06  # points on validation, that is 3 images, which shared values may cost
EXAMPLE = (torch.zeros(1, 1, 28, 28),)


@dataclass(frozen=True)
class Job:
    """One network. kept: the paper's share of each layer. paper: its errors, whole and pruned, on the same data."""

    name: str
    kept: Mapping[str, float]
    paper: tuple[float | None, float | None]
    epochs: float  # of the dense network
    round: float  # of every round of pruning but the last, which has three times as many
    rungs: tuple[int, ...]  # weights over weights kept
    rung: float  # epochs of every rung
    recipe: Recipe
    taught: Recipe
    runs: Path = ROOT / "runs" / "han2015_mnist"
    given: Dataset | None = field(default=None, compare=False)
    school: float = 15  # epochs of the ladder's dense network
    copies: int = COPIES
    teacher: float = 10  # epochs
    choice: Mapping[str, Any] = field(default_factory=dict)  # of `lowest`
    times: int = 12  # weights over weights kept, as the paper has it, rounded
    data: str = "mnist"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def dataset(self) -> Dataset:
        return self.given or ag.data.load(self.data)

    def build(self) -> nn.Module:
        return ag.nets.build(self.name, **self.arguments)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Weights of every layer of the whole network, without biases."""
        return {name: weight.numel() for name, weight in prunable(self.build()).items()}

    @property
    def weights(self) -> int:
        return sum(self.sizes.values())

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
    return trained(job, job.build(), HardLabels(), job.recipe, job.epochs, seed)


def twelve(job: Job, stage: str, seed: int) -> nn.Module:
    """Pruned in rounds to the paper's shares, each layer by its own threshold, at the dense network's rate again.

    The paper retrains at a tenth of it; with so few epochs that is worse on validation (seed 0: 1.94 and 2.16 %).
    """
    whole, rounds = job.network("dense", seed), 4
    net, recipe = copy.deepcopy(whole), job.recipe.model_copy(update={"warmup": 0.0})
    for k in range(1, rounds + 1):
        held = Masks.of(net)
        shares = {layer: 1 - kept ** (k / rounds) for layer, kept in job.kept.items()}
        masks = lowest(magnitudes(net, held), 0.0, ratios=shares, before=held)
        masks.hold(net)
        set_dropout(net, {name: then for name, (_, then) in dropout_rates(whole, masks).items()})
        net = trained(job, net, HardLabels(), recipe, job.round * (3 if k == rounds else 1), seed, {})
    set_dropout(net, {name: rate for name, (rate, _) in dropout_rates(whole, Masks.of(net)).items()})  # as it is built
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


# ---------------------------------------------------------------- the ladder


@cache
def lessons(job_name: str) -> Lessons:
    """The teacher is trained once, for all networks and seeds."""
    job, seed = JOBS[job_name], 1000

    def teach(net: nn.Module, objective: Objective, data: Dataset) -> nn.Module:
        recipe = PLAIN.model_copy(update={"autocast": "bf16", "batch_size": 128})
        net = trained(job, net, objective, recipe, job.teacher / job.copies, seed, data=data)
        print(f"teacher: validation {100 - accuracy(net, job.dataset, 'val'):.2f} % error", flush=True)
        return net

    torch.manual_seed(seed)
    return Lessons(job.dataset, job.copies, job.runs / f"teacher_{job.copies}.safetensors", teach)


def ladder(job: Job, stage: str, seed: int) -> nn.Module:
    """Rung 1 is dense; every other one starts from the one before and is pruned over the first half of its training.

    Dead neurons are taken out of the network, so that the next rung trains a smaller one.
    """
    rung, school = int(stage.partition("_")[2]), lessons(job.name)
    if rung == 1:
        torch.manual_seed(seed)
        epochs = job.school / job.copies
        return trained(job, job.build(), school.soft(LARGE), job.taught, epochs, seed, data=school.data)
    before = ([1, *job.rungs])[job.rungs.index(rung)]
    objective, data = (school.soft(SMALL), school.plainer) if rung > PLAINER else (school.soft(LARGE), school.data)
    net, whole, epochs = job.network(f"ladder_{before}", seed), job.weights, job.rung / job.copies
    total = round(epochs * batch_count(len(data.train), job.taught.batch_size))
    held = Masks.of(net)
    shares = {step: held.weights - whole * kept for step, kept in ramp(1 / before, 1 / rung, total).items()}
    plan = {step: max(gone, 0) / held.weights for step, gone in shares.items()}
    net = trained(job, net, objective, job.taught, epochs, seed, plan, data, **job.choice)
    _, dead = bury(net, EXAMPLE)
    return without_dead(net, EXAMPLE).model if dead else net


def ramp(now: float, then: float, total: int) -> dict[int, float]:
    """{step: share to keep}: Zhu and Gupta's cubic from one share to another, over the first half of the steps."""
    points = cut_points(total, PRUNINGS, 0.5)
    return {point: then + (now - then) * (1 - k / len(points)) ** 3 for k, point in enumerate(points, start=1)}


# ---------------------------------------------------------------- the runs


def learn(job: Job, row: str, stage: str, seed: int, paper: float | None = None) -> None:
    """Puts the test error of one network into the results, with what is left of it."""
    net = job.network(stage, seed)
    left = {name: kept for name, (kept, _) in Masks.of(net).counts().items()}
    survivors = sum(left.values())
    more = {"ratio": job.weights / survivors, "kept": survivors, "val": 100 - accuracy(net, job.dataset, "val")}
    for kind, dims in (("conv", 4), ("fc", 2)):
        names = [name for name, weight in prunable(net).items() if weight.ndim == dims]
        if names and len(names) < len(left):
            more[f"{kind}_ratio"] = sum(job.sizes[name] for name in names) / sum(left[name] for name in names)
    more |= stored(job, net) if survivors < job.weights else {}
    error = 100 - accuracy(net, job.dataset, "test")
    print(f"{row} seed {seed}: {error:.2f} % error, validation {more['val']:.2f}, x{more['ratio']:.1f}", flush=True)
    add(
        RESULTS, row, seed, error, unit="% error", paper=paper, more=more, seconds=job.seconds(stage, seed),
        command=f"python reproduce/han2015_mnist.py --net {job.name}", hardware=f"{cpu_name()}, {os.cpu_count()} cores",
    )  # fmt: skip


def stored(job: Job, net: nn.Module) -> dict[str, float]:
    """What its file takes: lossless, and with the fewest bits a weight and a bias that validation lets pass, which also
    cost accuracy on test; and the bound of an entropy coder that knows how often each value comes, but no order."""
    found = {"bytes_lossless": _bytes_of(net)}
    tried = []
    for bias_bits in BIAS_BITS:
        shared = copy.deepcopy(net)
        try:
            with torch.no_grad():
                chosen = fewest_bits(shared, lambda one: accuracy(one, job.dataset, "val"), MAX_DROP, vectors=bias_bits)
        except AerogelError:  # no number of bits passes with so few for biases
            if bias_bits == BIAS_BITS[-1]:
                raise
            continue
        tried.append((_bytes_of(shared), chosen.bits, bias_bits, shared))
    size, bits, bias_bits, net = min(tried, key=lambda one: one[0])
    bound = sum(iid_bits(tensor) for tensor in net.state_dict().values()) / 8
    error = 100 - accuracy(net, job.dataset, "test")
    more = {"bytes": size, "bytes_bound": bound, "bits": bits, "bias_bits": bias_bits, "file_error": error}
    return found | more


def _bytes_of(net: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return (ag.save(net, Path(folder) / "it", sparse=True) / "model.safetensors").stat().st_size


def paper_rows(job: Job, seed: int) -> None:
    for stage, error in zip(("dense", f"{job.times}x"), job.paper, strict=True):
        row = f"{job.name}_{stage}"
        if seed not in held_seeds(RESULTS, row):
            learn(job, row, stage, seed, paper=error)


# ---------------------------------------------------------------- figures 5 and 6

DENSITIES = (0.3, 0.12, 0.08, 0.05, 0.03)
AGAIN = 3  # epochs of every retraining of figure 5


def l1(job: Job, stage: str, seed: int) -> nn.Module:
    """Dense, with L1 instead of L2."""
    torch.manual_seed(seed)
    recipe = job.recipe.model_copy(update={"weight_decay": 0.0})
    return trained(job, job.build(), L1(HardLabels(), L1_PENALTY), recipe, job.epochs, seed)


def tradeoff_rows(job: Job, seed: int) -> None:
    """Weights go by |w| / std of their layer, so that one quality serves all layers."""
    last = f"{job.name}_tradeoff_l1_iterative_{DENSITIES[-1]}"
    if seed in held_seeds(RESULTS, last):
        return
    for norm, stage in (("l2", "dense"), ("l1", "l1")):
        whole = job.network(stage, seed)
        chain = whole
        for density in DENSITIES:
            once = copy.deepcopy(whole)
            lowest(in_stds(once), 1 - density).hold(once)
            tell(job, f"{norm}_none_{density}", seed, once)
            tell(job, f"{norm}_once_{density}", seed, retrained(job, once, norm, seed))
            chain = copy.deepcopy(chain)
            lowest(in_stds(chain), 1 - density, before=Masks.of(chain)).hold(chain)
            chain = retrained(job, chain, norm, seed)
            tell(job, f"{norm}_iterative_{density}", seed, chain)


def in_stds(net: nn.Module) -> dict[str, Tensor]:
    """|w| over the standard deviation of its layer's weights: the quality at which it goes."""
    return {name: w.detach().abs() / w.detach()[w != 0].std() for name, w in prunable(net).items()}


def retrained(job: Job, net: nn.Module, norm: str, seed: int) -> nn.Module:
    """A few epochs at a tenth of the rate, with the norm that it was trained with."""
    decay = job.recipe.weight_decay if norm == "l2" else 0.0
    objective = HardLabels() if norm == "l2" else L1(HardLabels(), L1_PENALTY)
    recipe = job.recipe.model_copy(update={"lr": job.recipe.lr / 10, "warmup": 0.0, "weight_decay": decay})
    return trained(job, copy.deepcopy(net), objective, recipe, AGAIN, seed, {})


def tell(job: Job, row: str, seed: int, net: nn.Module) -> None:
    error = 100 - accuracy(net, job.dataset, "test")
    print(f"{row} seed {seed}: {error:.2f} % error", flush=True)
    add(
        RESULTS, f"{job.name}_tradeoff_{row}", seed, error, unit="% error", seconds=0.0,
        command=f"python reproduce/han2015_mnist.py --net {job.name} --only tradeoff",
        hardware=f"{cpu_name()}, {os.cpu_count()} cores",
    )  # fmt: skip


def sensitivity_rows(job: Job, seed: int) -> None:
    """Validation errors, one layer pruned, the others whole and nothing retrained."""
    last = f"{job.name}_sensitivity_{list(job.kept)[-1]}"
    if seed in held_seeds(RESULTS, last):
        return
    began = time.perf_counter()
    found = weight_sensitivity(job.network("dense", seed), lambda net: 100 - accuracy(net, job.dataset, "val"))
    for layer in job.kept:
        curve = found[f"{layer}.weight"].values
        more = {f"at_{share:g}": value for share, value in zip(SHARES, curve, strict=True)}
        add(
            RESULTS, f"{job.name}_sensitivity_{layer}", seed, sum(curve) / len(curve), unit="% validation error, mean",
            more=more, command=f"python reproduce/han2015_mnist.py --net {job.name} --only sensitivity",
            hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=time.perf_counter() - began,
        )  # fmt: skip


def picture(job: Job, seed: int) -> None:
    """docs/han2015_first_layer.png: how many weights each pixel kept in the first layer at 12x, all seeds so far."""
    if job.name != "lenet_300_100":
        return
    nets = [ag.load(path) for path in sorted((job.runs / job.name).glob("12x_*"))]
    counts = torch.stack([(net.features.fc1.weight != 0).sum(0).view(28, 28) for net in nets]).float().mean(0)
    shade = (255 * counts / counts.max()).to(torch.uint8).numpy()
    Image.fromarray(255 - shade).resize((280, 280), Image.Resampling.NEAREST).save(PICTURE)


def ladder_rows(job: Job, seed: int) -> None:
    for rung in (1, *job.rungs):
        if seed not in held_seeds(RESULTS, f"{job.name}_ladder_{rung}x"):
            learn(job, f"{job.name}_ladder_{rung}x", f"ladder_{rung}", seed)


def files(job: Job, seed: int) -> None:
    """Looks at every pruned network again, after the coding of files has changed."""
    stages = [f"{job.times}x", *(f"ladder_{rung}" for rung in job.rungs)]
    for stage in stages:
        row = f"{job.name}_{stage}{'x' if '_' in stage else ''}"
        if seed in held_seeds(RESULTS, row):
            learn(job, row, stage, seed)


def best(job: Job, seed: int) -> None:
    """The row NET_best: of the rungs whose validation error, mean over seeds, is at most the dense network's (the
    paper's training) on the same seeds, the highest."""
    held = {row["row"]: row for row in rows(RESULTS)}
    whole, found = held.get(f"{job.name}_dense"), None
    for rung in job.rungs:
        row = held.get(f"{job.name}_ladder_{rung}x")
        if whole and row and row["seeds"] == whole["seeds"] and row["val"] <= whole["val"]:
            found = row
    if found is not None:
        chosen = found | {"row": f"{job.name}_best", "rung": found["row"]}
        write_json(RESULTS, [row for row in held.values() if row["row"] != chosen["row"]] + [chosen])


MAKE: dict[str, Callable[[Job, str, int], nn.Module]] = {
    "dense": dense, "12x": twelve, "9x": twelve, "ladder": ladder, "l1": l1,
}  # fmt: skip
L1_PENALTY = 2e-5
PLAIN = Recipe(batch_size=256, lr=0.1, weight_decay=5e-4, augment="none")
TAUGHT = Recipe(batch_size=256, lr=0.1, weight_decay=1e-4, augment="none")
LENET5 = {"autocast": "bf16", "lr": 0.05}
ALEXNET = {"autocast": "bf16", "optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}  # its start is slow for SGD
JOBS = {
    job.name: job
    for job in (
        Job(
            "lenet_300_100", {"features.fc1": 0.08, "features.fc2": 0.09, "classifier.fc": 0.26}, (1.64, 1.59),
            epochs=15, round=3, rungs=(12, 40, 60, 80, 100), rung=24, recipe=PLAIN, taught=TAUGHT,
        ),
        Job(
            "lenet5",
            {"features.conv1": 0.66, "features.conv2": 0.12, "classifier.ip1": 0.08, "classifier.ip2": 0.19},
            (0.80, 0.77), epochs=8, round=2, rungs=(40, 120, 250, 400), rung=8, school=8,
            recipe=PLAIN.model_copy(update=LENET5), taught=TAUGHT.model_copy(update=LENET5),
        ),
        Job(
            "alexnet",
            {f"features.conv{n}.conv": kept for n, kept in enumerate((0.84, 0.38, 0.35, 0.37, 0.37), start=1)}
            | {"classifier.fc6": 0.08, "classifier.fc7": 0.08, "classifier.fc8": 0.25},
            (None, None), epochs=8, round=2, rungs=(), rung=0, recipe=PLAIN.model_copy(update=ALEXNET), taught=TAUGHT,
            times=9, data="fashion_mnist",
            arguments={"width": 0.25, "lrn": False, "num_classes": 10, "in_channels": 1, "input_size": 28},
        ),
    )
}  # fmt: skip
STAGES: dict[str, Callable[[Job, int], None]] = {
    "teacher": lambda job, seed: None if seed else print(len(lessons(job.name).logits)),
    "paper": paper_rows,
    "ladder": ladder_rows,
    "files": files,
    "best": best,
    "sensitivity": sensitivity_rows,
    "tradeoff": tradeoff_rows,
    "picture": picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=JOBS, default="lenet_300_100")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--only", nargs="+", choices=STAGES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    for stage in options.only or [stage for stage in STAGES if stage != "files"]:
        for seed in range(options.first, options.first + options.seeds):
            STAGES[stage](JOBS[options.net], seed)


if __name__ == "__main__":
    main()
