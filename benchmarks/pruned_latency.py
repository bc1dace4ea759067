"""What a cut buys in measured time: accuracy against ONNX Runtime's latency, by what the cut was aimed at.

    AEROGEL_DATA=... python benchmarks/pruned_latency.py [--only NET ...] [--seeds 0 1]     # train, cut, recover
    python benchmarks/pruned_latency.py --time                                              # on a quiet machine
    python benchmarks/pruned_latency.py --table

Networks of the zoo are trained on Fashion-MNIST and cut, by the L2 norm where not said otherwise:
latency   to a share of the latency (`target={"latency": ...}`), the same share from every layer, widths in multiples
          of 8
value     the same, channels ranked by their LAMP score over the latency that they cost
macs      to a share of the MACs, channels ranked through the whole network
uniform   to a share of the MACs, the same share from every layer
peer      Torch-Pruning's uniform L2 pruning to the same share of the MACs
Each is then trained for the same number of steps with the same recipe. Accuracy is of the 10,000 test images, seen once
a network; nothing was chosen by it. Latency is of the exported file, one thread, each file against the whole network's
in one interleaved run: the ratio with its 95 % interval. The peer is installed for this alone: `pip install --target
PEERS --no-deps torch-pruning`, and PEERS on PYTHONPATH; without it its rows are left out.
Rows go to benchmarks/results/pruned_latency.json as they are done, a second run goes on; files to runs/pruned_latency.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import aerogel as ag
from aerogel.cost.latency import compare, cpu_name
from aerogel.data import Dataset
from aerogel.errors import CutError
from aerogel.export.onnx import export_onnx
from aerogel.files import write_json
from aerogel.prune import cut
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pruned_latency.json"
PICTURE = ROOT / "benchmarks" / "results" / "pruned_latency.svg"
FILES = ROOT / "runs" / "pruned_latency"
NETS: dict[str, dict[str, Any]] = {
    "vgg11": {"width": 0.25, "num_classes": 10, "in_channels": 1, "input_size": 28},
    "resnet20": {"width": 0.5, "num_classes": 10, "in_channels": 1},
    "lenet5": {"num_classes": 10, "in_channels": 1},
}
SHARES = (0.85, 0.7, 0.5)  # of the latency, or of the MACs, to keep
FROM = {"resnet20": 0}  # the first of them that is tried: in multiples of 8 this one reaches no less than x0.82
TRAIN = {"epochs": 2.0, "lr": 0.1, "weight_decay": 1e-4, "autocast": "bf16"}
RECOVER = TRAIN | {"epochs": 0.5, "lr": 0.05, "warmup": 0.0}
COLOURS = {"latency": "#d62728", "value": "#9467bd", "macs": "#1f77b4", "uniform": "#2ca02c", "peer": "#7f7f7f"}
Way = Callable[[nn.Module, tuple[torch.Tensor], float], nn.Module]


def by_latency(net: nn.Module, example: tuple[torch.Tensor], share: float) -> nn.Module:
    return cut(net, example, target={"latency": share}, ranking="local", round_to=8).model


def by_value(net: nn.Module, example: tuple[torch.Tensor], share: float) -> nn.Module:
    return cut(net, example, target={"latency": share}, criterion="lamp", ranking="value", round_to=8).model


def by_macs(net: nn.Module, example: tuple[torch.Tensor], share: float) -> nn.Module:
    return cut(net, example, target={"macs": share}, ranking="global").model


def uniformly(net: nn.Module, example: tuple[torch.Tensor], share: float) -> nn.Module:
    return cut(net, example, target={"macs": share}, ranking="local").model


def by_peer(net: nn.Module, example: tuple[torch.Tensor], share: float) -> nn.Module:
    """The smallest of 64 channel ratios with which Torch-Pruning meets the share of MACs."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(net).train()
        last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
        pruner = tp.pruner.BasePruner(small, example, importance=tp.importance.MagnitudeImportance(p=2),
                                      pruning_ratio=ratio, ignored_layers=last)  # fmt: skip
        pruner.step()
        return small

    whole = macs(net, example)
    ratios = np.linspace(0, 0.95, 64)
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high) // 2
        if macs(pruned(ratios[middle]), example) <= share * whole:
            high = middle
        else:
            low = middle + 1
    return pruned(ratios[high])


