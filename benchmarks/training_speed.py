"""Images a second of our training loop beside a plain PyTorch one, and of two processes beside one.

    AEROGEL_DATA=... python benchmarks/training_speed.py [--rounds 7] [--seconds 4] [--only NAME ...]

ours      aerogel.train: images in memory as uint8, augmented a batch at a time, channels_last; in single precision,
          with autocast = "bf16", and with that and compile = true
plain     the loop of PyTorch's examples: a Dataset that opens one image at a time with Pillow and changes it as
          torchvision.transforms does (pad, random crop, random flip, to a float tensor, normalise; written out here,
          since torchvision need not be there), a DataLoader (the faster of 0 and 2 workers, both are told), the same
          network, optimizer, rate, clip and batch
both      in turns within one process, in random order, for `seconds` each; ratio of the two in every round
scaling   the same global batch in one process and in two by torchrun, one thread each, in turns; with norms also
          with sync_norms = false; and two jobs of half the batch that know nothing of each other, which is what the
          machine has to give

Results go to benchmarks/results/training_speed.json and from there into docs/training.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset
from aerogel.files import read_json, write_json
from aerogel.train import HardLabels, Recipe, Speed, join, start, steps

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "training_speed.json"
PAGE = ROOT / "docs" / "training.md"
JOBS = {
    "LeNet-5, MNIST": ("lenet5", {}, "mnist"),
    "LeNet-300-100, MNIST": ("lenet_300_100", {}, "mnist"),
    "ResNet-20, CIFAR-10 (JPEG)": ("resnet20", {}, "cifar10"),
    "ResNet-20 x0.25, CIFAR-10 (JPEG)": ("resnet20", {"width": 0.25}, "cifar10"),
    "MobileNetV2 x0.25, CIFAR-10 (JPEG)": ("mobilenet_v2", {"width": 0.25}, "cifar10"),
}
RECIPE = Recipe(epochs=1000, batch_size=128, lr=0.01)


def network(job: str, data: Dataset) -> nn.Module:
    name, arguments, _ = JOBS[job]
    torch.manual_seed(0)
    channels, side, _ = data.input_shape
    return ag.nets.build(name, **arguments, num_classes=10, in_channels=channels, input_size=side)


# ---------------------------------------------------------------- the plain loop


class OneByOne(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """As torchvision.datasets and its transforms: an image at a time."""

    def __init__(self, data: Dataset) -> None:
        self.images = data.train.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train.labels.tolist()
        self.pad, self.flip = {"shift": (2, False), "crop_flip": (4, True)}[data.augment]
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index]
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        width, height = image.size
        padded = ImageOps.expand(image, self.pad, 0)
        top, left = (int(torch.randint(0, 2 * self.pad + 1, (1,))) for _ in range(2))
        image = padded.crop((left, top, left + width, top + height))
        if self.flip and float(torch.rand(1)) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous()
        return tensor.float().div(255).sub_(self.mean).div_(self.std), self.labels[index]


def plain(job: str, data: Dataset, workers: int) -> Iterator[int]:
    """Trains for ever; the images of each step."""
    net = network(job, data).train()
    flat, deep = ([p for p in net.parameters() if (p.ndim > 1) is matrix] for matrix in (False, True))
    groups = [{"params": deep, "weight_decay": RECIPE.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, RECIPE.lr, RECIPE.momentum, nesterov=True)
    loader = DataLoader(OneByOne(data), RECIPE.batch_size, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        for inputs, labels in loader:
            loss = F.cross_entropy(net(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            loss.item()
            yield len(labels)


def ours(job: str, data: Dataset, **changes: Any) -> Iterator[int]:
    net, recipe = network(job, data), RECIPE.model_copy(update=changes)
    for step in steps(start(net, HardLabels(), data, recipe), data):
        yield step.images


def rate(loop: Iterator[int], seconds: float) -> float:
    """Images a second over at least that time."""
    images, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        images += next(loop)
    return images / (time.perf_counter() - began)


def side_by_side(job: str, data: Dataset, rounds: int, seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    loops: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: ours(job, data),
        "ours, bf16": lambda: ours(job, data, autocast="bf16"),
        "ours, bf16, compiled": lambda: ours(job, data, autocast="bf16", compile=True),
        "plain, 0 workers": lambda: plain(job, data, 0),
        "plain, 2 workers": lambda: plain(job, data, 2),
    }
    going = {name: make() for name, make in loops.items()}
    for loop in going.values():
        rate(loop, seconds / 2)
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name in rng.permutation(list(loops)):
            found[name].append(rate(going[name], seconds))
    best = np.maximum(found["plain, 0 workers"], found["plain, 2 workers"])
    ratio = {name: (np.array(found[name]) / best).tolist() for name in loops if name.startswith("ours")}
    return {"images_per_second": found, "ratio": ratio}


# ---------------------------------------------------------------- two processes


def alone(job: str, seconds: float, sync: bool, batch_size: int) -> None:
    """Prints images a second of this process's world (rank 0 does)."""
    torch.set_num_threads(1)
    world = join()
    data = ag.data.load(JOBS[job][2])
    recipe = RECIPE.model_copy(update={"sync_norms": sync, "batch_size": batch_size})
    speed, loop = Speed(), steps(start(network(job, data), HardLabels(), data, recipe), data)
    for number, step in enumerate(loop):
        if number == 5:
            speed = Speed()
        speed.add(step)
        if number > 5 and speed.seconds > seconds and number % 10 == 0:
            break
        if number == 100_000:
            raise AssertionError("the clock stands")
    if world.rank == 0:
        print(json.dumps(speed.images_per_second), flush=True)
    os._exit(0)  # the other rank may be in the middle of a step


