"""Receptive fields: how many rows of the input one output of a layer can see.

Araujo, Norris, Sim 2019, "Computing receptive fields of convolutional neural networks", Distill 4(11): e21. Output
row 0 of a layer sees the input's rows low ... high, and row i those `jump` x i further. A kernel of k rows with
dilation d, stride s and padding p makes

    low' = low - p jump     high' = high + ((k - 1) d - p) jump     jump' = s jump     size = high - low + 1

Paths that meet (a sum, a concatenation) see the union, if their jumps agree. Padding is part of the size, as in the
article. Only heights are followed, the length of a sequence in one dimension, by convolutions, pools, what works on
each element by itself, and re-orderings that leave rows rows. Behind anything else, global pooling or attention say,
there is no number: None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from aerogel.cost.ops import ACTIVATIONS
from aerogel.graph import Graph, Op, Value

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
          "max_pool2d_with_indices"}  # fmt: skip
_BY_ELEMENT = ACTIVATIONS | {
    "add", "sub", "mul", "div", "maximum", "minimum", "prelu", "batch_norm", "dropout", "feature_dropout",
    "alpha_dropout", "contiguous", "to", "type_as", "clone", "detach", "alias", "neg", "abs", "square", "pow", "sqrt",
    "rsqrt", "exp", "where", "_to_copy", "channel_shuffle", "native_channel_shuffle",
}  # fmt: skip
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}


class Field(NamedTuple):
    """What row 0 sees, how far row 1 is from it, and which dimension the rows are, counted from the end."""

    low: int
    high: int
    jump: int
    axis: int

    @property
    def size(self) -> int:
        return self.high - self.low + 1


def receptive_fields(graph: Graph) -> list[int | None]:
    """For each op of the graph the rows of the input that one row of its first output sees; None where not defined."""
    fields: dict[str, Field | None] = {name: _of_input(graph.values[name]) for name in graph.inputs}
    found: list[int | None] = []
    for op in graph.ops:
        before = [fields[name] for name in op.inputs if name in fields]  # what no input leads to sees nothing
        out = _after(graph, op, before) if before else None
        if before:
            fields |= dict.fromkeys(op.outputs, out)
        found.append(out.size if out is not None else None)
    return found


def _of_input(value: Value) -> Field | None:
    """Images (n, c, h, w), sequences (n, c, l), volumes (n, c, d, h, w); an unbatched one is not told from these."""
    if not value.dtype.is_floating_point or len(value.shape) not in (3, 4, 5):
        return None
    return Field(0, 0, 1, -1 if len(value.shape) == 3 else -2)


def _after(graph: Graph, op: Op, before: list[Field | None]) -> Field | None:
    known = [field for field in before if field is not None]
    rule = _RULES.get(op.kind)
    one = _union(known) if len(known) == len(before) else None
    if rule is None or one is None or (rule in (_convolution, _linear) and len(before) > 1):  # a computed weight
        return None
    return rule(graph, op, one)


def _union(fields: list[Field]) -> Field | None:
    """What all of them see together."""
    if len({(field.jump, field.axis) for field in fields}) != 1:
        return None
    return fields[0]._replace(low=min(f.low for f in fields), high=max(f.high for f in fields))


def _same(graph: Graph, op: Op, field: Field) -> Field | None:
    return field


def _slid(field: Field, kernel: int, stride: int, padding: int, dilation: int) -> Field:
    low = field.low - padding * field.jump
    high = field.high + ((kernel - 1) * dilation - padding) * field.jump
    return field._replace(low=low, high=high, jump=stride * field.jump)


def _convolution(graph: Graph, op: Op, field: Field) -> Field | None:
    """(x, weight, bias, stride, padding, dilation, groups): weight (o, i, *k)."""
    weight = graph.values[op.args[1].name].shape
    spatial = len(weight) - 2
    if field.axis != -min(2, spatial):
        return None
    kernel, dilation = weight[field.axis], _rows(op.args[5], spatial)
    padding = op.args[4]
    if isinstance(padding, str):
        padding = (kernel - 1) * dilation // 2 if padding == "same" else 0
    return _slid(field, kernel, _rows(op.args[3], spatial), _rows(padding, spatial), dilation)


def _pool(graph: Graph, op: Op, field: Field) -> Field | None:
    """(x, kernel, stride, padding, dilation of a maximum)."""
    spatial = int(op.kind.split("pool")[1][0])
    if field.axis != -min(2, spatial):
        return None
    kernel = _rows(op.args[1], spatial)
    stride = _rows(op.args[2], spatial) if op.args[2] else kernel
    dilation = _rows(op.args[4], spatial) if op.kind.startswith("max") else 1
    return _slid(field, kernel, stride, _rows(op.args[3], spatial), dilation)


def _rows(given: int | list[int], spatial: int) -> int:
    """The height's number among those of the spatial dimensions; one number is that of all."""
    if isinstance(given, int):
        return given
    return given[-min(2, spatial)] if len(given) > 1 else given[0]


def _padded(graph: Graph, op: Op, field: Field) -> Field | None:
    """(x, amounts before and after of the last dimension, of the one before it, ...)."""
    before = op.args[1][2 * -field.axis - 2 : 2 * -field.axis - 1]
    shift = before[0] * field.jump if before else 0
    return field._replace(low=field.low - shift, high=field.high - shift)


def _linear(graph: Graph, op: Op, field: Field) -> Field | None:
    """Works along the last dimension."""
    return field if field.axis != -1 else None


def _layer_norm(graph: Graph, op: Op, field: Field) -> Field | None:
    """Takes statistics over the last dimensions."""
    return field if -field.axis > len(op.args[1]) else None


def _along(graph: Graph, op: Op, field: Field) -> Field | None:
    """cat, chunk, split, select, slice: along a dimension that rows do not run on."""
    rank = len(graph.values[op.inputs[0]].shape)
    dim = op.args[{"select": 1, "slice": 1, "cat": 1}.get(op.kind, 2)]
    if dim % rank == field.axis % rank:
        return None
    gone = op.kind == "select" and dim % rank > field.axis % rank
    return field._replace(axis=field.axis + 1) if gone else field


def _permuted(graph: Graph, op: Op, field: Field) -> Field | None:
    rank = len(graph.values[op.inputs[0]].shape)
    order = list(range(rank))
    if op.kind in _SWAPS:
        a, b = op.args[1] % rank, op.args[2] % rank
        order[a], order[b] = b, a
    else:
        order = [dim % rank for dim in op.args[1]]
    return field._replace(axis=order.index(field.axis % rank) - rank)


def _reshaped(graph: Graph, op: Op, field: Field) -> Field | None:
    """Rows stay rows where everything from that dimension on keeps its shape, and as much lies before it."""
    before, after = graph.values[op.inputs[0]].shape, graph.values[op.outputs[0]].shape
    same = len(after) >= -field.axis and before[field.axis :] == after[field.axis :]
    return field if same and math.prod(before) == math.prod(after) else None


Rule = Callable[[Graph, Op, Field], Field | None]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_BY_ELEMENT, _same),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(["pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"], _padded),
    "linear": _linear,
    "layer_norm": _layer_norm,
    **dict.fromkeys(["cat", "chunk", "split", "split_with_sizes", "select", "slice"], _along),
    **dict.fromkeys([*_SWAPS, "permute"], _permuted),
    **dict.fromkeys(_RESHAPES, _reshaped),
}
