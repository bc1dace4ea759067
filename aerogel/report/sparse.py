"""What single weights are left, as a plot."""

from __future__ import annotations

from typing import Any

from aerogel.report.drawing import GREY, TEAL, Figure, label, layout, short
from aerogel.report.terminal import dig, flat, is_number

MAX_LAYERS = 30  # drawn; the table has them all


def kept_bars(pruned: dict[str, Any]) -> Figure | None:
    """Horizontal bars, all weights of a layer and those left, on a logarithmic axis; the largest of many layers."""
    layers = [
        one for one in pruned.get("layers") or [] if _positive(dig(one, "weights")) and is_number(dig(one, "kept"))
    ]
    if not layers:
        return None
    largest = sorted(range(len(layers)), key=lambda i: -layers[i]["weights"])[:MAX_LAYERS]
    drawn = [layers[i] for i in sorted(largest)]
    places = list(range(len(drawn)))
    traces = []
    for side, key, color in (("all", "weights", GREY), ("left", "kept", TEAL)):
        text = [f"{label(one.get('name'))}<br>{side}: {one[key]:,}" for one in drawn]
        look = {"orientation": "h", "marker": {"color": color}, "hoverinfo": "text", "textposition": "none"}
        values = [one[key] if one[key] > 0 else None for one in drawn]
        traces.append({"type": "bar", "name": side, "x": values, "y": places, "text": text} | look)
    plot = layout("weights", "", height=110 + 30 * len(drawn))
    ticks = [label(short(flat(one.get("name")))) for one in drawn]
    plot["yaxis"] |= {"tickvals": places, "ticktext": ticks, "range": [len(drawn) - 0.5, -0.5], "showgrid": False}
    plot["xaxis"] |= {"type": "log"}
    count = f"the {len(drawn)} largest of {len(layers)} layers" if len(drawn) < len(layers) else "each layer"
    return {"caption": f"Weights of {count}, and what is left.", "data": traces, "layout": plot | {"bargap": 0.3}}


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0
