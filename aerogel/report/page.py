"""The report of a run: one HTML page that opens anywhere without a network, and the same facts as JSON.

A report is a JSON-able dict of version 1. Every part but `version` may be absent (a run that stopped early):
the page leaves that part out. Names come from users' models and folders, so nothing in a report is trusted:
jinja2 escapes all text, labels are escaped for plotly too, plots travel as JSON data and never as code, and
the page's content security policy runs only the scripts whose hashes it names and loads nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Undefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from aerogel.errors import AerogelError
from aerogel.files import write_json, write_text
from aerogel.report.drawing import GREY, LINES, ORANGE, STROKES, TEAL, Figure, label, layout, numbers, scatter, short
from aerogel.report.sparse import kept_bars
from aerogel.report.taught import confusion_map, disagreements, reliability
from aerogel.report.terminal import (
    dig,
    exact,
    flat,
    human,
    is_number,
    outcome,
    percent,
    rows,
    scale,
    spread,
    tiny,
    visible,
)

VERSION = 1
MAX_POINTS = 1000  # drawn on one curve
MAX_BARS = 30  # layers drawn; the table has them all
MAX_CURVES = 12  # groups drawn of a scan; the table has them all
DASHES = {"color": ORANGE, "width": 2, "dash": "dash"}
MARKERS = {
    "candidate": {"symbol": "circle-open", "color": GREY, "size": 9},
    "frontier": {"symbol": "circle", "color": TEAL, "size": 9},
    "shipped": {"symbol": "star", "color": ORANGE, "size": 15},
    "baseline": {"symbol": "square", "color": GREY, "size": 11},
}


def render(report: dict[str, Any]) -> str:
    """The report as one self-contained HTML page.

    Raises AerogelError for a version that this aerogel does not know, or a value that JSON cannot hold.
    """
    report = plain(report)
    plots = figures(report)
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            outcome=outcome(report),
            rows=rows(report),
            spread=spread,
            bullet=bullet,
            disagreements=disagreements,
            plots=plots,
            plotly=Markup(get_plotlyjs()) if plots else "",
        )
    )


def environment() -> Environment:
    """jinja2 for the pages beside this file: everything that is printed is escaped, and the invisible made visible."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (exact, human, percent, script_hash, tiny):
        made.filters[function.__name__] = function
    return made


