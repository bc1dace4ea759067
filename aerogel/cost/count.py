"""`count`: parameters, MACs, FLOPs, access bytes and peak bytes of a captured network, by layer, nothing in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aerogel.cost.memory import access_bytes, peak_bytes
from aerogel.cost.ops import ELEMENTWISE, MACS, MOVES, VIEWS
from aerogel.graph import Graph


@dataclass(frozen=True)
class Layer:
    """One op. access_bytes is the folded view's: 0 for what a runtime computes inside the layer before."""

    name: str
    op: str
    macs: int
    flops: int
    params: int
    access_bytes: int
    shape: tuple[int, ...]  # of its output
    weight: tuple[int, ...] | None  # of its weight, where it has one


@dataclass(frozen=True)
class Cost:
    """For the example input's batch. uncounted: {op: the modules it stands in}; their work is in no total."""

    macs: int
    flops: int
    params: int
    access_bytes: int
    peak_bytes: int
    access_bytes_raw: int
    peak_bytes_raw: int
    peak_op: str
    layers: tuple[Layer, ...]
    uncounted: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count(graph: Graph) -> Cost:
    """Counts a captured network; shared parameters once. Ops without a formula are listed, never zero in silence."""
    folded = access_bytes(graph)
    layers = []
    seen: set[str] = set()
    for op, access in zip(graph.ops, folded, strict=True):
        weights = [graph.values[name] for name in op.inputs if graph.values[name].kind == "param"]
        params = sum(value.numel for value in weights if value.target not in seen)
        seen |= {value.target for value in weights}
        macs = MACS[op.kind](graph, op) if op.kind in MACS else 0
        work = ELEMENTWISE[op.kind](graph, op) if op.kind in ELEMENTWISE else 0
        shape = graph.values[op.outputs[0]].shape
        weight = next((value.shape for value in weights if len(value.shape) > 1), None)
        layers.append(Layer(op.where, op.kind, macs, 2 * macs + work, params, access, shape, weight))
    peak, peak_raw = peak_bytes(graph), peak_bytes(graph, folded=False)
    return Cost(
        macs=sum(layer.macs for layer in layers),
        flops=sum(layer.flops for layer in layers),
        params=parameters(graph),
        access_bytes=sum(folded),
        peak_bytes=peak.bytes,
        access_bytes_raw=sum(access_bytes(graph, folded=False)),
        peak_bytes_raw=peak_raw.bytes,
        peak_op=peak.op,
        layers=tuple(layers),
        uncounted=_uncounted(graph),
    )


def parameters(graph: Graph) -> int:
    """Numbers the network learns, shared ones once, those that no op reads too."""
    sizes = {v.target: v.numel for v in graph.values.values() if v.kind == "param"}
    return sum(sizes.values())


def _uncounted(graph: Graph) -> dict[str, list[str]]:
    known = MACS.keys() | ELEMENTWISE.keys() | VIEWS | MOVES
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.kind not in known:
            found.setdefault(op.kind, []).append(op.where)
    return found
