"""ShuffleNetV2's four experiments on this processor. Ma, Zhang, Zheng, Sun 2018, arXiv:1807.11164, section 2.

    python benchmarks/guidelines.py [--only G1 G2] [--columns 1 2 4] [--seconds 5] [--device this] [--out FILE.json]

Ten blocks stacked at 56 x 56, batch 1, with the channels of the paper's ARM columns; a column's number multiplies all
channels. Each network is exported and timed in turns with the first of its experiment (one thread, ONNX Runtime).
Printed is the speed relative to that first: measured with its 95 % interval, predicted by the device's roofline, by
access alone (what G1 and G2 argue with), and the paper's on a GTX 1080Ti (batch 8) and a Snapdragon 810 (batch 1). MACs
are told where the channels do not make them equal.

    G1  two 1x1 convolutions c1 -> c2 -> c1                         G2  one 1x1 convolution c -> c with g groups
    G3  k 1x1 convolutions in series, or side by side and added     G4  a bottleneck 1x1, 3x3, 1x1; ReLU, shortcut

What the paper leaves open, and is chosen here: a ReLU behind every convolution of G1 to G3; G3 has c / sqrt k channels,
and its branches are added; G4's c is the width in and out, and the 3x3 has c / 4 (with c everywhere, the ARM would do
20 billion MACs a second at c = 32, four times what it does in G1); 184 channels, not the paper's 180, for eight
groups, which do not divide 180.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.cost import Device, count
from aerogel.cost.latency import Ratio, compare, cpu_name
from aerogel.cost.roofline import total_ms
from aerogel.export.onnx import export_onnx
from aerogel.files import write_json
from aerogel.graph import capture
from aerogel.report.findings import chosen_device

BLOCKS, SIZE, COLUMNS = 10, 56, (1, 2, 4)
RESULTS = Path(__file__).parent / "results" / "guidelines.json"

# label, channels of the ARM column x1, GPU batches/s at x1 x2 x4, ARM images/s at x1 x2 x4. Tables 1 to 4.
G1 = (
    ("1:1", (32, 32), (1480, 723, 232), (76.2, 21.7, 5.3)),
    ("1:2", (22, 44), (1296, 586, 206), (72.9, 20.5, 5.1)),
    ("1:6", (13, 78), (876, 489, 189), (69.1, 17.9, 4.6)),
    ("1:12", (9, 108), (748, 392, 163), (57.6, 15.1, 4.4)),
)
G2 = (
    ("1 group", (64, 1), (2451, 1289, 437), (40.0, 10.2, 2.3)),
    ("2 groups", (90, 2), (1725, 873, 341), (35.0, 9.5, 2.2)),
    ("4 groups", (128, 4), (1026, 644, 338), (32.9, 8.7, 2.1)),
    ("8 groups", (180, 8), (634, 445, 230), (27.8, 7.5, 1.8)),
)
G3 = (
    ("1-fragment", (64, 1, 1), (2446, 1274, 434), (40.2, 10.1, 2.3)),
    ("2-fragment-series", (64, 2, 1), (1790, 909, 336), (38.6, 10.1, 2.2)),
    ("4-fragment-series", (64, 4, 1), (752, 745, 349), (38.4, 10.1, 2.3)),
    ("2-fragment-parallel", (64, 1, 2), (1537, 803, 320), (33.4, 9.1, 2.2)),
    ("4-fragment-parallel", (64, 1, 4), (691, 572, 292), (35.0, 8.4, 2.1)),
)
G4 = (
    ("ReLU, shortcut", (32, True, True), (2427, 2066, 1436), (56.7, 16.9, 5.0)),
    ("ReLU", (32, True, False), (2647, 2256, 1735), (61.9, 18.8, 5.2)),
    ("shortcut", (32, False, True), (2672, 2121, 1458), (57.3, 18.2, 5.1)),
    ("neither", (32, False, False), (2842, 2376, 1782), (66.3, 20.2, 5.4)),
)


class Parallel(nn.Module):
    """Branches of one tensor, added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = [branch(x) for branch in self.branches]
        for result in rest:
            first = first + result
        return first


