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

A reshape is free where PyTorch returns a view, and a copy where it returns none: the strides of every view are
followed, by the rules of PyTorch's own. What any other op makes is taken as contiguous, and so are inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aerogel.cost.ops import (
    ACTIVATIONS,
    COMPLEX_VIEWS,
    CREATES,
    EXPANDS,
    IN_PLACE,
    PERMUTES,
    VIEWS,
    computes_statistics,
)
from aerogel.graph import Graph, Op, Value

Sizes = tuple[int, ...]

_ROWS = {"embedding", "embedding_bag", "gather", "index_select", "index", "take"}
_RESHAPES = {"view", "view_as", "_unsafe_view", "unflatten", "squeeze", "unsqueeze", "atleast_1d", "atleast_2d",
             "atleast_3d", "reshape", "reshape_as", "flatten"}  # fmt: skip
_MAY_COPY = {"reshape", "reshape_as", "flatten"}
_FOLDS = {"conv1d", "conv2d", "conv3d", "linear"}


def access_bytes(graph: Graph, folded: bool = True) -> list[int]:
    """Bytes read and written by each op of the graph; 0 for an op that disappears in the view."""
    absorbed = absorbed_ops(graph) if folded else {}
    last = {host: i for i, host in absorbed.items()}  # the op whose output the fused kernel writes
    normed = {host for i, host in absorbed.items() if graph.ops[i].kind == "batch_norm"}
    layout = _layout(graph)
    free = layout.views | absorbed.keys()
    access = []
    for i, op in enumerate(graph.ops):
        if i in free:
            access.append(0)
            continue
        reads = _bytes_read(graph, op, layout)
        writes = sum(graph.values[name].bytes for name in graph.ops[last.get(i, i)].outputs)
        if i in normed and op.args[2] is None:  # folding a norm gives its layer a bias
            weight = graph.values[op.args[1].name]
            reads += weight.shape[0] * weight.dtype.itemsize
        access.append(reads + writes)
    return access


def _bytes_read(graph: Graph, op: Op, layout: _Layout) -> int:
    """All its inputs, of an expanded one what is stored; but a lookup reads of its table no more than the rows it
    needs, and a new tensor is made of nothing."""
    if op.kind in CREATES:
        return 0
    if op.kind not in _ROWS:
        return sum(_stored(graph.values[name], layout) for name in op.inputs)
    table = op.args[0].name
    rows = graph.values[op.outputs[0]].bytes
    if op.kind == "embedding_bag":
        rows = graph.values[op.args[1].name].numel * graph.values[table].shape[-1] * graph.values[table].dtype.itemsize
    return rows + sum(_stored(graph.values[name], layout) for name in op.inputs if name != table)


def _stored(value: Value, layout: _Layout) -> int:
    """The bytes of memory that a value looks at: each once, however often it shows it."""
    strides = layout.strides.get(value.name)
    if strides is None or not value.numel:
        return value.bytes
    shown = math.prod(size for size, step in zip(value.shape, strides, strict=True) if step)
    span = 1 + sum((size - 1) * step for size, step in zip(value.shape, strides, strict=True))
    return min(shown, span) * value.dtype.itemsize


class _Layout(NamedTuple):
    """How values lie in memory."""

    views: set[int]  # the ops that look at their operand's memory in another way
    strides: dict[str, Sizes]  # of the values that are not contiguous, in elements


def views(graph: Graph) -> set[int]:
    """Indices of the ops that look at their operand's memory in another way.

    A change of type is none of them, nor is a reshape that no strides can show (a channel shuffle): both copy.
    """
    return _layout(graph).views


def _layout(graph: Graph) -> _Layout:
    layout = _Layout(set(), {})
    for i, op in enumerate(graph.ops):
        if op.kind not in VIEWS and not op.inplace:
            continue
        source = graph.values[op.inputs[0]]
        old = layout.strides.get(source.name) or _contiguous(source.shape)
        for value in (graph.values[name] for name in op.outputs):
            if op.kind not in VIEWS and value.shape != source.shape:
                continue
            new, shares = _seen(op, source, old, value) if op.kind in VIEWS else (old, False)
            if shares:
                layout.views.add(i)
            if not _same(value.shape, new, _contiguous(value.shape)):
                layout.strides[value.name] = new
    return layout


def _seen(op: Op, source: Value, old: Sizes, value: Value) -> tuple[Sizes, bool]:
    """The strides of what such an op makes of a source with those strides, and whether it shares the memory."""
    if op.kind in COMPLEX_VIEWS:
        return _of_complex(op, source, old), True
    if source.dtype != value.dtype:
        return _contiguous(value.shape), False
    if op.kind in _RESHAPES:
        new = _reshaped(source.shape, old, value.shape)
        return (_contiguous(value.shape), op.kind not in _MAY_COPY) if new is None else (new, True)
    if op.kind == "ravel":
        return (1,), _same(source.shape, old, _contiguous(source.shape))
    if op.kind in ("contiguous", "to"):
        wanted = _in_format(op, old, value)
        return wanted, _same(source.shape, old, wanted)
    return _moved(op, source, old, value), True


