"""How long counting takes beside fvcore's FlopCountAnalysis, from a model in memory to its total.

    python benchmarks/cost_peers.py [--rounds 9] [--threads 1]

Both count the same three networks (ResNet-50, MobileNetV2, ViT-B/16 of a Hugging Face configuration) in one process, in
random order within every round; what is printed is aerogel's time over fvcore's in the same round, its median and 95 %
interval. aerogel: capture and count (which makes MACs, FLOPs, access and peak bytes, arena, receptive fields, layers),
alone and with the second count, `verify`; and torch.export alone, by which capture reads a network: nearly all of the
time. fvcore: FlopCountAnalysis(model, input).total(), which is MACs, and runs the network once on real numbers, so its
weights are on the CPU; aerogel gets the same model. The first round is not timed. What each counts is printed too:
fvcore leaves ViT's attention at 0, and adds element-wise work. Needs `pip install fvcore`, and transformers.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.cost import count, verify
from aerogel.cost.latency import cpu_name
from aerogel.graph import capture
from aerogel.graph.capture import quiet
from aerogel.nets import build
from aerogel.stats import median_interval

Counter = Callable[[nn.Module, Tensor], int]


def aerogel_alone(model: nn.Module, x: Tensor) -> int:
    return count(capture(model, (x,))).macs


def aerogel_verified(model: nn.Module, x: Tensor) -> int:
    cost = count(capture(model, (x,)))
    assert verify(model, (x,), None, cost).agrees
    return cost.macs


def export_alone(model: nn.Module, x: Tensor) -> int:
    """The part of aerogel's time that is PyTorch's: it counts nothing."""
    with quiet():
        torch.export.export(model, (x,), strict=False)
    return 0


def fvcore(model: nn.Module, x: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    found = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(found.total())


COUNTERS: dict[str, Counter] = {
    "fvcore": fvcore,
    "aerogel": aerogel_alone,
    "aerogel, verified": aerogel_verified,
    "torch.export alone": export_alone,
}


class Logits(nn.Module):
    """A Hugging Face network as tensor in, tensor out: fvcore takes no other."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x, return_dict=False)[0]


def vit_base() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(num_labels=1000)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: build("resnet50"),
    "MobileNetV2": lambda: build("mobilenet_v2"),
    "ViT-B/16": vit_base,
}


def times(model: nn.Module, x: Tensor, rounds: int, seed: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each counter in each round, and what it counted."""
    rng = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in COUNTERS}
    macs: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in rng.permutation(list(COUNTERS)):
            start = time.perf_counter()
            macs[name] = COUNTERS[name](model, x)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds, macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="at least 6, for an interval")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.rounds < 6:
        parser.error(f"--rounds must be at least 6, got {given.rounds}")
    try:
        import fvcore  # noqa: F401
    except ImportError:
        raise SystemExit("cost_peers: fvcore is not installed; pip install fvcore") from None
    logging.disable(logging.WARNING)
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    print(f"{datetime.date.today()}  {cpu_name()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}")
    print(f"threads {given.threads}, {given.rounds} rounds, 1 x 3 x 224 x 224")
    for network, make in NETWORKS.items():
        torch.manual_seed(given.seed)
        seconds, macs = times(make().eval(), torch.zeros(1, 3, 224, 224), given.rounds, given.seed)
        for name, held in seconds.items():
            ratio = median_interval([a / b for a, b in zip(held, seconds["fvcore"], strict=True)])
            spread = f"x{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            print(f"{network:<12} {name:<18} {np.median(held):6.2f} s  {spread}  {macs[name]:>14,} MACs", flush=True)


if __name__ == "__main__":
    main()
