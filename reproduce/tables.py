"""Puts the tables of reproduce/results/*.json into README.md and docs, between their markers. Never typed by hand.

python reproduce/tables.py          # after a reproduction; `--check` only says whether they are true
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from results import rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "reproduce" / "results"


COLUMNS = {"accuracy_before": " %", "accuracy_after": " %", "drop": " pt", "latency": "x", "macs": "x", "params": "x"}


def first_light() -> str:
    """The main job's two goals: mean and standard deviation over seeds."""
    held = {row["row"]: row for row in rows(RESULTS / "first_light.json")}
    lines = [
        "| job | seeds | PASS | top-1 before | top-1 after | drop | latency | MACs | params | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in (
        ("lenet5_mnist_latency", "LeNet-5, MNIST, `latency=0.5`"),
        ("vgg11_fashion_macs", "VGG-11 (width 0.25), Fashion-MNIST, `macs=0.25`"),
    ):
        if f"{name}_drop" not in held:
            continue
        one = held[f"{name}_pass"]
        minutes = sum(one["seconds"]) / len(one["seconds"]) / 60
        cells = [_cell(held[f"{name}_{row}"], unit) for row, unit in COLUMNS.items()]
        lines.append(
            f"| {title} | {len(one['ours'])} | {sum(one['ours']):.0f} of {len(one['ours'])} "
            f"| {' | '.join(cells)} | {minutes:.0f} |"
        )
    last = list(held.values())[-1]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `python reproduce/first_light.py`."])


def _cell(row: dict[str, Any], unit: str) -> str:
    spread = f" ± {row['sd']:.2f}" if row["sd"] is not None else ""
    return f"x{row['mean']:.2f}{spread}" if unit == "x" else f"{row['mean']:.2f}{spread}{unit}"


TABLES = {"first_light": (ROOT / "README.md", first_light)}


def main() -> None:
    stale = []
    for name, (path, table) in TABLES.items():
        text = path.read_text()
        block = f"<!-- table:{name} -->\n{table()}\n<!-- /table -->"
        new = re.sub(rf"<!-- table:{name} -->.*?<!-- /table -->", lambda _, b=block: b, text, flags=re.S)
        if new != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'nothing'}")
    if stale and "--check" in sys.argv:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
