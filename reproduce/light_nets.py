"""The light networks side by side, small: accuracy on Fashion-MNIST against MACs, parameters, access bytes and latency.
Writes results/light_nets.json; a seed that is there already is not run again.

    AEROGEL_DATA=... python reproduce/light_nets.py [--seeds 3] [--only NAME ...] [--threads N]

The papers compare on ImageNet at 40 to 600 M MACs, after hundreds of epochs on GPUs. Here each width is the one
nearest to 2.5 M MACs at 28 x 28, chosen by cost alone. MobileNetV2 cannot come so low, because its first stages expand
six times at full size: with 8 channels in every stage it has 3.9 M; here it has 4.7 M, at the least width where
channels grow.
All share one recipe of 3 epochs, the library's defaults but for the papers' small weight decay. Nothing is tuned, so
the validation images are not looked at; the test images are, once a network.
The ablation is ShuffleNetV1's (its Table 3): the same network with and without the shuffle, at 3 and 8 groups.
Latency is of the exported file, one thread, one image, timed in turns with MobileNetV1's.
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = ag.data.load("fashion_mnist")
    for seed in range(options.seeds):
        for name in options.only:
            if seed not in held_seeds(RESULTS, f"{name}_latency"):
                record(name, seed, data)
    print(light_nets())


def record(
    name: str, seed: int, data: ag.data.Dataset, *, path: Path = RESULTS, recipe: Recipe = RECIPE, seconds: float = 4.0
) -> None:
    """Trains one network and puts its numbers into the results, the latency last: then the seed counts as there."""
    began = time.perf_counter()
    net = fresh(name, seed)
    fit(start(net, HardLabels(), data, recipe.model_copy(update={"seed": seed})), data)
    cost = ag.cost.count(ag.capture(net, EXAMPLE))
    with tempfile.TemporaryDirectory() as folder:
        other = export_onnx(fresh(REFERENCE, seed), EXAMPLE, Path(folder) / "reference.onnx").path
        timed = compare(other, export_onnx(net, EXAMPLE, Path(folder) / "net.onnx").path, seconds=seconds)
    top1 = accuracy(net, data, "test")
    taken = time.perf_counter() - began
    print(f"{name} seed {seed}: {top1:.2f} %, x{timed.ratio.value:.2f}, {taken:.0f} s", flush=True)
    for row, value, unit in [
        ("top1", top1, "%"),
        ("macs", cost.macs, "MACs"),
        ("params", cost.params, "parameters"),
        ("access_bytes", cost.access_bytes, "bytes"),
        ("latency_ms", timed.b.median_ms, "ms"),
        ("latency", timed.ratio.value, f"x of {REFERENCE}"),
    ]:
        add(
            path, f"{name}_{row}", seed, value, unit=unit, command="python reproduce/light_nets.py",
            hardware=f"{cpu_name()}, {os.cpu_count()} cores", seconds=taken,
        )  # fmt: skip


def fresh(name: str, seed: int) -> nn.Module:
    """The network as it starts."""
    torch.manual_seed(seed)
    net, arguments = ag.nets.parse(NETS[name])
    return ag.nets.build(net, **arguments, num_classes=10, in_channels=1, input_size=28)


if __name__ == "__main__":
    main()