class Bottleneck(nn.Module):
    """ResNet's: 1x1, 3x3, 1x1, each ReLU and the shortcut there or not."""

    def __init__(self, c: int, relu: bool, shortcut: bool) -> None:
        super().__init__()
        activation = nn.ReLU if relu else nn.Identity
        self.shortcut = shortcut
        self.body = nn.Sequential(
            nn.Conv2d(c, c // 4, 1), activation(),
            nn.Conv2d(c // 4, c // 4, 3, padding=1), activation(),
            nn.Conv2d(c // 4, c, 1),
        )  # fmt: skip
        self.end = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x + self.body(x) if self.shortcut else self.body(x))


def conv(c1: int, c2: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, 1, groups=groups), nn.ReLU())


def ratio_block(times: int, c1: int, c2: int) -> tuple[int, nn.Module]:
    return times * c1, nn.Sequential(conv(times * c1, times * c2), conv(times * c2, times * c1))


def group_block(times: int, c: int, groups: int) -> tuple[int, nn.Module]:
    wide = math.ceil(times * c / groups) * groups
    return wide, conv(wide, wide, groups)


def fragment_block(times: int, c: int, series: int, parallel: int) -> tuple[int, nn.Module]:
    wide = round(times * c / math.sqrt(series * parallel))
    branches = [nn.Sequential(*(conv(wide, wide) for _ in range(series))) for _ in range(parallel)]
    return wide, Parallel(*branches) if parallel > 1 else branches[0]


def bottleneck_block(times: int, c: int, relu: bool, shortcut: bool) -> tuple[int, nn.Module]:
    return times * c, Bottleneck(times * c, relu, shortcut)


Rows = tuple[tuple[str, tuple[Any, ...], tuple[float, ...], tuple[float, ...]], ...]
EXPERIMENTS: dict[str, tuple[str, Rows, Callable[..., tuple[int, nn.Module]]]] = {
    "G1": ("c1 : c2", G1, ratio_block),
    "G2": ("groups", G2, group_block),
    "G3": ("fragments", G3, fragment_block),
    "G4": ("element-wise", G4, bottleneck_block),
}


@dataclass(frozen=True)
class Stack:
    """One network of an experiment, exported."""

    path: Path
    macs: int
    access_bytes: int
    predicted_ms: float


def stacked(
    block: Callable[..., tuple[int, nn.Module]], times: int, shape: tuple[Any, ...]
) -> tuple[nn.Module, Tensor]:
    """Ten blocks, and the input that they take."""
    torch.manual_seed(0)
    blocks = [block(times, *shape) for _ in range(BLOCKS)]
    return nn.Sequential(*(module for _, module in blocks)).eval(), torch.randn(1, blocks[0][0], SIZE, SIZE)


def built(net: nn.Module, x: Tensor, path: Path, device: Device) -> Stack:
    cost = count(capture(net, (x,)))
    return Stack(export_onnx(net, (x,), path).path, cost.macs, cost.access_bytes, total_ms(cost.layers, device))


def experiment(name: str, times: int, device: Device, seconds: float, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each network: all speeds relative to the first."""
    _, rows, block = EXPERIMENTS[name]
    column = COLUMNS.index(times)
    stacks = [
        built(*stacked(block, times, shape), folder / f"{name}-{times}-{i}.onnx", device)
        for i, (_, shape, _, _) in enumerate(rows)
    ]
    first = stacks[0]
    for stack, (label, _, gpu, arm) in zip(stacks, rows, strict=True):
        found = compare(first.path, stack.path, seconds=seconds) if stack is not first else None
        yield {
            "experiment": name,
            "column": f"x{times}",
            "row": label,
            "macs": stack.macs,
            "macs_ratio": stack.macs / first.macs,
            "measured": speeds(found),
            "predicted": first.predicted_ms / stack.predicted_ms,
            "by_access": first.access_bytes / stack.access_bytes,
            "gpu": gpu[column] / rows[0][2][column],
            "arm": arm[column] / rows[0][3][column],
            "milliseconds": found.b.median_ms if found else None,
            "noisy": found.a.noisy or found.b.noisy if found else None,
        }


def speeds(found: Ratio | None) -> dict[str, float] | None:
    """The second file's speed over the first's, with its interval."""
    if found is None:
        return None
    ratio = found.ratio
    return {"value": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low}


def line(row: dict[str, Any]) -> str:
    held = row["measured"]
    measured = f"{held['value']:.2f} [{held['low']:.2f}, {held['high']:.2f}]" if held else "1"
    macs = f"  MACs x{row['macs_ratio']:.3f}" if abs(row["macs_ratio"] - 1) > 0.01 else ""
    return (
        f"{row['experiment']} {row['column']:<3} {row['row']:<20} {measured:<19} {row['predicted']:>9.2f} "
        f"{row['by_access']:>9.2f} {row['gpu']:>6.2f} {row['arm']:>6.2f}{'  noisy' if row['noisy'] else ''}{macs}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--columns", nargs="+", type=int, choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seconds", type=float, default=5.0, help="per comparison")
    parser.add_argument("--device", help="a profile's name or FILE.toml, for the prediction")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = chosen_device(given.device)
    load = os.getloadavg()[0]
    print(
        f"{datetime.date.today()}  {cpu_name()}, {os.cpu_count()} cores, load {load:.1f}; predicted for {device.title}"
    )
    print(f"{'':<28}{'measured speed':<19} predicted by access    GPU    ARM")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            for times in given.columns:
                for row in experiment(name, times, device, given.seconds, Path(folder)):
                    rows.append(row)
                    print(line(row), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": str(datetime.date.today()), "hardware": f"{cpu_name()}, {os.cpu_count()} cores", "load": load,
             "seconds": given.seconds, "device": device.model_dump(),
             "source": "Ma et al. 2018, arXiv:1807.11164, tables 1 to 4"}  # fmt: skip
    write_json(given.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