def scaled(job: str, rounds: int, seconds: float) -> dict[str, Any]:
    ways = {"1": ["1"], "2": ["2"]}
    if any(isinstance(part, nn.BatchNorm2d) for part in network(job, ag.data.load(JOBS[job][2])).modules()):
        ways["2, own statistics"] = ["2", "--own-statistics"]
    ways["2 apart"] = ["1", "--batch-size", str(RECIPE.batch_size // 2)]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (ranks, *more) in ways.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks,
                       __file__, "--alone", job, "--seconds", str(seconds), *more]  # fmt: skip
            found[name].append(sum(rates_of(command, times=2 if name == "2 apart" else 1)))
    alone = np.array(found["1"])
    efficiency = {name: (np.array(found[name]) / alone / 2).tolist() for name in ways if name != "1"}
    return {"images_per_second": found, "efficiency": efficiency}


def rates_of(command: list[str], times: int) -> list[float]:
    """What the command prints, so many times at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    going = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(times)
    ]
    return [float(one.communicate()[0].strip().splitlines()[0]) for one in going]


# ---------------------------------------------------------------- the page


def told(values: list[float], sign: str = "") -> str:
    return f"{sign}{np.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(held: dict[str, Any]) -> str:
    loops = next(iter(held["loops"].values()))
    named = [*loops["images_per_second"], *(f"{name} / plain" for name in loops["ratio"])]
    lines = [f"| network, data | {' | '.join(named)} |", "|---" * (len(named) + 1) + "|"]
    for job, row in held["loops"].items():
        rates = [f"{np.median(values):,.0f}" for values in row["images_per_second"].values()]
        lines.append(f"| {job} | {' | '.join([*rates, *(told(r, 'x') for r in row['ratio'].values())])} |")
    ways = "one process | two | efficiency | with sync_norms = false | two jobs apart"
    lines += ["", f"| network, data | {ways} |", "|---" * 6 + "|"]
    for job, row in held["scaling"].items():
        one, two = (f"{np.median(row['images_per_second'][n]):,.0f}" for n in ("1", "2"))
        own = row["efficiency"].get("2, own statistics")
        last = told(own) if own else "no norms"
        shares = f"{told(row['efficiency']['2'])} | {last} | {told(row['efficiency']['2 apart'])}"
        lines.append(f"| {job} | {one} | {two} | {shares} |")
    how = (
        f"Images a second, medians of {held['rounds']} rounds, with the smallest and the largest ratio; beside the "
        "faster of the two plain loops in each round."
    )
    where = f"{held['hardware']}, {held['date']}; `python benchmarks/training_speed.py --rounds {held['rounds']}`."
    return "\n".join([*lines, "", f"{how} {where}"])


def write_page(held: dict[str, Any]) -> None:
    head, _, rest = PAGE.read_text().partition("<!-- speed -->")
    PAGE.write_text(f"{head}<!-- speed -->\n{table(held)}\n<!-- /speed -->{rest.partition('<!-- /speed -->')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--part", choices=["loops", "scaling"], help="measure one, keep what is known of the other")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=RECIPE.batch_size, help=argparse.SUPPRESS)
    parser.add_argument("--own-statistics", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options.seconds, not options.own_statistics, options.batch_size)
    torch.set_num_threads(1)
    held: dict[str, Any] = read_json(RESULTS)
    held |= {"hardware": f"{cpu_name()}, {os.cpu_count()} cores, 1 thread a process, torch {torch.__version__}",
             "date": str(datetime.date.today()), "rounds": options.rounds}  # fmt: skip
    for job in options.only:
        if options.part != "scaling":
            held["loops"][job] = side_by_side(job, ag.data.load(JOBS[job][2]), options.rounds, options.seconds)
            print(job, held["loops"][job]["ratio"], flush=True)
        if options.part != "loops":
            held["scaling"][job] = scaled(job, options.rounds, options.seconds)
            print(job, held["scaling"][job]["efficiency"], flush=True)
        write_json(RESULTS, held)
    write_page(held)
    print(table(held))


if __name__ == "__main__":
    main()
