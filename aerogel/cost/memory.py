"""Memory access cost and peak activation memory of a captured network.

access = sum over ops of (inputs + outputs + weights) in bytes: what ShuffleNetV2 (Ma et al. 2018, section 2) calls
MAC; we say access, so that it is never confused with multiply-accumulates.
peak = the most bytes of activations alive at once when the ops run in order: the network's input until its last use,
every result until its last use. Weights are not in it. A lower bound: an allocator may need more.
arena = the one block of memory in which a planner lays all activations out beforehand, so that no two that live at
one time overlap: greedy by size for offsets (Pisarchyk, Lee 2020, "Efficient memory management for deep neural net
inference", arXiv:2001.03288: the largest first, each into the smallest gap that holds it, else behind the others). At
least the peak. Offsets are not aligned here.

Two views: `folded`, as an inference runtime runs it (a batch norm folded into the convolution or linear layer before
it, an activation computed where that layer writes, an addition in the memory of an operand that dies there), and
`raw`, every op by itself as eager PyTorch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aerogel.cost.ops import ACTIVATIONS, COMPLEX_VIEWS, CREATES, IN_PLACE, PERMUTES, VIEWS
from aerogel.graph import Graph, Op

_ROWS = {"embedding", "embedding_bag", "gather", "index_select", "index", "take"}
_COPY_PERMUTED = {"reshape", "reshape_as", "flatten", "ravel", "contiguous"}
_FOLDS = {"conv1d", "conv2d", "conv3d", "linear"}


def access_bytes(graph: Graph, folded: bool = True) -> list[int]:
    """Bytes read and written by each op of the graph; 0 for an op that disappears in the view."""
    absorbed = absorbed_ops(graph) if folded else {}
    last = {host: i for i, host in absorbed.items()}  # the op whose output the fused kernel writes
    normed = {host for i, host in absorbed.items() if graph.ops[i].kind == "batch_norm"}
    free = views(graph) | absorbed.keys()
    access = []
    for i, op in enumerate(graph.ops):
        if i in free:
            access.append(0)
            continue
        reads = _bytes_read(graph, op)
        writes = sum(graph.values[name].bytes for name in graph.ops[last.get(i, i)].outputs)
        if i in normed and op.args[2] is None:  # folding a norm gives its layer a bias
            weight = graph.values[op.args[1].name]
            reads += weight.shape[0] * weight.dtype.itemsize
        access.append(reads + writes)
    return access


def _bytes_read(graph: Graph, op: Op) -> int:
    """All its inputs; but a lookup reads of its table no more than the rows it needs, and a new tensor is made of
    nothing."""
    if op.kind in CREATES:
        return 0
    if op.kind not in _ROWS:
        return sum(graph.values[name].bytes for name in op.inputs)
    table = op.args[0].name
    rows = graph.values[op.outputs[0]].bytes
    if op.kind == "embedding_bag":
        rows = graph.values[op.args[1].name].numel * graph.values[table].shape[-1] * graph.values[table].dtype.itemsize
    return rows + sum(graph.values[name].bytes for name in op.inputs if name != table)


def views(graph: Graph) -> set[int]:
    """Indices of the ops that look at their operand's memory in another way.

    A change of type is none of them, nor is a reshape of a permuted tensor (a channel shuffle): both copy.
    """
    found: set[int] = set()
    permuted: set[str] = set()
    for i, op in enumerate(graph.ops):
        if op.kind not in VIEWS:
            continue
        source = graph.values[op.inputs[0]]
        copied = source.name in permuted and op.kind in _COPY_PERMUTED
        converted = source.dtype != graph.values[op.outputs[0]].dtype and op.kind not in COMPLEX_VIEWS
        if copied or converted:
            continue
        found.add(i)
        if source.name in permuted or op.kind in PERMUTES:
            permuted.update(op.outputs)
    return found


def absorbed_ops(graph: Graph) -> dict[int, int]:
    """{index of a batch norm or activation: index of the layer that a runtime computes it in}, in order."""
    readers, maker = graph.readers(), graph.makers()
    absorbed: dict[int, int] = {}
    for i, op in enumerate(graph.ops):
        if op.kind != "batch_norm" and op.kind not in ACTIVATIONS:
            continue
        source = op.inputs[0]
        before = maker.get(source)
        if before is None or source in graph.outputs or readers[source] != [i]:
            continue
        if op.kind == "batch_norm" and graph.ops[before].kind in ACTIVATIONS:
            continue  # a norm after the activation cannot be folded back
        host = absorbed.get(before, before)
        if graph.ops[host].kind in _FOLDS:
            absorbed[i] = host
    return absorbed


class Lifetime(NamedTuple):
    """A piece of activation memory: the value it was made for, and the first and last op during which it is held."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Alive:
    """An activation that is alive where the peak is reached."""

    name: str  # the module that made it, or the input's name
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Peak:
    bytes: int
    op: str  # where it is reached
    node: str = ""  # the op itself
    alive: tuple[Alive, ...] = ()  # largest first


