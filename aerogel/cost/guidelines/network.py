"""A captured network as the rules read it: every op with its predicted time, and who feeds whom.

A `Product` is a convolution or a linear layer by the numbers that the guidelines speak of: channels in and out, groups,
taps (k x k), positions in and out (n x h x w). Its access in elements, with every tensor moved once:

    A = positions_in c1 + positions_out c2 + taps c1 c2 / g          MACs B = positions_out taps c1 c2 / g
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aerogel.cost.count import Cost, Layer, count
from aerogel.cost.device import Device
from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.ops import ACTIVATIONS, VIEWS
from aerogel.cost.roofline import kernel, roofline
from aerogel.graph import Graph, Op, Ref

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_THROUGH = VIEWS | ACTIVATIONS | {"batch_norm"}  # what does not part a layer from the next


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer; c1 and c2 channels."""

    c1: float  # whole in a real layer
    c2: float
    groups: int
    taps: int
    positions_in: int
    positions_out: int
    itemsize: int

    @property
    def access(self) -> float:
        """Elements moved."""
        weight = self.taps * self.c1 * self.c2 / self.groups
        return self.positions_in * self.c1 + self.positions_out * self.c2 + weight

    @property
    def macs(self) -> float:
        return self.positions_out * self.taps * self.c1 * self.c2 / self.groups

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.c1

    @property
    def family(self) -> str:
        """Of a convolution; a linear layer's is "matmul"."""
        if self.groups > 1:
            return "depthwise" if self.depthwise else "grouped"
        return "pointwise" if self.taps == 1 else "conv"


@dataclass(frozen=True)
class Network:
    """Layer i stands for op i. allowed(rule, layer): whether the user took the layer out of that rule."""

    graph: Graph
    device: Device
    cost: Cost
    ms: tuple[float, ...]
    readers: dict[str, tuple[int, ...]]
    maker: dict[str, int]
    products: dict[int, Product]
    heads: frozenset[int]  # products that read no other product's result
    tails: frozenset[int]  # products whose result no other product reads
    allowed: Callable[[str, Layer], bool]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.cost.layers

    @property
    def total_ms(self) -> float:
        return sum(self.ms)

    @property
    def total_bytes(self) -> int:
        return self.cost.access_bytes

    def judged(self, rule: str, indices: Iterable[int]) -> Iterator[int]:
        """Those of the ops that run as kernels of their own and that the user left under the rule."""
        return (i for i in indices if self.layers[i].runs and not self.allowed(rule, self.layers[i]))

    def time(self, family: str, operations: float, access_bytes: float) -> float:
        return kernel(family, operations, access_bytes, self.device).ms

    def spent(self, indices: Iterable[int]) -> Amount:
        chosen = list(indices)
        return Amount(sum(self.layers[i].access_bytes for i in chosen), sum(self.ms[i] for i in chosen))

    def source(self, i: int) -> str | None:
        """The value that op i reads first."""
        return self.graph.ops[i].inputs[0] if self.graph.ops[i].inputs else None

    def before(self, i: int) -> int | None:
        """The op whose result op i reads first, seen through views, folded norms and activations; None at an input."""
        return self._back(self.maker.get(self.source(i) or ""))

    def _back(self, at: int | None) -> int | None:
        while at is not None and not self.layers[at].macs and self.graph.ops[at].kind in _THROUGH:
            at = self.maker.get(self.source(at) or "")
        return at

    def after(self, i: int) -> list[int]:
        """The ops that read the result of op i, seen through views, folded norms and activations."""
        found: list[int] = []
        for name in self.graph.ops[i].outputs:
            for j in self.readers.get(name, ()):
                through = not self.layers[j].macs and self.graph.ops[j].kind in _THROUGH
                found += self.after(j) if through else [j]
        return list(dict.fromkeys(found))

    def written(self, i: int) -> int:
        """The op whose output kernel i writes: itself, or the last norm or activation computed inside it."""
        name = self.graph.ops[i].name
        return max([i, *(j for j, layer in enumerate(self.layers) if layer.fused_into == name)])

    def finding(
        self, rule: str, indices: Iterable[int], stake: Amount, what: str, rewrite: Rewrite,
        score: float | None = None, note: str = "",
    ) -> Finding:  # fmt: skip
        """A finding about these ops, the dearest of them first."""
        order = sorted(indices, key=lambda i: -self.ms[i])
        layers = [self.layers[i] for i in order]
        return Finding(
            rule=rule,
            op=layers[0].op,
            module=layers[0].name,
            source=layers[0].source,
            bytes=round(stake.bytes),
            ms=stake.ms,
            share=stake.ms / self.total_ms if self.total_ms else 0.0,
            score=score,
            what=what,
            rewrite=rewrite.words,
            gain_bytes=round(rewrite.gain.bytes),
            gain_ms=rewrite.gain.ms,
            needs_retraining=rewrite.needs_retraining,
            note=note,
            nodes=tuple(layer.node for layer in layers),
            modules=tuple(dict.fromkeys(layer.name for layer in layers)),
        )


def read(graph: Graph, device: Device, allowed: Callable[[str, Layer], bool]) -> Network:
    """Counts the graph, times every op by its roofline, and finds who feeds whom."""
    cost = count(graph)
    readers, maker = graph.readers(), graph.makers()
    products = {i: found for i, op in enumerate(graph.ops) if (found := product(graph, op)) is not None}
    work = {i for i, layer in enumerate(cost.layers) if layer.macs}
    fed: set[int] = set()
    for i, op in enumerate(graph.ops):
        if any(maker[name] in work | fed for name in op.inputs if name in maker):
            fed.add(i)
    feeds: set[int] = set()
    for i in reversed(range(len(graph.ops))):
        if any(j in work | feeds for name in graph.ops[i].outputs for j in readers.get(name, ())):
            feeds.add(i)
    return Network(
        graph=graph,
        device=device,
        cost=cost,
        ms=tuple(roofline(layer, device).ms for layer in cost.layers),
        readers={name: tuple(found) for name, found in readers.items()},
        maker=maker,
        products=products,
        heads=frozenset(products.keys() - fed),
        tails=frozenset(products.keys() - feeds),
        allowed=allowed,
    )


def product(graph: Graph, op: Op) -> Product | None:
    """The op as channels and positions, or None when it is neither a convolution nor a linear layer."""
    if op.kind not in (*CONVOLUTIONS, "linear") or not isinstance(op.args[1], Ref):
        return None
    source, weight, out = (graph.values[name] for name in (op.args[0].name, op.args[1].name, op.outputs[0]))
    if op.kind == "linear":
        c1, c2, groups, taps = weight.shape[1], weight.shape[0], 1, 1
    else:
        axis = 1 if len(source.shape) == len(weight.shape) else 0
        c1, c2, taps = source.shape[axis], weight.shape[0], math.prod(weight.shape[2:])
        groups = c1 // weight.shape[1]
    return Product(c1, c2, groups, taps, source.numel // c1, out.numel // c2, out.dtype.itemsize)


def nearest_multiple(width: float, step: int) -> int:
    """A whole number of vectors, at least one."""
    return max(1, round(width / step)) * step


def plural(number: int, word: str, many: str = "") -> str:
    return f"{number} {word if number == 1 else many or word + 's'}"
