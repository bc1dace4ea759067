"""Does the recommended temperature hold? Short students at several T, errors on the VALIDATION split.

    python benchmarks/temperature.py [--only mnist fashion_mnist] [--seeds 0 1 2] [--table]

A teacher (784-800-800-10, 5 epochs on all training images, shifted by up to 2 pixels) is asked by
`aerogel.distill.temperature` which T to try. Then students of 30 and of 300 hidden units learn from its soft targets
alone, from 10,000 training images as they are, at every T of TEMPERATURES; all from one cache of the teacher's
answers. Each row is written as soon as it is measured, to benchmarks/results/temperature.json; a second run goes on
from there. One thread: `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from aerogel import data, nets
from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset
from aerogel.distill import Distil, Teacher, TeacherCache
from aerogel.distill.temperature import moved, recommend
from aerogel.files import write_json
from aerogel.train import HardLabels, Recipe, accuracy, fit, predict, start

RESULTS = Path(__file__).parent / "results" / "temperature.json"
SETS = ("mnist", "fashion_mnist")
WIDTHS = (30, 300)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
IMAGES = 10_000
TEACHER = Recipe(epochs=5, batch_size=250, lr=0.1, augment="shift", warmup=0.5)
STUDENT = Recipe(epochs=6, batch_size=100, lr=0.1, augment="none", warmup=0.5, weight_decay=0.0)
CONDITIONS = {"teacher": TEACHER.model_dump(), "student": STUDENT.model_dump(), "images": IMAGES, "split": "val",
              "hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    options = parser.parse_args()
    held = json.loads(options.out.read_text()) if options.out.exists() else {"rows": [], "recommended": {}}
    if not options.table:
        torch.set_num_threads(1)
        for name in options.only:
            measure(name, options.seeds, held, options.out)
    print(table(held))


def measure(name: str, seeds: list[int], held: dict[str, Any], out: Path) -> None:
    """Adds what is missing of one data set to `held`, and writes it."""
    known = {(row["data"], row["width"], row["T"], row["seed"]) for row in held["rows"]}
    cells = [cell for cell in itertools.product((name,), WIDTHS, TEMPERATURES, seeds) if cell not in known]
    if not cells:
        return
    whole = data.load(name)
    teacher = taught(whole)
    logits = predict(teacher, whole, "val")
    rows = moved(logits, whole.val.labels)
    found = recommend(rows, whole.num_classes)
    held["recommended"][name] = {
        "teacher_errors": errors(teacher, whole), **dataclasses.asdict(found),
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    print(name, held["recommended"][name]["teacher_errors"], found, flush=True)
    few = dataclasses.replace(whole, train=whole.train.subset(slice(0, IMAGES)))
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            began = time.process_time()
            student = learned(teacher, few, Path(folder) / "answers", *cell[1:])
            row = dict(zip(("data", "width", "T", "seed"), cell, strict=True))
            row |= {"errors": errors(student, few), "seconds": round(time.process_time() - began, 1)}
            held["rows"].append(row | {"date": date.today().isoformat()})
            write_json(out, {"conditions": CONDITIONS, **held})
            print(json.dumps(row), flush=True)


def taught(whole: Dataset) -> nn.Module:
    torch.manual_seed(0)
    net = nets.build("mlp", widths="800-800", dropout=0.2)
    return fit(start(net, HardLabels(), whole, TEACHER), whole)


def learned(teacher: nn.Module, few: Dataset, folder: Path, width: int, temperature: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nets.build("mlp", widths=width)
    recipe = STUDENT.model_copy(update={"seed": seed})
    cache = TeacherCache(folder, few, recipe)
    objective = Distil(Teacher(teacher, cache=cache), {"kd": 1.0}, temperature)
    return fit(start(net, objective, few, recipe), few)


def errors(model: nn.Module, whole: Dataset) -> float:
    """Percent of the validation split."""
    return round(100 - accuracy(model, whole, "val"), 3)


def table(held: dict[str, Any]) -> str:
    """Mean errors and standard deviation over seeds, by T."""
    lines = []
    for name, found in held["recommended"].items():
        lines.append(f"{name}: teacher {found['teacher_errors']} %; T {found['low']:g} to {found['high']:g}, a small "
                     f"student from {found['small']:g}")  # fmt: skip
        for width in WIDTHS:
            cells = []
            for heat in TEMPERATURES:
                ours = [r["errors"] for r in held["rows"] if (r["data"], r["width"], r["T"]) == (name, width, heat)]
                spread = f" +- {stdev(ours):.2f}" if len(ours) > 1 else ""
                cells.append(f"T {heat:g}: {mean(ours):.2f}{spread}" if ours else f"T {heat:g}: -")
            lines.append(f"  {width:>4} units  " + "   ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
