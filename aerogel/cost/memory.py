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

_FOLDS = {"conv1d", "conv2d", "conv3d", "linear"}


def access_bytes(graph: Graph, folded: bool = True) -> list[int]:
    """Bytes read and written by each op of the graph; 0 for an op that disappears in the view."""
    absorbed = absorbed_ops(graph) if folded else {}
    last = {host: op for op, host in absorbed.items()}  # the op whose output the fused kernel writes
    access = []
    for i, op in enumerate(graph.ops):
        if i in absorbed or op.kind in VIEWS:
            access.append(0)
            continue
        reads = sum(graph.values[name].bytes for name in op.inputs)
        outputs = graph.ops[last.get(i, i)].outputs
        writes = sum(graph.values[name].bytes for name in outputs)
        needs_bias = any(graph.ops[j].kind == "batch_norm" for j, host in absorbed.items() if host == i)
        if needs_bias and op.args[2] is None:  # folding a norm gives its layer a bias
            weight = graph.values[op.args[1].name]
            reads += weight.shape[0] * weight.dtype.itemsize
        access.append(reads + writes)
    return access


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
        host = maker.get(source)
        host = absorbed.get(host, host) if host is not None else None
        if (
            host is None
            or graph.ops[host].kind not in _FOLDS
            or source in graph.outputs
            or readers[source] != [i]
        ):
            continue
        last = graph.ops[maker[source]]
        if (
            op.kind == "batch_norm" and last.kind in ACTIVATIONS
        ):  # a norm after the activation cannot be folded back
            continue
        absorbed[i] = host
    return absorbed


@dataclass(frozen=True)
class Peak:
    bytes: int
    op: str  # where it is reached


def peak_bytes(graph: Graph, folded: bool = True) -> Peak:
    """The most activation bytes alive at once, and the op at which they are."""
    absorbed = absorbed_ops(graph) if folded else {}
    storage = _storages(graph, absorbed, folded)
    size: dict[str, int] = {}
    dies: dict[str, int] = {}
    born: dict[str, int] = dict.fromkeys(graph.inputs, -1)
    last = graph.last_use()
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            born.setdefault(storage[name], i)
            last.setdefault(name, i)
    for name, root in storage.items():
        size[root] = max(size.get(root, 0), graph.values[name].bytes)
        dies[root] = max(dies.get(root, -1), last.get(name, -1))
    change = [0] * (len(graph.ops) + 2)
    for root, start in born.items():
        change[max(start, 0)] += size[root]
        change[dies[root] + 1] -= size[root]
    alive, best = 0, Peak(0, "")
    for i, op in enumerate(graph.ops):
        alive += change[i]
        if alive > best.bytes:
            best = Peak(alive, op.where)
    return best


def _storages(graph: Graph, absorbed: dict[int, int], folded: bool) -> dict[str, str]:
    """For each activation, the value whose memory it lives in."""
    last = graph.last_use()
    root = {name: name for name in graph.inputs}
    end = {name: last.get(name, -1) for name in graph.inputs}  # last use of anything in that memory
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            home = _reused(graph, op, i, name, root, end, folded, i in absorbed)
            root[name] = home or name
            end[root[name]] = max(end.get(root[name], -1), last.get(name, i))
    return root


def _reused(
    graph: Graph,
    op: Op,
    i: int,
    out: str,
    root: dict[str, str],
    end: dict[str, int],
    folded: bool,
    absorbed: bool,
) -> str | None:
    """The memory that `out` takes over: a view's, an in-place op's, or that of an operand that dies here."""
    operands = [name for name in op.inputs if name in root]
    if not operands:
        return None
    if op.kind in VIEWS or op.inplace or absorbed:
        return root[operands[0]]
    if folded and op.kind in IN_PLACE:
        for name in operands:
            fits = graph.values[name].bytes == graph.values[out].bytes
            if fits and end[root[name]] <= i and name not in graph.inputs:
                return root[name]
    return None
