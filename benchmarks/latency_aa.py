"""Is the latency comparison honest? Compares a file with itself, many times.

    python benchmarks/latency_aa.py [--trials 40] [--seconds 1] [--threads 1] [--file model.onnx]

Both are the same file, so every "faster" (the 95 % interval of B / A wholly below 1) is false; at most 5 %
may be. Prints also how far the ratio strays, how wide its interval is, and how well the median repeats.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aerogel.cost.latency import Ratio, compare
from aerogel.export.onnx import export_onnx


def small_network() -> nn.Sequential:
    """Three strided convolutions and a classifier for 3 x 64 x 64 inputs; about 0.1 ms a run."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def report(found: list[Ratio]) -> str:
    ratios = np.array([r.ratio.value for r in found])
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    width = np.median([r.ratio.high - r.ratio.low for r in found])
    medians = np.array([r.a.median_ms for r in found])
    spread = np.percentile(medians, [5, 95]) / np.median(medians) - 1
    faster = sum(r.ratio.high < 1 for r in found)
    slower = sum(r.ratio.low > 1 for r in found)
    return "\n".join(
        [
            f"false faster  {faster} of {len(found)} ({faster / len(found):.1%})",
            f"false slower  {slower} of {len(found)} ({slower / len(found):.1%})",
            f"ratio         median {middle:.4f}, 5-95 % {low:.4f} to {high:.4f}",
            f"interval      median width {width:.2%}",
            f"latency       {found[0].a.describe()}, medians 5-95 % {spread[0]:+.1%} to {spread[1]:+.1%}",
            f"noisy         {sum(r.a.noisy for r in found)} of {len(found)} trials",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0, help="per trial")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, help="an ONNX file; by default a small network is exported")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (
            given.file or export_onnx(small_network(), (torch.zeros(1, 3, 64, 64),), Path(folder) / "small.onnx").path
        )
        load = os.getloadavg()[0]
        found = [
            compare(path, path, threads=given.threads, seconds=given.seconds, seed=trial)
            for trial in range(given.trials)
        ]
    machine = f"{found[0].a.cpu}, {os.cpu_count()} cores, {found[0].a.runtime}"
    print(f"{datetime.date.today()}  {machine}, load {load:.2f} to {os.getloadavg()[0]:.2f}")
    print(f"{given.file or 'small network'}, {given.trials} trials of {given.seconds:g} s, threads {given.threads}")
    print(report(found))


if __name__ == "__main__":
    main()
