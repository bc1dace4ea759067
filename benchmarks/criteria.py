"""Which criterion and which ranking should be the default: accuracy right after the cut, and after a short fine-tune.

    python benchmarks/criteria.py [--only NET ...] [--seeds 0 1] [--criteria NAME ...] [--rankings NAME ...] [--table]

Two small networks are trained on Fashion-MNIST at 16 x 16 pixels, then cut to a share of their MACs by every criterion
under every ranking, without recalibrating batch norms, and fine-tuned for a few steps. Accuracy is of the VALIDATION
split: this is to choose by, not to report. Evidence of the data-driven criteria is gathered on training batches. Each
row is written as soon as it is measured, to benchmarks/results/criteria.json; a second run goes on from there. --table
prints the means over seeds. One thread: `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from aerogel import data, nets
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset, batches
from aerogel.data.prepare import resized
from aerogel.files import write_json
from aerogel.graph import capture
from aerogel.graph.resize import resize
from aerogel.prune import CRITERIA, Evidence, criterion, gather
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.criteria import EVIDENCE
from aerogel.prune.plan import plan
from aerogel.prune.price import measure
from aerogel.prune.proof import named_weights, slices, to_tensors
from aerogel.prune.rank import RANKINGS, scores
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

RESULTS = Path(__file__).parent / "results" / "criteria.json"
NETS: dict[str, dict[str, Any]] = {
    "vgg11": {"width": 0.25, "num_classes": 10, "in_channels": 1, "input_size": 16},
    "resnet20": {"width": 0.5, "num_classes": 10, "in_channels": 1},
}
KEEP = (0.5, 0.25)  # of the MACs
TRAIN = {"epochs": 2.0, "lr": 0.1}
TUNE = {"epochs": 0.1, "lr": 0.02, "warmup": 0.0}  # 42 steps of 128
BATCHES = 8  # of 128, for evidence
# With raw scores as the papers have them: one threshold for the whole network.
RAW = tuple((name, "none") for name in ("bn_scale", "taylor", "hessian"))
CONDITIONS = {"data": "fashion_mnist at 16 x 16", "nets": NETS, "train": TRAIN, "tune": TUNE, "batches": BATCHES,
              "hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}  # fmt: skip
VARIANTS = [*((name, None) for name in CRITERIA), *RAW]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--rankings", nargs="+", choices=RANKINGS, default=list(RANKINGS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if not options.table:
        torch.set_num_threads(1)
        fashion = resized(data.load("fashion_mnist"), (1, 16, 16))
        for name, seed in itertools.product(options.only, options.seeds):
            known = {key_of(row) for row in rows}
            cells = [
                cell for cell in cells_of(name, seed)
                if cell["criterion"] in options.criteria and cell["ranking"] in options.rankings
                and key_of(cell) not in known
            ]  # fmt: skip
            for row in measured(name, seed, fashion, cells) if cells else ():
                rows.append(row)
                write_json(options.out, {"conditions": CONDITIONS, "rows": rows})
                print(json.dumps(row), flush=True)
    print(table(rows))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("net", "seed", "keep", "criterion", "normalize", "ranking"))


def cells_of(name: str, seed: int) -> list[dict[str, Any]]:
    """What is to be measured of one network and seed."""
    return [
        {"net": name, "seed": seed, "keep": keep, "criterion": how, "normalize": normalize, "ranking": ranking}
        for keep, (how, normalize), ranking in itertools.product(KEEP, VARIANTS, RANKINGS)
    ]


def measured(name: str, seed: int, fashion: Dataset, cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Trains the network, then a row for each cell."""
    began = time.process_time()
    torch.manual_seed(seed)
    net = nets.build(name, **NETS[name])
    recipe = Recipe(**TRAIN, seed=seed)
    net = fit(start(net, HardLabels(), fashion, recipe), fashion)
    whole = accuracy(net, fashion, "val")
    print(f"{name} seed {seed}: {whole:.2f} % of validation, {time.process_time() - began:.0f} s", flush=True)
    seen = gather(net, itertools.islice(batches(fashion, "train", 128, seed=seed, shuffle=True), BATCHES), seed=seed)
    coupling = couple(capture(net, (torch.zeros(1, *fashion.input_shape),)))
    for cell in cells:
        began = time.process_time()
        torch.manual_seed(seed)  # of the random criterion
        small, left = cut_by(net, coupling, seen, cell)
        at_once = accuracy(small, fashion, "val")
        tuned = fit(start(small, HardLabels(), fashion, Recipe(**TUNE, seed=seed)), fashion)
        yield cell | {
            "whole": round(whole, 2), "cut": round(at_once, 2), "tuned": round(accuracy(tuned, fashion, "val"), 2),
            "params": round(left["params"], 4), "channels": round(left["channels"], 4),
            "seconds": round(time.process_time() - began, 1), "date": date.today().isoformat(),
        }  # fmt: skip


def cut_by(
    net: nn.Module, coupling: Coupling, seen: Evidence, cell: dict[str, Any]
) -> tuple[nn.Module, dict[str, float]]:
    """The network cut as `aerogel.prune.cut` would, less the proof, which is of the coupling; and what is left."""
    evidence = seen if cell["criterion"] in EVIDENCE else None
    score = criterion(cell["criterion"], normalize=cell["normalize"], evidence=evidence)
    weights = named_weights(net)
    removed = plan(coupling, scores(coupling, weights, score), {"macs": cell["keep"]}, ranking=cell["ranking"])
    small = resize(copy.deepcopy(net), slices(weights, to_tensors(coupling.kept(removed))))
    left = {m: measure(coupling, m, removed) / measure(coupling, m) for m in ("params", "channels")}
    return small, left


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy over seeds, right after the cut and tuned: a line a criterion, a column a ranking."""
    lines = []
    for net, keep in itertools.product(NETS, KEEP):
        here = [row for row in rows if (row["net"], row["keep"]) == (net, keep)]
        if not here:
            continue
        whole = mean(row["whole"] for row in here)
        lines.append(f"\n{net}, MACs x{keep}: whole {whole:.2f} %; cut -> tuned, mean over seeds")
        lines.append(f"{'':16}" + "".join(f"{ranking:>18}" for ranking in RANKINGS))
        for how, normalize in VARIANTS:
            told = f"{how:16}" if normalize is None else f"{how + ', raw':16}"
            for ranking in RANKINGS:
                cell = [
                    row
                    for row in here
                    if (row["criterion"], row["normalize"], row["ranking"]) == (how, normalize, ranking)
                ]
                told += (
                    f"{mean(r['cut'] for r in cell):9.1f} ->{mean(r['tuned'] for r in cell):6.2f}"
                    if cell
                    else f"{'':>18}"
                )
            lines.append(told)
        spread = [stdev(r["tuned"] for r in cell) for cell in by_cell(here).values() if len(cell) > 1]
        if spread:
            lines.append(f"spread between seeds, tuned: {mean(spread):.2f} points on average")
    return "\n".join(lines)


def by_cell(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["criterion"], row["normalize"], row["ranking"]), []).append(row)
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