WAYS: dict[str, Way] = {
    "latency": by_latency,
    "value": by_value,
    "macs": by_macs,
    "uniform": uniformly,
    "peer": by_peer,
}


def macs(net: nn.Module, example: tuple[torch.Tensor]) -> int:
    return ag.cost.count(ag.capture(net, example)).macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each comparison of latencies")
    parser.add_argument("--time", action="store_true", help="time the files that are there")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if options.time:
        timed(rows, options.seconds)
    elif not options.table:
        torch.set_num_threads(1)
        fashion = ag.data.load("fashion_mnist")
        for seed, name in itertools.product(options.seeds, options.only):
            for row in made(name, seed, fashion, {key_of(row) for row in rows}):
                rows.append(row)
                write_json(RESULTS, rows)
                print(json.dumps(row), flush=True)
    print(table(rows))
    draw(rows)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["net"], row["seed"], row["way"], row["share"]


def file_of(row: dict[str, Any]) -> Path:
    return FILES / f"{row['net']}_{row['seed']}_{row['way']}_{row['share']}.onnx"


def made(name: str, seed: int, fashion: Dataset, known: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The rows of one network and seed that are not known yet: "whole" first."""
    ways = [way for way in WAYS if way != "peer" or importlib.util.find_spec("torch_pruning")]
    cells = [
        {"net": name, "seed": seed, "way": way, "share": share} for share in SHARES[FROM.get(name, 1) :] for way in ways
    ]
    cells = [cell for cell in cells if key_of(cell) not in known]
    if not cells:
        return
    FILES.mkdir(parents=True, exist_ok=True)
    example = (torch.zeros(1, *fashion.input_shape),)
    torch.manual_seed(seed)
    net = ag.nets.build(name, **NETS[name])
    whole = {"net": name, "seed": seed, "way": "whole", "share": 1.0}
    saved = FILES / f"{name}_{seed}"
    if saved.exists():
        net = ag.load(saved)
    else:
        net = trained(net, fashion, TRAIN, seed)
        ag.save(net, saved)
    if key_of(whole) not in known:
        yield finished(whole, net, fashion, example, 0.0)
    for cell in cells:
        began = time.process_time()
        try:
            small = WAYS[cell["way"]](net, example, cell["share"])
        except CutError as refused:  # so small a network takes a while however narrow it is
            yield cell | {"refused": str(refused), "date": date.today().isoformat()}
            continue
        seconds = time.process_time() - began
        yield finished(cell, trained(small, fashion, RECOVER, seed), fashion, example, seconds)


def trained(net: nn.Module, fashion: Dataset, options: dict[str, Any], seed: int) -> nn.Module:
    return fit(start(net, HardLabels(), fashion, Recipe(**options, seed=seed)), fashion)


def finished(
    cell: dict[str, Any], net: nn.Module, fashion: Dataset, example: tuple[torch.Tensor], seconds: float
) -> dict[str, Any]:
    export_onnx(net, example, file_of(cell))
    cost = ag.cost.count(ag.capture(net, example))
    return cell | {
        "top1": round(accuracy(net, fashion, "test"), 2), "macs": cost.macs, "params": cost.params,
        "cut_seconds": round(seconds, 1), "train": TRAIN, "recover": RECOVER,
        "hardware": f"{cpu_name()}, 1 thread", "date": date.today().isoformat(),
    }  # fmt: skip


def timed(rows: list[dict[str, Any]], seconds: float) -> None:
    """Each file against its whole network's."""
    for row in rows:
        if row["way"] == "whole" or not file_of(row).exists():
            continue
        ratio = compare(file_of(row | {"way": "whole", "share": 1.0}), file_of(row), seconds=seconds).ratio
        row |= {"latency": round(ratio.value, 4), "low": round(ratio.low, 4), "high": round(ratio.high, 4),
                "timed": date.today().isoformat()}  # fmt: skip
        write_json(RESULTS, rows)
        print(f"{file_of(row).stem}: x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", flush=True)


def means(rows: list[dict[str, Any]], net: str, way: str) -> list[tuple[float, float, float, float]]:
    """(share, latency, accuracy lost, MACs left), means over seeds, fastest first."""
    whole = {row["seed"]: row for row in rows if (row["net"], row["way"]) == (net, "whole")}
    found = []
    for share in SHARES:
        here = [r for r in rows if (r["net"], r["way"], r["share"]) == (net, way, share) and "latency" in r]
        if here:
            lost = [whole[r["seed"]]["top1"] - r["top1"] for r in here]
            left = [r["macs"] / whole[r["seed"]]["macs"] for r in here]
            fast = [r["latency"] for r in here]
            found.append((share, float(np.mean(fast)), float(np.mean(lost)), float(np.mean(left))))
    return sorted(found, key=lambda point: point[1])


def at_equal_accuracy(rows: list[dict[str, Any]], net: str, way: str, other: str) -> float | None:
    """The latency of `way` over that of `other` at the accuracy losses that both reach, geometric mean; None without
    such. Between points straight lines."""
    ours, theirs = ([(lost, fast) for _, fast, lost, _ in means(rows, net, w)] for w in (way, other))
    if len(ours) < 2 or len(theirs) < 2:
        return None
    ours, theirs = sorted(ours), sorted(theirs)
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if high <= low:
        return None
    losses = np.linspace(low, high, 11)
    one, two = (np.interp(losses, *zip(*points, strict=True)) for points in (ours, theirs))
    return float(np.exp(np.mean(np.log(one / two))))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'network':14}{'aimed at':10}" + "".join(f"{f'{s:g}: latency, MACs, lost':>30}" for s in SHARES)]
    for net, way in itertools.product(NETS, WAYS):
        cells = {share: (fast, lost, left) for share, fast, lost, left in means(rows, net, way)}
        if cells:
            told = [f"x{c[0]:.3f}  x{c[2]:.3f}  {c[1]:+.2f} pt" if (c := cells.get(s)) else "" for s in SHARES]
            lines.append(f"{net:14}{way:10}" + "".join(f"{text:>30}" for text in told))
    for net, other in itertools.product(NETS, list(WAYS)[1:]):
        ratio = at_equal_accuracy(rows, net, "latency", other)
        if ratio is not None:
            lines.append(f"{net}: latency of `latency` over `{other}` at equal accuracy: x{ratio:.3f}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy lost against latency as SVG, a panel a network."""
    nets = [net for net in NETS if any(means(rows, net, way) for way in WAYS)]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{320 * len(nets)}" height="300" font-family="sans-serif" '
             'font-size="11"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for panel, net in enumerate(nets):
        points = {way: [(fast, lost) for _, fast, lost, _ in means(rows, net, way)] for way in WAYS}
        top = max(0.2, *(lost for line in points.values() for _, lost in line))
        least = min(0.0, *(lost for line in points.values() for _, lost in line))

        def place(fast: float, lost: float, left: int = 320 * panel, low: float = least, high: float = top) -> str:
            return f"{left + 50 + 250 * fast:.1f},{40 + 210 * (lost - low) / (high - low):.1f}"

        parts.append(f'<text x="{320 * panel + 130}" y="16" font-size="13">{net}</text>')
        for fast in (0.2, 0.4, 0.6, 0.8, 1.0):
            x = place(fast, 0).split(",")[0]
            parts.append(
                f'<path d="M{x},40V250" stroke="#ddd"/><text x="{x}" y="266" text-anchor="middle">{fast}</text>'
            )
        for lost in np.linspace(least, top, 5):
            x, y = place(0, lost).split(",")
            parts.append(f'<path d="M{x},{y}h250" stroke="#ddd"/><text x="{float(x) - 4}" y="{y}" text-anchor="end">'
                         f"{-lost:+.1f}</text>")  # fmt: skip
        for row, (way, line) in enumerate(points.items()):
            path = " ".join(place(*point) for point in line)
            dots = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*place(*point).split(",")) for point in line)
            colour = COLOURS[way]
            parts.append(f'<g fill="{colour}"><polyline points="{path}" fill="none" stroke="{colour}"/>{dots}'
                         f'<text x="{320 * panel + 230}" y="{200 + 14 * row}">{way}</text></g>')  # fmt: skip
    parts.append('<text x="60" y="290">points of accuracy over the whole network, against the share of its measured '
                 "latency</text></svg>")  # fmt: skip
    PICTURE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