def lifetimes(graph: Graph, folded: bool = True) -> list[Lifetime]:
    """The activations' memory, one for all values that share it; what no op needs is held nowhere and is left out."""
    storage = _storages(graph, folded)
    last = graph.last_use()
    born = dict.fromkeys(graph.inputs, 0)
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            if name in storage:
                born.setdefault(storage[name], i)
                last.setdefault(name, i)
    dies: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, root in storage.items():
        size[root] = max(size.get(root, 0), graph.values[name].bytes)
        dies[root] = max(dies.get(root, -1), last.get(name, -1))
    return [Lifetime(root, size[root], start, dies[root]) for root, start in born.items() if dies[root] >= start]


def timeline(held: Sequence[Lifetime], ops: int) -> list[int]:
    """The bytes alive during each of so many ops."""
    change = [0] * (ops + 2)
    for life in held:
        change[life.first] += life.bytes
        change[life.last + 1] -= life.bytes
    alive, found = 0, []
    for step in change[:ops]:
        alive += step
        found.append(alive)
    return found


def peak_bytes(graph: Graph, folded: bool = True) -> Peak:
    """The most activation bytes alive at once, the op at which they are, and what they are."""
    held = lifetimes(graph, folded)
    return peak_of(graph, held, timeline(held, len(graph.ops)))


def peak_of(graph: Graph, held: Sequence[Lifetime], alive_bytes: Sequence[int]) -> Peak:
    """The peak of a timeline: the first op that reaches it."""
    if max(alive_bytes, default=0) == 0:
        return Peak(0, "")
    at = max(range(len(alive_bytes)), key=alive_bytes.__getitem__)
    maker = {name: op.where for op in graph.ops for name in op.outputs}
    there = sorted((life for life in held if life.first <= at <= life.last), key=lambda life: -life.bytes)
    alive = tuple(Alive(maker.get(x.name, x.name), graph.values[x.name].shape, x.bytes) for x in there)
    return Peak(alive_bytes[at], graph.ops[at].where, graph.ops[at].name, alive)


def arena_bytes(held: Sequence[Lifetime]) -> int:
    """The size of the arena that greedy-by-size reaches."""
    placed: list[tuple[int, int, Lifetime]] = []  # begin, end
    for life in sorted(held, key=lambda life: (-life.bytes, life.first, life.last)):
        taken = sorted((a, b) for a, b, x in placed if x.first <= life.last and life.first <= x.last)
        begin = _best_gap(taken, life.bytes)
        placed.append((begin, begin + life.bytes, life))
    return max((end for _, end, _ in placed), default=0)


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Where the smallest gap begins that holds `size` bytes; behind everything when none does."""
    best: tuple[int, int] | None = None  # gap, begin
    end = 0
    for begin, stop in taken:
        if begin - end >= size and (best is None or begin - end < best[0]):
            best = (begin - end, end)
        end = max(end, stop)
    return end if best is None else best[1]


def _storages(graph: Graph, folded: bool) -> dict[str, str]:
    """For each activation, the value whose memory it lives in. A view of a weight lives in none of them."""
    shared = views(graph) | (absorbed_ops(graph).keys() if folded else set())
    last = graph.last_use()
    root = {name: name for name in graph.inputs}
    end = {name: last.get(name, -1) for name in graph.inputs}  # last use of anything in that memory
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            home: str | None = name
            if i in shared or op.inplace:
                home = root.get(op.inputs[0])
            elif folded and op.kind in IN_PLACE:
                home = _dying(graph, op, i, root, end) or name
            if home is not None:
                root[name] = home
                end[home] = max(end.get(home, -1), last.get(name, i))
    return root


def _dying(graph: Graph, op: Op, i: int, root: dict[str, str], end: dict[str, int]) -> str | None:
    """The memory of an operand of op i that nothing needs after it, and that the output fits. Not the input's."""
    size = graph.values[op.outputs[0]].bytes
    homes = [root[name] for name in op.inputs if name in root and graph.values[name].bytes == size]
    return next((home for home in homes if end[home] <= i and home not in graph.inputs), None)
