"""A table with its units, as lines for a terminal, as CSV with exact numbers, and as Markdown for a comment."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column as RichColumn
from rich.table import Table

from aerogel.console import printable
from aerogel.report.terminal import digits, flat, human, is_number, visible

MAX_WIDTH = 160


@dataclass(frozen=True)
class Column:
    """unit: "" for text, "shape", "exact" (a count to the last digit), "bytes", "ms", "x", "%" or "number"."""

    key: str
    title: str
    unit: str = ""

    @property
    def is_text(self) -> bool:
        return self.unit in ("", "shape")


@dataclass(frozen=True)
class Sheet:
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        return [cell(row.get(column.key), column.unit) for column in self.columns]


def cell(value: Any, unit: str) -> str:
    """As a person reads it; "-" for a number that is not known, nothing for a text that is not there."""
    if unit == "shape":
        return "x".join(map(str, value or ()))
    if unit == "":
        return "" if value is None else visible(flat(value))
    if not is_number(value):
        return "-"
    if unit == "exact":
        return f"{value:,}"
    return digits(value) if unit in ("ms", "number") else human(value, unit)


def as_lines(sheet: Sheet, rows: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """Aligned columns, of `rows` or all rows; names are printed as they are, but for what controls a terminal."""
    heads = (RichColumn(c.title, justify="left" if c.is_text else "right", overflow="fold") for c in sheet.columns)
    table = Table(*heads, box=None)
    for row in sheet.rows if rows is None else rows:
        table.add_row(*map(printable, sheet.cells(row)))
    stream = io.StringIO()
    plain = Console(file=stream, width=MAX_WIDTH, force_terminal=False, color_system=None, markup=False,
                    highlight=False, emoji=False)  # fmt: skip
    plain.print(table)
    return [line.rstrip() for line in stream.getvalue().rstrip().split("\n")]


def as_csv(sheet: Sheet) -> str:
    """The keys as header, numbers in full. A name that a spreadsheet would run as a formula gets a quote before it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.key for column in sheet.columns])
    for row in sheet.rows:
        writer.writerow([_csv_cell(row.get(column.key), column.unit) for column in sheet.columns])
    return stream.getvalue()


def as_markdown(sheet: Sheet, rows: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """The lines of a GitHub table; texts stand in code spans, so that nothing in a name is read as Markdown."""
    lines = [
        "| " + " | ".join(column.title for column in sheet.columns) + " |",
        "|" + "|".join("---" if column.is_text else "--:" for column in sheet.columns) + "|",
    ]
    for row in sheet.rows if rows is None else rows:
        cells = zip(sheet.cells(row), sheet.columns, strict=True)
        lines.append("| " + " | ".join(code(text) if column.is_text else text for text, column in cells) + " |")
    return lines


def code(text: str) -> str:
    """A Markdown code span of any text, also within a table."""
    if not text:
        return ""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def _csv_cell(value: Any, unit: str) -> Any:
    if value is None:
        return ""
    if unit == "shape":
        return cell(value, unit)
    if unit == "":
        text = visible(flat(value))
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value
