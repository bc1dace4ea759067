"""The main job on real data, several seeds: LeNet-5 on MNIST to half its latency, VGG-11 on Fashion-MNIST to a
quarter of its MACs. Writes results/first_light.json; a seed that is there already is not run again.

    AEROGEL_DATA=... python reproduce/first_light.py [--seeds 3]

The runs are `aerogel compress` as a user calls it, so every number is of the exported file on the test split; the
compressor itself saw only training and validation images. Times on 2 shared cores of an AMD EPYC (Zen 3).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import add, held_seeds

from aerogel.cost.latency import cpu_name

RESULTS = Path(__file__).parent / "results" / "first_light.json"
JOBS = {
    "vgg11_fashion_macs": "vgg11:width=0.5 --data fashion_mnist --target macs=0.25 --max-drop 1.0 --epochs 4 "
    "--config reproduce/fashion.toml",
    "lenet5_mnist_latency": "lenet5 --data mnist --target latency=0.5 --max-drop 0.3 --epochs 6 "
    "--config reproduce/recover_once.toml",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    for seed in range(parser.parse_args().seeds):
        for name, job in JOBS.items():
            if seed not in held_seeds(RESULTS, f"{name}_drop"):
                record(name, job, seed)


def record(name: str, job: str, seed: int) -> None:
    """Runs one job and adds its numbers to the results."""
    command = f"aerogel compress {job} --seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        words = [sys.executable, "-m", *command.split(), "--json", "--out", f"{folder}/run"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=RESULTS.parents[2])
        seconds = time.time() - began
        if done.returncode not in (0, 2):
            raise SystemExit(f"{command} failed with code {done.returncode}")
    for row, value, unit in measured(json.loads(done.stdout)):
        command = f"aerogel compress {job} --seed S"
        add(
            RESULTS,
            f"{name}_{row}",
            seed,
            value,
            unit=unit,
            command=command,
            hardware=f"{cpu_name()}, 2 cores",
            seconds=seconds,
        )


def measured(report: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(row, value, unit) of everything worth a table."""
    before, after = report["before"], report["after"]
    goals = {goal["name"]: goal for goal in report["verdict"]["goals"]}
    ratios = [(k, after[k] / before[k], "x") for k in ("macs", "params", "access_bytes", "peak_bytes", "file_bytes")]
    latency = after["latency"]["median_ms"] / before["latency"]["median_ms"]
    return [
        ("accuracy_before", before["accuracy"]["value"], "%"),
        ("accuracy_after", after["accuracy"]["value"], "%"),
        ("drop", goals["accuracy drop"]["value"], "pt"),
        ("drop_upper", goals["accuracy drop"]["high"], "pt"),
        ("latency", goals.get("latency", {"value": latency})["value"], "x"),
        ("latency_before_ms", before["latency"]["median_ms"], "ms"),
        ("latency_after_ms", after["latency"]["median_ms"], "ms"),
        *ratios,
        ("pass", float(report["verdict"]["pass"]), "1 = PASS"),
    ]


if __name__ == "__main__":
    main()
