"""Memory access cost and peak activation memory of a captured network.

access = sum over ops of (inputs + outputs + weights) in bytes: what ShuffleNetV2 (Ma et al. 2018, section 2) calls
MAC; we say access, so that it is never confused with multiply-accumulates.
peak = the most bytes of activations alive at once when the ops run in order: the network's input until its last use,
every result until its last use. Weights are not in it. A lower bound: an allocator may need more.

Two views: `folded`, as an inference runtime runs it (a batch norm folded into the convolution or linear layer before
it, an activation computed where that layer writes, an addition in the memory of an operand that dies there), and
`raw`, every op by itself as eager PyTorch does.
"""

from __future__ import annotations

from dataclasses import dataclass

from aerogel.cost.ops import ACTIVATIONS, IN_PLACE, VIEWS
from aerogel.graph import Graph, Op

_ROWS = {"embedding", "gather", "index_select"}
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
        reads = _rows_read(graph, op) if op.kind in _ROWS else sum(graph.values[name].bytes for name in op.inputs)
        writes = sum(graph.values[name].bytes for name in graph.ops[last.get(i, i)].outputs)
        if i in normed and op.args[2] is None:  # folding a norm gives its layer a bias
            weight = graph.values[op.args[1].name]
            reads += weight.shape[0] * weight.dtype.itemsize
        access.append(reads + writes)
    return access


def _rows_read(graph: Graph, op: Op) -> int:
    """A lookup reads its indices, and of its table as much as it returns."""
    table = op.args[0].name
    return sum(graph.values[name].bytes for name in (*op.inputs, *op.outputs) if name != table)


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
        copied = source.name in permuted and op.kind in ("reshape", "flatten", "contiguous")
        if copied or source.dtype != graph.values[op.outputs[0]].dtype:
            continue
        found.add(i)
        if source.name in permuted or op.kind in ("permute", "transpose", "t", "expand", "expand_as"):
            permuted.update(op.outputs)
    return found


def absorbed_ops(graph: Graph) -> dict[int, int]:
    """{index of a batch norm or activation: index of the layer that a runtime computes it in}, in order."""
    readers: dict[str, list[int]] = {}
    maker: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        for name in op.inputs:
            readers.setdefault(name, []).append(i)
        maker |= dict.fromkeys(op.outputs, i)
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


@dataclass(frozen=True)
class Peak:
    bytes: int
    op: str  # where it is reached


def peak_bytes(graph: Graph, folded: bool = True) -> Peak:
    """The most activation bytes alive at once, and the op at which they are."""
    storage = _storages(graph, folded)
    last = graph.last_use()
    born = dict.fromkeys(graph.inputs, 0)
    dies: dict[str, int] = {}
    size: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            if name in storage:
                born.setdefault(storage[name], i)
                last.setdefault(name, i)
    for name, root in storage.items():
        size[root] = max(size.get(root, 0), graph.values[name].bytes)
        dies[root] = max(dies.get(root, -1), last.get(name, -1))
    change = [0] * (len(graph.ops) + 2)
    for root, start in born.items():
        change[start] += size[root]
        change[dies[root] + 1] -= size[root]
    alive, best = 0, Peak(0, "")
    for i, op in enumerate(graph.ops):
        alive += change[i]
        if alive > best.bytes:
            best = Peak(alive, op.where)
    return best


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
