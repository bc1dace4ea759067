"""ShuffleNetV2: what merging concatenation, shuffle and split saves. Ma et al. 2018, section 4.

    python benchmarks/merged_shuffle.py [--width 1] [--size 224] [--batch 1] [--seconds 20] [--threads 1] [--compile]

Three forms of one net with the same weights, whose outputs must be bit-equal:
- plain: concatenate, reshape, transpose, reshape; the next unit splits;
- merged: one concatenation along a new axis interleaves the two sides; the next unit splits. aerogel's default;
- halves: the split made first, so that a unit hands on the two halves the next one reads. Only here.
Prints ops, access and peak bytes, then the time of each form over that of plain with its 95 % interval: of the
exported file in ONNX Runtime (which also tells what only a runtime knows: a split that PyTorch makes by a view, ONNX
Runtime copies), and in PyTorch, forward alone and a training step. The forms take turns in random order.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.cost import count
from aerogel.cost.latency import compare, cpu_name
from aerogel.export.onnx import export_onnx
from aerogel.graph import capture
from aerogel.nets import build
from aerogel.nets.shufflenet_v2 import Unit, interleave
from aerogel.stats import Interval, median_interval

ROUNDS = 15


class Halves(nn.Module):
    """A ShuffleNetV2 that splits before it interleaves; its halves must have an even number of channels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.net.features.named_children():
            x = self.stage(child, x) if name.startswith("stage") else child(x)
        return self.net.classifier(x)

    def stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        first, *rest = stage.children()
        kept, made = first.shortcut(x), first.body(x)
        for unit in rest:
            (kept, taken), (made, also_taken) = kept.chunk(2, dim=1), made.chunk(2, dim=1)
            kept, made = interleave(kept, made), unit.body(interleave(taken, also_taken))
        return interleave(kept, made)


def forms(width: float, size: int) -> dict[str, nn.Module]:
    """The three forms, each with its own copy of the same weights, in eval mode."""
    torch.manual_seed(0)
    merged = build("shufflenet_v2", width=width, input_size=size).eval()
    plain = copy.deepcopy(merged)
    for unit in plain.modules():
        if isinstance(unit, Unit):
            unit.merged = False
    return {"plain": plain, "merged": merged, "halves": Halves(copy.deepcopy(merged))}


def ratios(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Interval]:
    """Time of each call over that of the first; the median of the pairs of a round, then over the rounds."""
    rng = np.random.default_rng(0)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds / ROUNDS
        while not times["plain"] or time.perf_counter() < end:
            for name in rng.permutation(list(calls)):
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)
        for name in calls:
            rounds[name].append(float(np.median(np.divide(times[name], times["plain"]))))
    return {name: median_interval(values) for name, values in rounds.items() if name != "plain"}


def tell(what: str, found: dict[str, Interval]) -> None:
    for name, ratio in found.items():
        print(f"{what:<24} {name} / plain  {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", flush=True)


def tell_counts(nets: dict[str, nn.Module], x: Tensor) -> None:
    for name, net in nets.items():
        graph = capture(net, (x,))
        cost = count(graph)
        print(
            f"{name:<8} {len(graph.ops)} ops, access {cost.access_bytes / 1e6:.2f} MB (raw "
            f"{cost.access_bytes_raw / 1e6:.2f}), peak {cost.peak_bytes / 1e6:.2f} MB",
            flush=True,
        )


def in_onnx_runtime(nets: dict[str, nn.Module], x: Tensor, threads: int, seconds: float) -> dict[str, Interval]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: export_onnx(net, (x,), Path(folder) / f"{name}.onnx").path for name, net in nets.items()}
        found = {}
        for name in ("merged", "halves"):
            result = compare(paths["plain"], paths[name], threads=threads, batch=len(x), seconds=seconds)
            print(f"plain {result.a.describe()}, {name} {result.b.describe()}")
            found[name] = result.ratio
    return found


def in_pytorch(nets: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, Interval]:
    with torch.inference_mode():
        outputs = [net(x) for net in nets.values()]
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])
        return ratios({name: lambda net=net: net(x) for name, net in nets.items()}, seconds)


def training(nets: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, Interval]:
    for net in nets.values():
        net.train()
    return ratios({name: lambda net=net: net(x).sum().backward() for name, net in nets.items()}, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="per comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile too; needs a C++ compiler")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    nets = forms(given.width, given.size)
    x = torch.randn(given.batch, 3, given.size, given.size)
    print(f"{datetime.date.today()}  {cpu_name()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}")
    print(f"shufflenet_v2 width {given.width:g}, input {tuple(x.shape)}, threads {given.threads}")
    tell_counts(nets, x)
    tell("ONNX Runtime", in_onnx_runtime(nets, x, given.threads, given.seconds))
    tell("PyTorch", in_pytorch(nets, x, given.seconds))
    if given.compile:
        compiled = {name: torch.compile(net) for name, net in nets.items()}
        tell("PyTorch, torch.compile", in_pytorch(compiled, x, given.seconds))
    tell("PyTorch, training step", training(nets, x, given.seconds))


if __name__ == "__main__":
    main()
