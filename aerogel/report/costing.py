"""The cost report of a network: a JSON-able dict of schema "aerogel.cost", version 1, of which every output is made.

Always there: model, input, inputs, batch, dtype, the totals of `aerogel.cost.Cost`, intensity, layers (one an op, as
they run), uncounted ([{"op", "modules"}]), convention, environment. None until somebody knows it: device,
predicted_ms, a layer's ms and bound (by the roofline; on this machine ms from its measured kernels, and prediction says
how many there were, or roofline_because why they were not asked), unplaced_ms (of predicted_ms, what no layer has),
latency and a layer's measured_ms (of the exported file), verified. There when asked for: against (its measured: both
exported files timed in turns), budget.
`aerogel cost` adds what `aerogel.report.stored` finds: nonzero_params, file_bytes, dense_bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import aerogel
from aerogel.cost.against import Amount, Comparison, Pair
from aerogel.cost.budget import Verdict
from aerogel.cost.count import Cost, Layer
from aerogel.cost.device import Device
from aerogel.cost.latency import Ratio
from aerogel.cost.predict import Prediction
from aerogel.cost.roofline import roofline
from aerogel.graph import Graph

SCHEMA, VERSION = "aerogel.cost", 1
CONVENTION = (
    "MACs: multiply-accumulates. FLOPs: 2 x MACs + element-wise work. Access: bytes of inputs, outputs and weights of "
    "every op, with batch norms folded and activations fused as an inference runtime does. Peak: the most activation "
    "bytes alive at once, weights not among them. KiB, MiB, GiB are 1024; K, M, G 1000."
)
BY = ("layer", "module", "op", "family")
MEASURES = ("params", "macs", "flops", "access_bytes", "ms", "measured_ms")
ITSELF, UNREAD = "(the network itself)", "(read by no op)"

Row = dict[str, Any]


def cost_report(
    model: str,
    graph: Graph,
    found: Cost,
    *,
    device: Device | None = None,
    latency: Mapping[str, Any] | None = None,
    layers_ms: Mapping[str, float] | None = None,
    predicted: Prediction | None = None,
    predicted_layers: Mapping[str, float] | None = None,
    roofline_because: str | None = None,
) -> dict[str, Any]:
    """What a captured network costs.

    latency: measured on its exported file; layers_ms: the same by layer's node. predicted, predicted_layers: from this
    machine's kernels, likewise; else times are the roofline's on the device, roofline_because of what where kernels
    were asked for.
    """
    inputs = [graph.values[name] for name in graph.inputs]
    layers = [_layer(layer, device, layers_ms or {}, predicted_layers) for layer in found.layers]
    totals = asdict(replace(found, layers=(), uncounted={}, verified=None))
    verified = found.verified
    shape = list(inputs[0].shape) if inputs else []
    placed_ms = sum(layer["ms"] for layer in layers) if device else None
    predicted_ms = predicted.ms if predicted else placed_ms
    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "model": model,
        "input": shape,
        "inputs": [{"name": x.name, "shape": list(x.shape), "dtype": _dtype(x.dtype)} for x in inputs],
        "batch": shape[0] if shape else None,
        "dtype": _network_dtype(graph),
        **totals,
        "intensity": found.flops / found.access_bytes if found.access_bytes else 0.0,
        "layers": layers,
        "uncounted": [{"op": op, "modules": modules} for op, modules in found.uncounted.items()],
        "verified": verified.agrees if verified else None,
        "verification": asdict(verified) if verified else None,
        "device": device.model_dump() if device else None,
        "predicted_ms": predicted_ms,
        "unplaced_ms": max(0.0, predicted_ms - placed_ms)
        if predicted_ms is not None and placed_ms is not None
        else None,
        "prediction": {"kernels": predicted.kernels, "estimated": predicted.estimated, "unread": list(predicted.unread)}
        if predicted
        else None,
        "roofline_because": roofline_because,
        "latency": dict(latency) if latency else None,
        "convention": CONVENTION,
        "environment": {"aerogel": aerogel.__version__, "torch": version("torch"), "python": platform.python_version()},
    }
    return json_types(report)


def json_types(report: dict[str, Any]) -> dict[str, Any]:
    """The same with lists for tuples, as whoever reads the JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    return found


