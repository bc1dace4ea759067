"""`count`: parameters, MACs, FLOPs, access bytes and peak bytes of a captured network, by layer, nothing in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from aerogel.cost.memory import (
    Alive,
    absorbed_ops,
    access_bytes,
    arena_bytes,
    lifetimes,
    peak_bytes,
    peak_of,
    timeline,
    views,
)
from aerogel.cost.ops import ELEMENTWISE, MACS, MOVES, VIEWS, family
from aerogel.cost.receptive import receptive_fields
from aerogel.graph import Graph

UNREAD = "unread"  # where by_op and by_family put parameters that no op reads


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
    module: str = ""  # the module's path; "" for what the network itself computes
    alive_bytes: int = 0  # of activations while it runs, folded: the memory's timeline
    receptive_field: int | None = None  # rows of the input that one row of its output sees, where defined

    @property
    def runs(self) -> bool:
        """Whether it is a kernel of its own in the folded view: neither fused away nor a view of memory."""
        return self.fused_into is None and self.family != "view"

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs for each byte of access in the folded view."""
        return self.flops / self.access_bytes if self.access_bytes else 0.0


class Sums(NamedTuple):
    """What several layers cost together."""

    macs: int = 0
    flops: int = 0
    params: int = 0
    access_bytes: int = 0


@dataclass(frozen=True)
class Verified:
    """The other count, of `aerogel.cost.verify`: whether both agree, and the modules in which they do not."""

    macs: int | None  # of the other count; None where it could not be made
    agrees: bool | None
    differs: dict[str, tuple[int, int]]  # {module: (ours, theirs)}
    reason: str = ""  # why it could not be made


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
    arena_bytes: int = 0  # what a greedy planner needs where peak_bytes is the least
    peak_node: str = ""
    peak_alive: tuple[Alive, ...] = ()  # the activations that make the peak, largest first
    unread: dict[str, int] = field(default_factory=dict)  # {parameter that no op reads: its numbers}
    verified: Verified | None = None  # None: nobody has asked

    def by_module(self, depth: int | None = None) -> dict[str, Sums]:
        """Sums for each module that computes, or for what lies below the first `depth` parts of the path; the
        parameters that no op reads stand with the module that holds them. "" is the network itself."""
        owners = ((name.rpartition(".")[0], numel) for name, numel in self.unread.items())
        return _sums(
            self.layers, lambda layer: _cropped(layer.module, depth), ((_cropped(m, depth), n) for m, n in owners)
        )

    def by_op(self) -> dict[str, Sums]:
        """Sums for each kind of op."""
        return _sums(self.layers, lambda layer: layer.op, ((UNREAD, n) for n in self.unread.values()))

    def by_family(self) -> dict[str, Sums]:
        """Sums for each family of kernels."""
        return _sums(self.layers, lambda layer: layer.family, ((UNREAD, n) for n in self.unread.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON. "verified" is true, false or null, "differs" {module: [ours, theirs]}."""
        found, held = asdict(self), self.verified
        found["verified"] = None if held is None else held.agrees
        found["differs"] = {} if held is None else {name: list(pair) for name, pair in held.differs.items()}
        return found


def _cropped(module: str, depth: int | None) -> str:
    return module if depth is None else ".".join(module.split(".")[:depth])


def _sums(layers: Iterable[Layer], key: Callable[[Layer], str], unread: Iterable[tuple[str, int]]) -> dict[str, Sums]:
    found: dict[str, Sums] = {}

    def add(name: str, more: Sums) -> None:
        found[name] = Sums(*(a + b for a, b in zip(found.get(name, Sums()), more, strict=True)))

    for layer in layers:
        add(key(layer), Sums(layer.macs, layer.flops, layer.params, layer.access_bytes))
    for name, numel in unread:
        add(name, Sums(params=numel))
    return found


def count(graph: Graph) -> Cost:
    """Counts a captured network; shared parameters once. Ops without a formula are listed, never zero in silence."""
    folded, raw = access_bytes(graph), access_bytes(graph, folded=False)
    held = lifetimes(graph)
    alive = timeline(held, len(graph.ops))
    peak, peak_raw = peak_of(graph, held, alive), peak_bytes(graph, folded=False)
    layers = _layers(graph, folded, raw, alive)
    sizes = {v.target: v.numel for v in graph.values.values() if v.kind == "param"}
    return Cost(
        macs=sum(layer.macs for layer in layers),
        flops=sum(layer.flops for layer in layers),
        params=sum(sizes.values()),
        access_bytes=sum(folded),
        peak_bytes=peak.bytes,
        access_bytes_raw=sum(raw),
        peak_bytes_raw=peak_raw.bytes,
        peak_op=peak.op,
        layers=tuple(layers),
        uncounted=_uncounted(graph),
        arena_bytes=arena_bytes(held),
        peak_node=peak.node,
        peak_alive=peak.alive,
        unread={name: sizes[name] for name in graph.unreached},
    )


def _layers(graph: Graph, folded: list[int], raw: list[int], alive: list[int]) -> list[Layer]:
    free, absorbed, fields = views(graph), absorbed_ops(graph), receptive_fields(graph)
    layers = []
    seen: set[str] = set()
    for i, op in enumerate(graph.ops):
        weights = [graph.values[name] for name in op.inputs if graph.values[name].kind == "param"]
        params = sum(value.numel for value in weights if value.target not in seen)
        seen |= {value.target for value in weights}
        macs = MACS[op.kind](graph, op) if op.kind in MACS else 0
        work = ELEMENTWISE[op.kind](graph, op) if op.kind in ELEMENTWISE else 0
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
                shape=graph.values[op.outputs[0]].shape,
                weight=next((value.shape for value in weights if len(value.shape) > 1), None),
                fused_into=graph.ops[absorbed[i]].name if i in absorbed else None,
                source=op.source,
                module=op.module,
                alive_bytes=alive[i],
                receptive_field=fields[i],
            )
        )
    return layers


def _uncounted(graph: Graph) -> dict[str, list[str]]:
    known = MACS.keys() | ELEMENTWISE.keys() | VIEWS | MOVES
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.kind not in known:
            found.setdefault(op.kind, []).append(op.where)
    return found
