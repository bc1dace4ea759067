"""`count`: parameters, MACs, FLOPs, access bytes and peak bytes of a captured network, by layer, nothing in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aerogel.cost.memory import absorbed_ops, access_bytes, peak_bytes, views
from aerogel.cost.ops import ELEMENTWISE, MACS, MOVES, VIEWS, family
from aerogel.graph import Graph


@dataclass(frozen=True)
class Layer:
    """One op. access_bytes is the folded view's: 0 for what a runtime computes inside the layer before."""

    name: str  # of its module
    node: str  # of the op itself in the graph; no two layers share one
    op: str
    family: str  # of kernels that reach about the same speed: see aerogel.cost.ops.family
    macs: int
    flops: int
    params: int
    access_bytes: int
    access_bytes_raw: int
    shape: tuple[int, ...]  # of its output
    weight: tuple[int, ...] | None  # of its weight, where it has one
    fused_into: str | None  # the node of the layer that an inference runtime computes it in
    source: str  # "net.py:12", the line of the user's forward, or ""

    @property
    def runs(self) -> bool:
        """Whether it is a kernel of its own in the folded view: neither fused away nor a view of memory."""
        return self.fused_into is None and self.family != "view"

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs for each byte of access in the folded view."""
        return self.flops / self.access_bytes if self.access_bytes else 0.0


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
    folded, raw = access_bytes(graph), access_bytes(graph, folded=False)
    free, absorbed = views(graph), absorbed_ops(graph)
    layers = []
    seen: set[str] = set()
    for i, op in enumerate(graph.ops):
        weights = [graph.values[name] for name in op.inputs if graph.values[name].kind == "param"]
        params = sum(value.numel for value in weights if value.target not in seen)
        seen |= {value.target for value in weights}
        macs = MACS[op.kind](graph, op) if op.kind in MACS else 0
        work = ELEMENTWISE[op.kind](graph, op) if op.kind in ELEMENTWISE else 0
        shape = graph.values[op.outputs[0]].shape
        weight = next((value.shape for value in weights if len(value.shape) > 1), None)
        layers.append(
            Layer(
                name=op.where,
                node=op.name,
                op=op.kind,
                family="view" if i in free else family(graph, op),
                macs=macs,
                flops=2 * macs + work,
                params=params,
                access_bytes=folded[i],
                access_bytes_raw=raw[i],
                shape=shape,
                weight=weight,
                fused_into=graph.ops[absorbed[i]].name if i in absorbed else None,
                source=op.source,
            )
        )
    peak, peak_raw = peak_bytes(graph), peak_bytes(graph, folded=False)
    return Cost(
        macs=sum(layer.macs for layer in layers),
        flops=sum(layer.flops for layer in layers),
        params=parameters(graph),
        access_bytes=sum(folded),
        peak_bytes=peak.bytes,
        access_bytes_raw=sum(raw),
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
