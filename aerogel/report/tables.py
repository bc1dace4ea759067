"""The table of `aerogel nets`, and any table as text on a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from aerogel.report.terminal import human

WIDTH = 110


def zoo_table(rows: list[dict[str, Any]]) -> str:
    """One network a line, ours beside what its paper prints (millions; the paper's top-1 on ImageNet)."""
    ours, theirs = ("params", "MACs", "access", "peak"), ("paper: params", "MACs", "top-1")
    table = Table("net", "input", *(_right(name) for name in ours + theirs), box=None)
    for row in rows:
        size, paper = "x".join(map(str, row["input"][1:])), row["paper"] or {}
        counts = [human(row[key], "count") for key in ("params", "macs")]
        counts += [human(row[key], "bytes") for key in ("access_bytes", "peak_bytes")]
        printed = [f"{paper[key]:g}{unit}" if key in paper else "" for key, unit in _PRINTED.items()]
        table.add_row(row["net"], size, *counts, *printed)
    return "\n".join(_lines(table))


_PRINTED = {"params_M": " M", "madds_M": " M", "top1": " %"}  # what nets.paper holds, in this order


def _right(title: str) -> Column:
    return Column(title, justify="right")


def _lines(table: Table) -> list[str]:
    stream = io.StringIO()
    plain = Console(
        file=stream, width=WIDTH, force_terminal=False, color_system=None, markup=False, highlight=False, emoji=False
    )
    plain.print(table)
    return [line.rstrip() for line in stream.getvalue().rstrip().split("\n")]