def _moved(op: Op, source: Value, old: Sizes, value: Value) -> Sizes:
    """The strides of a view that keeps the sizes as they are, or some of them."""
    if op.kind in PERMUTES:
        moved: Sizes = op.fn(torch.empty_strided(source.shape, old, device="meta"), *op.args[1:]).stride()
        return moved
    if op.kind in EXPANDS:
        new = len(value.shape) - len(old)
        kept = zip(source.shape, value.shape[new:], old, strict=True)
        return (0,) * new + tuple(step if size == shown else 0 for size, shown, step in kept)
    if op.kind == "as_strided":
        return tuple(op.args[2])
    if op.kind in ("select", "unbind"):
        gone = op.args[1] % len(old)
        return old[:gone] + old[gone + 1 :]
    if op.kind == "slice":
        stepped = op.args[1] % len(old)
        return (*old[:stepped], old[stepped] * op.args[4], *old[stepped + 1 :])
    return old


def _of_complex(op: Op, source: Value, old: Sizes) -> Sizes:
    """A complex number is two real ones beside each other."""
    if op.kind == "view_as_complex":
        return tuple(step // 2 for step in old[:-1])
    doubled = tuple(2 * step for step in old) if source.dtype.is_complex else old
    return (*doubled, 1) if op.kind == "view_as_real" else doubled


def _in_format(op: Op, old: Sizes, value: Value) -> Sizes:
    """The strides that such an op asks for. A format that is not given is PyTorch's default for that op."""
    wanted = next((arg for arg in op.args if isinstance(arg, torch.memory_format)), None)
    if wanted in (torch.channels_last, torch.channels_last_3d):
        return torch.empty(value.shape, device="meta", memory_format=wanted).stride()
    plain = op.kind == "contiguous" or wanted == torch.contiguous_format
    return _contiguous(value.shape) if plain else old


def _contiguous(shape: Sizes) -> Sizes:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def _same(shape: Sizes, one: Sizes, other: Sizes) -> bool:
    """Whether both strides show a tensor of that shape alike: that of a single row is never used."""
    return 0 in shape or all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


def _reshaped(shape: Sizes, strides: Sizes, new: Sizes) -> Sizes | None:
    """The strides that show the same memory in another shape; None where there are none.

    Dimensions behind one another in memory make a block; a new dimension must lie within one.
    """
    if 0 in shape:
        return _contiguous(new)
    blocks = [(1, 1)]  # size, innermost stride
    for size, step in zip(shape, strides, strict=True):
        if size != 1 and blocks[-1][1] == size * step:
            blocks[-1] = blocks[-1][0] * size, step
        elif size != 1:
            blocks.append((size, step))
    left, step = blocks.pop()
    steps = []
    for size in reversed(new):
        if left == 1 and size != 1 and blocks:
            left, step = blocks.pop()
        if left % size:
            return None
        steps.append(step)
        left, step = left // size, step * size
    return tuple(reversed(steps))


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
        if op.kind == "batch_norm" and (graph.ops[before].kind in ACTIVATIONS or computes_statistics(op)):
            continue  # a norm after the activation cannot be folded back, nor what is no constant
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
    for name, root in storage.items():
        dies[root] = max(dies.get(root, -1), last.get(name, -1))
    sizes = {root: graph.values[root].bytes for root in born}  # whatever a view of it shows
    return [Lifetime(root, sizes[root], start, dies[root]) for root, start in born.items() if dies[root] >= start]


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
    layout = _layout(graph)
    shared = layout.views | (absorbed_ops(graph).keys() if folded else set())
    last = graph.last_use()
    root = {name: name for name in graph.inputs}
    end = {name: last.get(name, -1) for name in graph.inputs}  # last use of anything in that memory
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            home: str | None = name
            if i in shared or op.inplace:
                home = root.get(op.inputs[0])
            elif folded and op.kind in IN_PLACE:
                home = _dying(graph, op, i, root, end, layout) or name
            if home is not None:
                root[name] = home
                end[home] = max(end.get(home, -1), last.get(name, i))
    return root


def _dying(graph: Graph, op: Op, i: int, root: dict[str, str], end: dict[str, int], layout: _Layout) -> str | None:
    """The memory of an operand of op i that nothing needs after it, and that the output fits. Not the input's."""
    size = graph.values[op.outputs[0]].bytes
    operands = [graph.values[name] for name in op.inputs if name in root]
    homes = [root[x.name] for x in operands if x.bytes == size == _stored(x, layout)]
    return next((home for home in homes if end[home] <= i and home not in graph.inputs), None)
