"""What the plots of all pages are made of: colours, a layout, lines, and names that are safe to show."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from aerogel.report.terminal import flat, is_number, visible

STROKES = ("solid", "dot", "dash")
GREY, TEAL, ORANGE = "#87909c", "#1a9a7c", "#d1641b"  # mid-tones: they read on white and on black
LINES = (TEAL, ORANGE, "#8a6fd1", "#3b82c4", "#c45a93", "#8f8a2a")

Figure = dict[str, Any]


def numbers(values: Any) -> bool:
    """True of a list of finite numbers, at least one."""
    return isinstance(values, list) and len(values) > 0 and all(is_number(value) for value in values)


def scatter(name: str, points: Sequence[tuple[Any, Any]]) -> Figure:
    x, y = zip(*points, strict=True)
    return {"type": "scatter", "name": name, "x": x, "y": y}


def layout(x: str, y: str, height: int = 380) -> Figure:
    """A plain transparent layout; the page's style sheet colours text and grid for light and dark."""
    axis = {"automargin": True, "fixedrange": True, "zeroline": False}
    return {
        "height": height,
        "dragmode": False,  # a finger that scrolls the page must not zoom the plot
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 8, "r": 12, "t": 36, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y}},
    }


def label(name: Any) -> str:
    """A name for plotly, which reads a little HTML in its labels."""
    return html.escape(visible(flat(name)), quote=False)


def short(name: str, width: int = 22) -> str:
    """The end of a dotted name, where the names of layers differ."""
    return name if len(name) <= width else "..." + name[3 - width :]
