"""The tables of `aerogel nets` and `aerogel cost`, as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from aerogel.console import printable
from aerogel.report.terminal import human

WIDTH = 100


def zoo_table(rows: list[dict[str, Any]]) -> str:
    """One network a line."""
    table = Table("net", "input", *(_right(n) for n in ("params", "MACs", "access", "peak")), box=None)
    for row in rows:
        size = "x".join(map(str, row["input"][1:]))
        table.add_row(row["net"], size, human(row["params"], "count"), human(row["macs"], "count"),
                      human(row["access_bytes"], "bytes"), human(row["peak_bytes"], "bytes"))  # fmt: skip
    return "\n".join(_lines(table))


def cost_table(model: str, found: dict[str, Any]) -> str:
    """Layers that do work, then the totals and what was not counted."""
    table = Table("layer", "op", "output", *(_right(n) for n in ("params", "MACs", "access")), box=None)
    for layer in found["layers"]:
        if layer["macs"] or layer["access_bytes"]:
            shape = "x".join(map(str, layer["shape"]))
            table.add_row(layer["name"], layer["op"], shape, f"{layer['params']:,}", f"{layer['macs']:,}",
                          human(layer["access_bytes"], "bytes"))  # fmt: skip
    lines = [
        *_lines(table),
        f"{model}, input {'x'.join(map(str, found['input']))}",
        f"params {found['params']:,}   MACs {found['macs']:,}   FLOPs {found['flops']:,}",
        f"access {found['access_bytes']:,} bytes ({found['access_bytes_raw']:,} without fusion)   "
        f"peak {found['peak_bytes']:,} bytes at {found['peak_op']} ({found['peak_bytes_raw']:,} without fusion)",
    ]
    for op, modules in found["uncounted"].items():
        lines.append(f"not counted: {op} in {', '.join(modules)}")
    return "\n".join(map(printable, lines))


def _right(title: str) -> Column:
    return Column(title, justify="right")


def _lines(table: Table) -> list[str]:
    stream = io.StringIO()
    plain = Console(
        file=stream, width=WIDTH, force_terminal=False, color_system=None, markup=False, highlight=False, emoji=False
    )
    plain.print(table)
    return [line.rstrip() for line in stream.getvalue().rstrip().split("\n")]