def write(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes report.html and report.json into `folder`, each whole or not at all; returns the two paths.

    Numbers that are not finite become null. Raises AerogelError as `render` does, or when the disk refuses.
    """
    page, data = Path(folder) / "report.html", Path(folder) / "report.json"
    text = render(report)
    write_json(data, plain(report))
    write_text(page, text)
    return page, data


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `report` in JSON's own types, NaN and infinity as None; refuses an unknown version."""
    try:
        copy = json.loads(json.dumps(report), parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise AerogelError(
            f"report: every value must be JSON-able ({error}); give numbers, text, lists, dicts"
        ) from error
    version = copy.get("version") if isinstance(copy, dict) else None
    if version != VERSION:
        raise AerogelError(
            f"report: version must be {VERSION}, got {version!r}; read it with the aerogel that wrote it"
        )
    return copy


def printed(value: Any) -> Any:
    """What the page shows for `value`: `-` for nothing, lists and dicts flat, the invisible escaped."""
    if isinstance(value, Markup):
        return value
    return visible("-" if isinstance(value, Undefined) else flat(value), keep="\n\t")


def script_hash(script: str) -> str:
    """The source expression by which a content security policy allows exactly this inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def bullet(goal: dict[str, Any]) -> dict[str, float] | None:
    """Where a goal's interval, value and limit lie on one line, in percent; None without value or limit."""
    value, limit = goal.get("value"), goal.get("limit")
    if not (is_number(value) and is_number(limit)):
        return None
    low, high = (end if is_number(end) else value for end in (goal.get("low"), goal.get("high")))
    start, stop = min(0, low, limit), max(high, value, limit)
    stretch = 92 / (stop - start) if stop > start else 0
    places = {"low": low, "high": high, "value": value, "limit": limit}
    return {name: round((place - start) * stretch, 2) for name, place in places.items()}


# The plots, as the plain dicts that plotly.js draws.


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """Every plot that the report has numbers for, by the id of its place on the page."""
    curves = report.get("curves") or []
    names = dict.fromkeys(name for curve in curves for name in curve.get("series") or {})
    plots = {
        "frontier": frontier(report),
        "scan": scan_curves(report.get("scan") or {}),
        "scales": scale_bars(report.get("scales") or {}),
        "kept": kept_bars(report.get("pruned") or {}),
        "confusion": confusion_map(dig(report, "distillation", "confusion") or {}),
        "reliability": reliability(dig(report, "distillation", "reliability") or {}),
        "layers-macs": layer_bars(report, "macs", "MACs", "count"),
        "layers-access": layer_bars(report, "access", "Access bytes", "bytes"),
    } | {f"curve-{i}": training_curves(curves, name) for i, name in enumerate(names)}
    return {place: plot for place, plot in plots.items() if plot is not None}


def frontier(report: dict[str, Any]) -> Figure | None:
    """Candidates by cost (latency ratio, else MACs) and validation accuracy, with baseline and goals."""
    candidates = report.get("candidates") or []
    by_latency = any(is_number(c.get("latency_ratio")) for c in candidates)
    key, unit, title = ("macs", "count", "MACs")
    if by_latency:
        key, unit, title = ("latency_ratio", "x", "latency, after / before")
    points = [c for c in candidates if is_number(c.get(key)) and is_number(c.get("val_accuracy"))]
    if not points:
        return None
    cost = 1.0 if by_latency else dig(report, "before", "macs")
    accuracy, known = dig(report, "before", "val_accuracy"), "baseline"
    if not is_number(accuracy):
        accuracy, known = dig(report, "before", "accuracy", "value"), "baseline (test accuracy)"
    groups = {
        "candidate": [c for c in points if not c.get("frontier")],
        "frontier": sorted((c for c in points if c.get("frontier")), key=lambda c: c[key]),
        "shipped": [c for c in points if c.get("shipped")],
        "baseline": [{"name": known, key: cost, "val_accuracy": accuracy}],
    }
    if not (is_number(cost) and is_number(accuracy)):
        del groups["baseline"]
    traces = []
    for name, group in groups.items():
        if group:
            trace = scatter(known if name == "baseline" else name, [(c[key], c["val_accuracy"]) for c in group])
            text = [f"{label(c.get('name'))}<br>{human(c[key], unit)}, {c['val_accuracy']:.2f} %" for c in group]
            mode = "lines+markers" if name == "frontier" else "markers"
            look = {"mode": mode, "marker": MARKERS[name], "line": {"color": TEAL, "width": 2}}
            traces.append(trace | look | {"text": text, "hoverinfo": "text"})
    plot = layout(title, "validation accuracy, %")
    plot["shapes"] = goal_lines(report, by_latency, cost, accuracy)
    if plot["shapes"]:  # a line without points, so that the legend explains the dashes
        traces.append(scatter("goal", [(None, None)]) | {"mode": "lines", "line": DASHES})
    return {
        "caption": "Validation accuracy against cost; up and left is better.",
        "data": traces,
        "layout": plot,
    }


def goal_lines(report: dict[str, Any], by_latency: bool, cost: Any, accuracy: Any) -> list[Figure]:
    """Dashed lines at the goals' limits where these can be placed: cost upright, accuracy drop level."""
    median = dig(report, "before", "latency", "median_ms")
    lines = []
    for goal in dig(report, "verdict", "goals") or []:
        name, unit, limit = goal.get("name"), goal.get("unit"), goal.get("limit")
        if not is_number(limit):
            continue
        if name == "accuracy drop" and is_number(accuracy):
            lines.append({"xref": "paper", "x0": 0, "x1": 1, "y0": accuracy - limit, "y1": accuracy - limit})
        elif name == ("latency" if by_latency else "macs"):
            factor = {"x": cost, "ms": 1 / median if is_number(median) and median else None}.get(unit, 1.0)
            if is_number(factor):
                lines.append({"yref": "paper", "y0": 0, "y1": 1, "x0": limit * factor, "x1": limit * factor})
    return [{"type": "line", "layer": "between", "line": DASHES} | line for line in lines]


def layer_bars(report: dict[str, Any], key: str, title: str, unit: str) -> Figure | None:
    """Horizontal bars of the layers before and after, in the network's order; only the dearest of many."""
    sides = {"before": f"{key}_before", "after": f"{key}_after"}
    layers = [x for x in report.get("layers") or [] if any(is_number(x.get(side)) for side in sides.values())]
    if not layers:
        return None
    dearest = sorted(range(len(layers)), key=lambda i: -(layers[i].get(sides["before"]) or 0))[:MAX_BARS]
    drawn = [layers[i] for i in sorted(dearest)]
    values = [[x.get(side) for x in drawn] for side in sides.values()]
    factor, prefix = scale(max(v for row in values for v in row if is_number(v)), unit)
    places = list(range(len(drawn)))
    names = [label(x.get("name")) for x in drawn]
    traces = []
    for side, row, color in zip(sides, values, (GREY, TEAL), strict=True):
        text = [f"{name}<br>{side}: {human(value, unit)}" for name, value in zip(names, row, strict=True)]
        bars = {
            "x": [value / factor if is_number(value) else None for value in row],
            "y": places,
            "text": text,
        }
        look = {"orientation": "h", "marker": {"color": color}, "hoverinfo": "text", "textposition": "none"}
        traces.append({"type": "bar", "name": side} | bars | look)
    plot = layout(f"{title}, {prefix}" if prefix else title, "", height=110 + 26 * len(drawn))
    ticks = [label(short(flat(x.get("name")))) for x in drawn]
    plot["yaxis"] |= {"tickvals": places, "ticktext": ticks, "range": [len(drawn) - 0.5, -0.5]}
    plot["yaxis"] |= {"showgrid": False, "ticklabelstandoff": 6}
    plot["xaxis"]["rangemode"] = "tozero"
    count = f"the {len(drawn)} dearest of {len(layers)} layers" if len(drawn) < len(layers) else "each layer"
    return {"caption": f"{title} of {count}.", "data": traces, "layout": plot | {"bargap": 0.3}}


def training_curves(curves: Sequence[dict[str, Any]], name: str) -> Figure | None:
    """One quantity over the training steps, a line for each training that recorded it."""
    traces = []
    for i, curve in enumerate(curves):
        pairs = zip(curve.get("x") or [], dig(curve, "series", name) or [], strict=False)
        points = [(x, y) for x, y in pairs if is_number(x) and is_number(y)]
        points = points[:: len(points) // MAX_POINTS + 1]
        if points:
            mode = "lines" if len(points) > 40 else "lines+markers"
            look = {"mode": mode, "line": {"width": 1.6, "color": LINES[i % len(LINES)]}}
            traces.append(scatter(label(curve.get("name")), points) | look)
    plot = layout("step", "", height=280) | {"showlegend": True}
    return {"caption": f"{name} by training step.", "data": traces, "layout": plot} if traces else None


def scan_curves(scan: dict[str, Any]) -> Figure | None:
    """Accuracy against the share of a group that is gone, a line a group; of many, the most sensitive."""
    shares, whole = scan.get("shares") or [], scan.get("whole")
    groups = {name: curve for name, curve in (scan.get("groups") or {}).items() if numbers(dig(curve, "values"))}
    if not groups or not numbers(shares):
        return None
    drawn = sorted(groups, key=lambda name: sum(groups[name]["values"]))[:MAX_CURVES]
    unit, what = ("layer", "weight") if scan.get("unit") == "weights" else ("group", "channel")
    traces: list[Figure] = []
    for i, name in enumerate(name for name in groups if name in drawn):
        curve = groups[name]
        start = [(0.0, whole)] if is_number(whole) else []
        points = start + [(100 * share, value) for share, value in zip(shares, curve["values"], strict=False)]
        whom = f"of {flat(curve.get('channels'))} {what}s"
        text = [f"{label(name)}<br>{x:.0f} % {whom} gone: {y:.2f} %" for x, y in points]
        line = {"width": 1.6, "color": LINES[i % len(LINES)], "dash": STROKES[i // len(LINES) % len(STROKES)]}
        look = {"mode": "lines+markers", "line": line, "marker": {"size": 5}, "text": text, "hoverinfo": "text"}
        traces.append(scatter(label(short(flat(name))), points) | look)
        if numbers(curve.get("retrained")):
            points = start + [(100 * share, value) for share, value in zip(shares, curve["retrained"], strict=False)]
            again = {"mode": "lines", "line": line | {"dash": "dot"}, "hoverinfo": "y"}
            traces.append(scatter(f"{label(short(flat(name)))}, trained again", points) | again)
    plot = layout(f"% of the {unit}'s {what}s removed, all others whole", "validation accuracy, %", height=420)
    count = f"the {len(drawn)} most sensitive of {len(groups)} {unit}s" if len(drawn) < len(groups) else f"every {unit}"
    how = "and after retraining" if scan.get("retrained") else "without retraining"
    return {"caption": f"Accuracy {how}, {count}.", "data": traces, "layout": plot | {"showlegend": True}}


def scale_bars(scales: dict[str, Any]) -> Figure | None:
    """Histograms of the batch norms' |gamma|, network by network, over common bins."""
    edges = scales.get("edges") or []
    counts = {name: row for name, row in (scales.get("counts") or {}).items() if numbers(row)}
    if len(edges) < 2 or not numbers(edges) or not counts:
        return None
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    traces = []
    for i, (name, row) in enumerate(counts.items()):
        color = (GREY, ORANGE, TEAL)[i % 3]
        steps = {"mode": "lines", "line": {"shape": "hvh", "width": 2, "color": color}}
        traces.append(scatter(label(name), list(zip(middles, row, strict=False))) | steps)
    plot = layout("|gamma| of a batch norm's channel", "channels", height=300) | {"showlegend": True}
    return {"caption": "Batch-norm scales before and after.", "data": traces, "layout": plot}
