"""The plots of a distillation: where teacher and student part, and how far their confidence can be believed."""

from __future__ import annotations

import math
from typing import Any

from aerogel.report.drawing import GREY, ORANGE, TEAL, Figure, label, layout, numbers, scatter, short
from aerogel.report.terminal import exact, flat, human

MAX_CLASSES = 40  # drawn of a confusion; those on which student and teacher part most
MAX_PAIRS = 10  # of a class by the teacher and another by the student, in the table
COUNTED = 20  # classes up to which the counts are written into the map


def confusion_map(confusion: Figure) -> Figure | None:
    """The teacher's answers down, the student's across, a cell a pair: grey where they agree, else orange."""
    counts, names = _counts(confusion), [flat(name) for name in confusion.get("classes") or []]
    if counts is None or len(names) != len(counts):
        return None
    drawn = apart(counts, MAX_CLASSES)
    cells = [[counts[a][b] for b in drawn] for a in drawn]
    hints = [
        [f"teacher {label(names[a])}<br>student {label(names[b])}: {exact(counts[a][b])}" for b in drawn] for a in drawn
    ]
    traces = [
        _cells(
            [[n if (i == j) == same else None for j, n in enumerate(row)] for i, row in enumerate(cells)], hints, color
        )
        for same, color in ((True, GREY), (False, ORANGE))
    ]
    plot = layout("the student's answer", "the teacher's answer", height=140 + 24 * len(drawn))
    places, ticks = list(range(len(drawn))), [label(short(names[i], 16)) for i in drawn]
    for axis in ("xaxis", "yaxis"):
        plot[axis] |= {"tickvals": places, "ticktext": ticks, "showgrid": False}
    plot["yaxis"]["range"] = [len(drawn) - 0.5, -0.5]
    plot["xaxis"]["constrain"] = "domain"
    whole = confusion.get("of") or len(counts)
    some = f", the {len(drawn)} of {whole} classes on which they part most" if len(drawn) < whole else ""
    return {"caption": f"Answers on the test images, counted{some}.", "data": traces, "layout": plot}


def _cells(counts: list[list[Any]], hints: list[list[str]], color: str) -> Figure:
    shades = [[None if n is None else math.log1p(n) for n in row] for row in counts]
    text = [[str(n) if n else "" for n in row] for row in counts]
    look = {"colorscale": [[0, "rgba(135, 144, 156, 0.04)"], [1, color]], "showscale": False, "xgap": 1, "ygap": 1}
    written = {"text": text, "texttemplate": "%{text}"} if len(counts) <= COUNTED else {}
    return {"type": "heatmap", "z": shades, "zmin": 0, "hovertext": hints, "hoverinfo": "text"} | look | written


def apart(counts: list[list[Any]], most: int) -> list[int]:
    """The classes, at most so many, that student and teacher tell apart least often alike; in their own order."""
    total = [sum(row) + sum(other[i] for other in counts) - 2 * row[i] for i, row in enumerate(counts)]
    return sorted(sorted(range(len(counts)), key=lambda i: -total[i])[:most])


def disagreements(confusion: Figure) -> list[dict[str, Any]]:
    """The most frequent pairs of different answers: [{"teacher", "student", "count"}]."""
    counts, names = _counts(confusion), confusion.get("classes") or []
    if counts is None or len(names) != len(counts):
        return []
    pairs = [(n, a, b) for a, row in enumerate(counts) for b, n in enumerate(row) if n and a != b]
    most = sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))[:MAX_PAIRS]
    return [{"teacher": names[a], "student": names[b], "count": n} for n, a, b in most]


def _counts(confusion: Figure) -> list[list[Any]] | None:
    """A square of numbers, or None."""
    counts = confusion.get("counts")
    good = isinstance(counts, list) and counts and all(numbers(row) and len(row) == len(counts) for row in counts)
    return counts if good else None


def reliability(sides: Figure) -> Figure | None:
    """Accuracy against confidence, by bins, of each network: below the diagonal it claims too much."""
    traces: list[Figure] = []
    for (name, bins), color in zip(sides.items(), (GREY, TEAL, ORANGE), strict=False):
        rows = [bins.get(key) for key in ("confidence", "accuracy", "counts")] if isinstance(bins, dict) else []
        if not rows or not all(numbers(row) for row in rows):
            continue
        points = [(100 * x, 100 * y, n) for x, y, n in zip(*rows, strict=False) if n]
        text = [
            f"{label(name)}<br>{human(x, '%')} sure, {human(y, '%')} right<br>{exact(n)} images" for x, y, n in points
        ]
        most = max((n for _, _, n in points), default=1)
        sizes = [5 + 13 * math.sqrt(n / most) for _, _, n in points]
        look = {
            "mode": "lines+markers",
            "line": {"width": 1.4, "color": color},
            "marker": {"size": sizes, "color": color},
        }
        traces.append(scatter(label(name), [(x, y) for x, y, _ in points]) | look | {"text": text, "hoverinfo": "text"})
    if not traces:
        return None
    level = {"mode": "lines", "line": {"width": 1, "dash": "dot", "color": GREY}, "showlegend": False}
    traces.append(scatter("as sure as right", [(0, 0), (100, 100)]) | level | {"hoverinfo": "skip"})
    plot = layout("confidence, %", "accuracy, %", height=340) | {"showlegend": True}
    return {"caption": "Confidence against accuracy on the test images, in 15 bins.", "data": traces, "layout": plot}
