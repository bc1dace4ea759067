"""A cost report (`aerogel.report.costing`) as one self-contained HTML page: treemaps, roofline, memory, tables.

Built as `aerogel.report.page` is, and as strict: names come from users' models, so everything is escaped, plots travel
as JSON data, the content security policy runs only the scripts whose hashes it names, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from aerogel.errors import AerogelError
from aerogel.report.cost_text import against_sheet, cost_sheet, summary, totals_sheet, verdict_lines
from aerogel.report.costing import ITSELF, SCHEMA, VERSION, grouped, within_budget
from aerogel.report.drawing import GREY, ORANGE, TEAL, Figure, label, layout, scatter, short
from aerogel.report.page import environment
from aerogel.report.terminal import digits, human, is_number

MAX_STEPS = 4000  # ops drawn on the timeline; of more, the highest of each stretch
MAX_TILES = 1500  # layers drawn in a treemap; the smallest of more go together as their module
MODULE = "rgba(135, 144, 156, 0.18)"
TILE_PAD = {"t": 20, "l": 2, "r": 2, "b": 2}
COLORS = {
    "conv": "#3b82c4", "pointwise": TEAL, "depthwise": ORANGE, "grouped": "#c45a93", "transposed": "#4f6bd8",
    "matmul": "#8a6fd1", "recurrent": "#6f54a8", "norm": "#8f8a2a", "pool": "#b08a3c", "reduce": "#7d9440",
    "elementwise": "#a8735a", "move": GREY, "unknown": "#b3261e", "view": GREY,
}  # fmt: skip
TREEMAPS = {
    "tree-macs": ("macs", "MACs", "count"),
    "tree-access": ("access_bytes", "Access bytes", "bytes"),
    "tree-ms": ("ms", "Predicted milliseconds", "ms"),
}


def render(report: Mapping[str, Any]) -> str:
    """The page. Raises AerogelError for a report of another schema or version."""
    known = (report.get("schema"), report.get("version"))
    if known != (SCHEMA, VERSION):
        raise AerogelError(
            f"cost page: the report must be {SCHEMA} version {VERSION}, got {known[0]} version {known[1]}; "
            "make it with this aerogel"
        )
    rows = grouped(report)
    plots = figures(report, rows)
    return (
        environment()
        .get_template("cost.html")
        .render(
            report=report,
            facts=summary(report)[1:],
            verdicts=verdict_lines(report),
            within=within_budget(report),
            sheets=sheets(report),
            families=[(name, color) for name, color in COLORS.items() if any(r.get("family") == name for r in rows)],
            treemaps=[place for place in TREEMAPS if place in plots],
            plots=plots,
            plotly=Markup(get_plotlyjs()) if plots else "",
        )
    )


def sheets(report: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, by title."""
    against = report.get("against")
    found = {}
    if against is not None:
        found = {"Totals": totals_sheet(report), "Layers of either network": against_sheet(against)}
    found |= {"By family of kernels": cost_sheet(report, "family")}
    found |= {"By module, down to two parts of its path": cost_sheet(report, "module", 2)}
    return found | {"By layer": cost_sheet(report)}