def grouped(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> list[Row]:
    """Rows whose params, macs, flops and access_bytes add up to the network's, and ms to predicted_ms less unplaced_ms.

    By layer: a row for each one that a runtime runs, with what is fused into it. By module (of the first `depth` parts
    of its path): in the order they first run. By op and by family: dearest first.
    """
    keys: dict[str, Callable[[Row], str]] = {
        "layer": lambda layer: layer["fused_into"] or layer["node"],
        "module": lambda layer: cropped(layer["module"], depth),
        "op": lambda layer: layer["op"],
        "family": lambda layer: layer["family"],
    }
    groups: dict[str, list[Row]] = {}
    for layer in report["layers"]:
        groups.setdefault(keys[by](layer), []).append(layer)
    for name, numel in (report.get("unread") or {}).items():
        owner = cropped(name.rpartition(".")[0], depth) if by == "module" else UNREAD
        groups.setdefault(owner, []).append({"params": numel})
    uncounted = {entry["op"] for entry in report["uncounted"]}
    rows = [_group(name, layers, by, uncounted) for name, layers in groups.items()]
    rows = [row for row in rows if row["uncounted"] or any(row[measure] for measure in MEASURES)]
    dearest = "ms" if report["device"] else "macs"
    for row in rows:
        total = report["predicted_ms"] if report["device"] else report["macs"]
        row["share"] = 100 * row[dearest] / total if total and row[dearest] is not None else None
    return sorted(rows, key=lambda row: -(row[dearest] or 0)) if by in ("op", "family") else rows


def cropped(module: str, depth: int | None) -> str:
    """The first `depth` parts of a module's path; a name for the network itself."""
    return ".".join(module.split(".")[:depth]) or ITSELF


def compared(other: Mapping[str, Any], found: Comparison, measured: Ratio | None = None) -> dict[str, Any]:
    """The report's `against`: this network's ("after") layers and totals beside those of the `other` ("before").

    measured: the time of this one's exported file over that of the other's.
    """
    kept = ("model", "input", "dtype", "uncounted", "verified", "prediction", "unplaced_ms")
    return {
        **{key: other[key] for key in kept},
        "totals": {name: amount._asdict() | {"ratio": amount.ratio} for name, amount in found.totals.items()},
        "text": found.text,
        "layers": [_pair(pair, found.ms[i] if found.ms else None) for i, pair in enumerate(found.pairs)],
        "measured": _in_turns(measured) if measured else None,
    }


def _in_turns(measured: Ratio) -> dict[str, float]:
    held = measured.ratio
    times = {"before_ms": measured.a.median_ms, "after_ms": measured.b.median_ms}
    return times | {"ratio": held.value, "low": held.low, "high": held.high}


def budgeted(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """The report's `budget`: a dict for each limit."""
    return [asdict(verdict) for verdict in verdicts]


def within_budget(report: Mapping[str, Any]) -> bool:
    """Whether every limit holds; so it is where there is none."""
    return all(verdict["met"] for verdict in report.get("budget") or [])


def _layer(
    layer: Layer, device: Device | None, measured: Mapping[str, float], predicted: Mapping[str, float] | None
) -> Row:
    timing = roofline(layer, device) if device else None
    if timing and predicted is not None:  # a layer without a kernel of its own is fused away
        timing = timing._replace(ms=predicted.get(layer.node, 0.0))
    return asdict(layer) | {
        "shape": list(layer.shape),
        "weight": list(layer.weight) if layer.weight else None,
        "intensity": layer.intensity,
        "ms": timing.ms if timing else None,
        "bound": timing.bound if timing else None,
        "measured_ms": measured.get(layer.node),
    }


def _group(name: str, layers: list[Row], by: str, uncounted: set[str]) -> Row:
    """Sums of layers under one name; a measure that none of them has is None."""
    ran = [layer for layer in layers if "node" in layer]
    sums: Row = {measure: _sum(layer.get(measure) for layer in layers) for measure in MEASURES}
    unknown = [layer for layer in ran if layer["op"] in uncounted]
    if unknown and len(unknown) == len(ran):  # nothing of it was counted: not the same as no work
        sums |= {"macs": None, "flops": None}
    bounds: dict[str, float] = {}
    for layer in ran:
        if layer["bound"] not in (None, "none"):
            bounds[layer["bound"]] = bounds.get(layer["bound"], 0.0) + layer["ms"]
    known = sums["access_bytes"] and sums["flops"] is not None
    row: Row = {"name": name} | sums
    row |= {"intensity": sums["flops"] / sums["access_bytes"] if known else None}
    row |= {"bound": max(bounds, key=bounds.__getitem__) if bounds else None, "uncounted": bool(unknown)}
    if by == "layer" and ran:
        row |= {"name": ran[0]["name"], "node": ran[0]["node"], "family": ran[0]["family"], "shape": ran[-1]["shape"]}
        row |= {"op": "+".join(layer["op"] for layer in ran), "module": ran[0]["module"]}
    return row | {"layers": len(ran)}


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _pair(pair: Pair, ms: Amount | None) -> dict[str, Any]:
    layer = pair.after or pair.before
    assert layer is not None
    found: dict[str, Any] = {"status": pair.status, "name": layer.name, "op": layer.op}
    found |= {"name_before": pair.before.name, "op_before": pair.before.op} if pair.before else {}
    amounts = {measure: pair.amount(measure) for measure in ("params", "macs", "access_bytes")}
    amounts |= {"ms": ms} if ms else {}
    for measure, amount in amounts.items():
        found[f"{measure}_before"] = amount.before if pair.before else None
        found[f"{measure}_after"] = amount.after if pair.after else None
    return found


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _network_dtype(graph: Graph) -> str | None:
    """Of the first floating-point weight, else input."""
    values = sorted(graph.values.values(), key=lambda value: not value.is_weight)
    return next((_dtype(value.dtype) for value in values if value.dtype.is_floating_point), None)
