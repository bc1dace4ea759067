"""Budgets: what a network may cost at most, as a user types it: `macs<=320M,params<=4M,peak<=6MiB,latency<=3ms`.

The same in a TOML file: `macs = "320M"`, one line a measure. Counts have K, M, G or no unit; bytes KiB, MiB, GiB (1024)
or KB, MB, GB (1000); times us, ms, s. A measure that holds only because some op has no formula does not hold.
latency is the median measured on the exported file where there is one, else the roofline's prediction on a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aerogel.cost.count import Cost, Layer
from aerogel.cost.device import Device
from aerogel.cost.roofline import roofline, total_ms
from aerogel.errors import AerogelError, nearest
from aerogel.files import read_toml

COUNTS = {"K": 1e3, "M": 1e6, "G": 1e9}
BYTES = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_QUANTITY = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")

# What may be limited, with the units of its values.
MEASURES: dict[str, dict[str, float]] = {
    **dict.fromkeys(["macs", "flops", "params"], {"": 1.0} | COUNTS),
    **dict.fromkeys(["access", "peak"], BYTES),
    "latency": TIMES,
}
FIELDS = {"access": "access_bytes", "peak": "peak_bytes"}  # their names in a Cost, which may be typed too
_WORK = ("macs", "flops", "latency")  # what an op without a formula is missing from
_EXAMPLE = "macs<=320M,params<=4M,peak<=6MiB,latency<=3ms"


@dataclass(frozen=True)
class Limit:
    """At most `limit` of a measure: counts, bytes or milliseconds."""

    measure: str
    limit: float
    text: str  # as typed


@dataclass(frozen=True)
class Verdict:
    """One limit judged. layer, op and layer_value: the one that costs most of it, and how much."""

    measure: str
    limit: float
    value: float
    met: bool
    text: str  # the limit as typed
    basis: str  # "counted", "predicted on raspberry_pi_4", "measured"
    layer: str
    op: str
    layer_value: float
    missing: tuple[str, ...]  # ops without a formula, whose part of the measure is unknown


def quantity(text: str) -> tuple[float, str] | None:
    """(2.5, "ms") of "2.5 ms"; None of what is no number with a unit."""
    match = _QUANTITY.fullmatch(text)
    return (float(match[1]), match[2]) if match else None


def parse_budget(text: str) -> tuple[Limit, ...]:
    """The limits of `macs<=320M,params<=4M` or of a .toml file. Raises AerogelError for whatever it cannot read."""
    if text.strip().endswith(".toml"):
        pairs = list(read_toml(Path(text.strip()), "--budget", 'name a TOML file with macs = "320M"').items())
    else:
        pairs = [_pair(part) for part in text.split(",")]
    limits = tuple(_limit(name, value) for name, value in pairs)
    measures = [limit.measure for limit in limits]
    twice = next((name for name in measures if measures.count(name) > 1), None)
    if twice:
        raise AerogelError(f"--budget: each measure is given once, got {twice} twice in {text!r}; leave one out")
    if not limits:
        raise AerogelError(f'--budget {text}: the file limits nothing; write a line such as macs = "320M"')
    return limits


def judge(
    limits: Iterable[Limit],
    cost: Cost,
    device: Device | None = None,
    measured_ms: float | None = None,
    layers_ms: Mapping[str, float] | None = None,
    predicted_ms: float | None = None,
) -> tuple[Verdict, ...]:
    """Every limit against what the network costs.

    measured_ms is of the whole exported file, layers_ms of each node of it that was timed or predicted by its kernels,
    predicted_ms their whole. Without them the device's roofline says it. Raises AerogelError for a latency that
    nothing tells.
    """
    times = layers_ms if layers_ms is not None else _predicted(cost, device)
    if predicted_ms is None and device is not None:
        predicted_ms = total_ms(cost.layers, device)
    basis = f"predicted on {device.name}" if device else ""
    return tuple(_judged(limit, cost, (predicted_ms, basis), measured_ms, times) for limit in limits)


def _judged(
    limit: Limit, cost: Cost, predicted: tuple[float | None, str], measured_ms: float | None, times: Mapping[str, float]
) -> Verdict:
    basis = "counted"
    if limit.measure != "latency":
        value: float = getattr(cost, FIELDS.get(limit.measure, limit.measure))
    elif measured_ms is not None:
        value, basis = measured_ms, "measured"
    elif predicted[0] is not None:
        value, basis = predicted[0], predicted[1]
    else:
        raise AerogelError(f"--budget {limit.text}: nothing tells the latency; name a device with --device")
    layer, part = _dearest(limit.measure, cost, times)
    missing = tuple(sorted(cost.uncounted)) if limit.measure in _WORK and basis != "measured" else ()
    return Verdict(
        measure=limit.measure,
        limit=limit.limit,
        value=value,
        met=value <= limit.limit and not missing,
        text=limit.text,
        basis=basis,
        layer=layer.name if layer else "",
        op=layer.op if layer else "",
        layer_value=part,
        missing=missing,
    )


def _predicted(cost: Cost, device: Device | None) -> dict[str, float]:
    return {layer.node: roofline(layer, device).ms for layer in cost.layers} if device else {}


def _dearest(measure: str, cost: Cost, times: Mapping[str, float]) -> tuple[Layer | None, float]:
    """The layer that costs most of a measure, and how much; (None, 0) where no layer is known to cost any."""
    if measure == "peak":
        at = next((layer for layer in cost.layers if layer.node == cost.peak_node), None)
        return at, float(cost.peak_bytes)

    def part(layer: Layer) -> float:
        if measure == "latency":
            return times.get(layer.node, 0.0)
        return float(getattr(layer, FIELDS.get(measure, measure)))

    layer = max(cost.layers, key=part, default=None)
    return (layer, part(layer)) if layer and part(layer) else (None, 0.0)


def _pair(part: str) -> tuple[str, Any]:
    name, sign, value = part.partition("<=")
    if not sign or not name.strip():
        raise AerogelError(f"--budget {part.strip()!r} must be MEASURE<=VALUE or a .toml file; write {_EXAMPLE}")
    return name.strip(), value.strip()


def _limit(name: str, value: Any) -> Limit:
    measure = next((short for short, field in FIELDS.items() if field == name), name)
    if measure not in MEASURES:
        raise AerogelError(f"--budget: {name!r} is no measure; {nearest(name, MEASURES)}")
    units, text = MEASURES[measure], f"{name}<={value}"
    found = None if isinstance(value, bool) else quantity(str(value))
    if found is None or found[1] not in units or not 0 < found[0] * units[found[1]] < float("inf"):
        examples = " or ".join(f"{measure}<=3{unit}" for unit in list(units)[-3:])
        raise AerogelError(f"--budget {text}: the limit must be a positive number with its unit; write {examples}")
    return Limit(measure, round(found[0] * units[found[1]], 6), text)  # 2.3M is 2,300,000, not a hair less