def figures(report: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Every plot that the report has numbers for, by the id of its place on the page."""
    plots = {place: treemap(rows, *measure) for place, measure in TREEMAPS.items()}
    plots |= {"roofline": roofs(report), "memory": memory(report)}
    return {place: plot for place, plot in plots.items() if plot is not None}


def treemap(rows: list[dict[str, Any]], key: str, title: str, unit: str) -> Figure | None:
    """Every layer's share as an area within its module; what costs nothing is not drawn."""
    drawn = [row for row in rows if "node" in row and is_number(row[key]) and row[key] > 0]
    if not drawn:
        return None
    total = sum(row[key] for row in drawn)
    tiles = _joined(_tiles(drawn, key))
    shares = [f"{human(tile['value'], unit)}, {100 * tile['value'] / total:.1f} %" for tile in tiles.values()]
    trace = {
        "type": "treemap",
        "ids": [label(place) for place in tiles],
        "labels": [label(tile["label"]) for tile in tiles.values()],
        "parents": [label(tile["parent"]) for tile in tiles.values()],
        "values": [tile["value"] if tile["leaf"] else 0 for tile in tiles.values()],
        "text": shares,
        "customdata": [label(tile["where"]) for tile in tiles.values()],
        "branchvalues": "remainder",
        "hovertemplate": "%{customdata}<br>%{text}<extra></extra>",
        "texttemplate": "%{label}<br>%{text}",
        "marker": {"colors": [tile["color"] for tile in tiles.values()], "line": {"width": 1}, "pad": TILE_PAD},
    }
    plot = layout("", "", height=460) | {"margin": {"l": 0, "r": 0, "t": 4, "b": 0}}
    return {"caption": f"{title} by module; the whole is {human(total, unit)}.", "data": [trace], "layout": plot}


def _tiles(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Modules and the layers in them by a path that no two share; a module's value is that of all below it."""
    small = {row["node"] for row in sorted(rows, key=lambda row: -row[key])[MAX_TILES:]}
    root = {"label": "network", "parent": "", "value": 0, "color": MODULE, "leaf": False, "where": ITSELF}
    tiles = {"/": root}
    for row in rows:
        above, parts = "/", row["module"].split(".") if row["module"] else []
        tiles["/"]["value"] += row[key]
        for depth, part in enumerate(parts, start=1):
            place, where = "/" + "/".join(parts[:depth]), ".".join(parts[:depth])
            new = {"label": part, "parent": above, "value": 0, "color": MODULE, "leaf": False, "where": where}
            tiles.setdefault(place, new)["value"] += row[key]
            above = place
        name, color = row["op"].partition("+")[0], COLORS.get(row["family"], GREY)
        if row["node"] in small:
            name, color = "smaller layers", GREY
        place = f"{above}//{name if row['node'] in small else row['node']}"
        leaf = {"parent": above, "value": 0, "leaf": True}
        leaf |= {"label": name, "color": color, "where": f"{row['name']} ({name})"}
        tiles.setdefault(place, leaf)["value"] += row[key]
    return tiles


def _joined(tiles: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A module with one part alone is drawn as that part, under both names: `expand.conv`."""
    children: dict[str, list[str]] = {}
    for place, tile in tiles.items():
        children.setdefault(tile["parent"], []).append(place)
    found = dict(tiles)
    for place in reversed(list(tiles)):  # from the deepest up: a tile stands after its parent
        below = children.get(place, [])
        if len(below) != 1 or place == "/":
            continue
        module, (only,) = found.pop(place), below
        part = found[only]
        name = module["label"] if part["leaf"] else f"{module['label']}.{part['label']}"
        found[only] = {**part, "label": name, "parent": module["parent"]}
        above = children[module["parent"]]
        above[above.index(place)] = only
    return found


def roofs(report: Mapping[str, Any]) -> Figure | None:
    """Each layer by its operations a byte and the speed it is predicted to reach, under the device's roofs."""
    device = report["device"]
    layers = [x for x in report["layers"] if x["ms"] and x["access_bytes"] and (x["macs"] or x["flops"])]
    if not device or not layers:
        return None
    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for layer in layers:
        work = layer["macs"] or layer["flops"]
        text = f"{label(layer['name'])}<br>{label(layer['op'])}, {human(layer['ms'], 'ms')}, {label(layer['bound'])}"
        for kind, ms in ((layer["family"], layer["ms"]), ("measured", layer["measured_ms"])):
            if is_number(ms) and ms > 0:
                point = (work / layer["access_bytes"], work / ms / 1e6, ms, text)
                points.setdefault(kind, []).append(point)
    xs = [x for group in points.values() for x, *_ in group]
    left, right = min(xs) / 2, max(xs) * 2
    slowest = max(ms for group in points.values() for _, _, ms, _ in group)
    traces = _roof_lines(device, points.keys(), left, right)
    for kind, group in points.items():
        look: Figure = {
            "color": COLORS.get(kind, GREY),
            "size": [6 + 16 * (ms / slowest) ** 0.5 for _, _, ms, _ in group],
        }
        look |= {"opacity": 0.75, "symbol": "diamond-open" if kind == "measured" else "circle"}
        trace = scatter(kind, [(x, y) for x, y, _, _ in group]) | {"mode": "markers", "marker": look}
        traces.append(trace | {"text": [text for *_, text in group], "hoverinfo": "text"})
    plot = layout("MACs (or element-wise operations) for each byte of access", "10^9 of them a second", height=460)
    for axis in ("xaxis", "yaxis"):
        plot[axis] |= {"type": "log", "dtick": 1}
    caption = (
        f"Roofline of {device['title']}: on a slope memory holds a layer back, on a level line the speed of its family "
        "of kernels, below both the cost of starting one. The larger the mark, the longer it takes."
    )
    return {"caption": caption, "data": traces, "layout": plot}


def _roof_lines(device: Mapping[str, Any], families: Any, left: float, right: float) -> list[Figure]:
    """Two slopes, of memory and of cache, up to the fastest family drawn; a level line for each family that has one."""
    speeds = {name: speed for name, speed in device["gmacs"].items() if name in families} or device["gmacs"]
    top = max(speeds.values())
    traces = []
    look: Figure
    for name, bandwidth in (("memory", device["memory_gb_s"]), ("cache", device["cache_gb_s"])):
        ends = [(left, bandwidth * left), (max(left, top / bandwidth), max(top, bandwidth * left))]
        look = {"mode": "lines", "line": {"color": GREY, "width": 2, "dash": "solid" if name == "memory" else "dot"}}
        text = f"{name}: {digits(bandwidth)} GB/s"
        traces.append(scatter(text, ends) | look | {"hoverinfo": "name"})
    for name, speed in speeds.items():
        start = max(left, speed / max(device["memory_gb_s"], device["cache_gb_s"]))
        look = {"mode": "lines", "line": {"color": COLORS.get(name, GREY), "width": 1.5}}
        look["showlegend"] = False
        ends = [(start, speed), (max(right, start), speed)]
        traces.append(scatter(f"{name}: {digits(speed)} G/s", ends) | look | {"hoverinfo": "name"})
    return traces


def memory(report: Mapping[str, Any]) -> Figure | None:
    """The activation bytes alive during each op, as they run; the peak as a dashed line."""
    layers = report["layers"]
    peak = max((layer.get("alive_bytes") or 0 for layer in layers), default=0)
    if not peak:
        return None
    stride = len(layers) // MAX_STEPS + 1
    stretches = [range(i, min(i + stride, len(layers))) for i in range(0, len(layers), stride)]
    drawn = [max(stretch, key=lambda i: layers[i]["alive_bytes"]) for stretch in stretches]
    trace = scatter("alive", [(i, layers[i]["alive_bytes"] / 2**20) for i in drawn])
    trace |= {"mode": "lines", "fill": "tozeroy", "line": {"color": TEAL, "width": 1.5, "shape": "hvh"}}
    names = [f"{label(layers[i]['name'])} ({label(layers[i]['op'])})" for i in drawn]
    sizes = [human(layers[i]["alive_bytes"], "bytes") for i in drawn]
    trace |= {"text": [f"{name}<br>{size}" for name, size in zip(names, sizes, strict=True)], "hoverinfo": "text"}
    plot = layout("op, as they run", "MiB alive", height=320)
    plot["yaxis"]["rangemode"] = "tozero"
    line: Figure = {"xref": "paper", "x0": 0, "x1": 1, "y0": peak / 2**20, "y1": peak / 2**20}
    plot["shapes"] = [{"type": "line", "line": {"color": ORANGE, "width": 2, "dash": "dash"}} | line]
    where = short(str(report["peak_op"]), 60)
    caption = f"Activation memory while the network runs; its peak is {human(peak, 'bytes')} at {where}."
    return {"caption": caption, "data": [trace], "layout": plot}
