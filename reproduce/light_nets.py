"""The light networks side by side, small: accuracy on Fashion-MNIST against MACs, parameters, access bytes and latency.
Writes results/light_nets.json; a seed that is there already is not run again.

    AEROGEL_DATA=... python reproduce/light_nets.py [--seeds 3] [--only NAME ...] [--threads N]
    python reproduce/light_nets.py --time [--seeds 3]     # latency alone, on a quiet machine

The papers compare on ImageNet at 40 to 600 M MACs, after hundreds of epochs on GPUs. Here each width is the one
nearest to 2.5 M MACs at 28 x 28, chosen by cost alone. MobileNetV2 cannot come so low, because its first stages expand
six times at full size: with 8 channels in every stage it has 3.9 M; here it has 4.7 M, at the least width where
channels grow.
All share one recipe of 3 epochs, the library's defaults but for the papers' small weight decay. Nothing is tuned, so
the validation images are not looked at; the test images are, once a network.
The ablation is ShuffleNetV1's (its Table 3): the same network with and without the shuffle, at 3 and 8 groups.
Latency is of the exported file, one thread, one image, timed in turns with MobileNetV1's; it does not depend on what
was learnt, so that it is measured by itself, on fresh weights of each seed, while nothing is trained.
A step of 128 images takes 0.19 s of one core of an AMD EPYC (V1, ShuffleNetV2), 0.3 s (V3, 3 groups), 0.45 s (8
groups), 0.54 s (V2), measured while others used the machine: at most an hour of one core a seed, 40 minutes without 8
groups.
Two processes of one thread, each with its own --only, share it better than one with two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from results import add, held_seeds
from tables import light_nets
from torch import nn

import aerogel as ag
from aerogel.cost.latency import compare, cpu_name
from aerogel.export.onnx import export_onnx
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

RESULTS = Path(__file__).parent / "results" / "light_nets.json"
RECIPE = Recipe(epochs=3, weight_decay=4e-5)
REFERENCE = "mobilenet_v1"
NETS = {
    "mobilenet_v1": "mobilenet_v1:width=0.125",  # 2.70 M MACs
    "mobilenet_v2": "mobilenet_v2:width=0.1",  # 4.73 M
    "mobilenet_v3_small": "mobilenet_v3_small:width=0.25",  # 2.53 M
    "shufflenet_v2": "shufflenet_v2:width=0.2",  # 2.76 M
    "shufflenet_v1_g3": "shufflenet_v1:width=0.25,groups=3",  # 2.35 M
    "shufflenet_v1_g3_unshuffled": "shufflenet_v1:width=0.25,groups=3,shuffle=false",
    "shufflenet_v1_g8": "shufflenet_v1:width=0.25,groups=8",  # 2.52 M
    "shufflenet_v1_g8_unshuffled": "shufflenet_v1:width=0.25,groups=8,shuffle=false",
}
EXAMPLE = (torch.zeros(1, 1, 28, 28),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--time", action="store_true", help="measure latency, train nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step, last_row = (measure, "latency") if options.time else (learn, "top1")
    for seed in range(options.seeds):
        for name in options.only:
            if seed not in held_seeds(RESULTS, f"{name}_{last_row}"):
                step(name, seed)
    print(light_nets())


def learn(
    name: str, seed: int, *, data: ag.data.Dataset | None = None, path: Path = RESULTS, recipe: Recipe = RECIPE
) -> None:
    """Trains one network; its accuracy is put into the results last: then the seed counts as there."""
    began = time.perf_counter()
    data = data or ag.data.load("fashion_mnist")
    net = fresh(name, seed)
    fit(start(net, HardLabels(), data, recipe.model_copy(update={"seed": seed})), data)
    cost = ag.cost.count(ag.capture(net, EXAMPLE))
    held = {
        "macs": (cost.macs, "MACs"),
        "params": (cost.params, "parameters"),
        "access_bytes": (cost.access_bytes, "bytes"),
        "top1": (accuracy(net, data, "test"), "%"),
    }
    write(name, seed, held, path=path, seconds=time.perf_counter() - began)


def measure(name: str, seed: int, *, path: Path = RESULTS, seconds: float = 4.0) -> None:
    """Times the exported network in turns with the reference's."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [
            export_onnx(fresh(one, seed), EXAMPLE, Path(folder) / f"{place}.onnx").path
            for place, one in enumerate((REFERENCE, name))
        ]
        timed = compare(*files, seconds=seconds)
    held = {
        "latency_ms": (timed.b.median_ms, "ms"),
        "latency": (timed.ratio.value, f"x of {REFERENCE}"),
    }
    write(name, seed, held, path=path, seconds=time.perf_counter() - began, option=" --time")


def write(
    name: str, seed: int, held: dict[str, tuple[float, str]], *, path: Path, seconds: float, option: str = ""
) -> None:
    """Puts {row: (value, unit)} of one network and seed into the results."""
    print(
        name,
        f"seed {seed}:",
        *(f"{row} {value:.6g}" for row, (value, _) in held.items()),
        f"{seconds:.0f} s",
        flush=True,
    )
    for row, (value, unit) in held.items():
        add(
            path, f"{name}_{row}", seed, value, unit=unit, command=f"python reproduce/light_nets.py{option}",
            hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=seconds,
        )  # fmt: skip


def fresh(name: str, seed: int) -> nn.Module:
    """The network as it starts."""
    torch.manual_seed(seed)
    net, arguments = ag.nets.parse(NETS[name])
    return ag.nets.build(net, **arguments, num_classes=10, in_channels=1, input_size=28)


if __name__ == "__main__":
    main()
