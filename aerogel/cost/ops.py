"""What each op computes: multiply-accumulates, and element-wise work. One row an op.

MACs: one multiply and one add into an accumulator. FLOPs = 2 x MACs + element-wise work.
Formulas read shapes only, so that they hold for a graph resized by a planned cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from aerogel.graph import Graph, Op, Ref, Value

Formula = Callable[[Graph, Op], int]


def _in(graph: Graph, op: Op, i: int) -> Value:
    """The value of argument i."""
    arg = op.args[i]
    assert isinstance(arg, Ref), f"argument {i} of {op.kind} is no tensor"
    return graph.values[arg.name]


def _out(graph: Graph, op: Op) -> Value:
    return graph.values[op.outputs[0]]


def _convolution(graph: Graph, op: Op) -> int:
    """Every output element sums over (I/g) x kernel: weight (O, I/g, *k)."""
    weight = _in(graph, op, 1)
    return _out(graph, op).numel * math.prod(weight.shape[1:])


def _linear(graph: Graph, op: Op) -> int:
    return _out(graph, op).numel * _in(graph, op, 1).shape[1]


def _product(first: int) -> Formula:
    """(.., n, k) @ (.., k, m); `first` is the position of the left operand."""
    return lambda graph, op: _out(graph, op).numel * _in(graph, op, first).shape[-1]


MACS: dict[str, Formula] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution),
    "linear": _linear,
    **dict.fromkeys(["mm", "bmm", "matmul"], _product(0)),
    **dict.fromkeys(["addmm", "baddbmm"], _product(1)),
}


def _each_output(times: int) -> Formula:
    return lambda graph, op: times * _out(graph, op).numel


def _each_input(graph: Graph, op: Op) -> int:
    return _in(graph, op, 0).numel


def _window(graph: Graph, op: Op) -> int:
    """Pooling with a kernel: one operation for every element of every window."""
    kernel, rank = op.args[1], int(op.kind.split("pool")[1][0])
    size = list(kernel) if isinstance(kernel, list | tuple) else [kernel]
    return _out(graph, op).numel * math.prod(size * rank if len(size) == 1 else size)


def _bias(graph: Graph, op: Op) -> int:
    """The addition of a bias, where there is one."""
    return _out(graph, op).numel if op.args[2] is not None else 0


_ONCE = ["relu", "relu6", "hardtanh", "leaky_relu", "add", "sub", "mul", "div", "neg", "abs", "square", "maximum",
         "minimum", "clamp", "clamp_min", "clamp_max", "threshold", "prelu"]  # fmt: skip
_FOUR = ["elu", "selu", "celu", "sigmoid", "tanh", "hardsigmoid", "hardswish", "silu", "gelu", "mish", "softplus",
         "exp", "log", "pow", "sqrt", "rsqrt", "erf", "sin", "cos"]  # fmt: skip

ELEMENTWISE: dict[str, Formula] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "linear"], _bias),
    **dict.fromkeys(_ONCE, _each_output(1)),
    **dict.fromkeys(_FOUR, _each_output(4)),  # a convention: a handful of simple operations each
    "batch_norm": _each_output(2),  # scale and shift: in eval mode the statistics are constants
    **dict.fromkeys(["softmax", "log_softmax"], _each_output(5)),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
                     "max_pool2d_with_indices"], _window),
    **dict.fromkeys(["adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
                     "mean", "sum", "amax", "amin"], _each_input),
}  # fmt: skip

# Another view of the same memory: no work, no traffic, no storage; but see `aerogel.cost.memory.views`.
VIEWS = frozenset(
    ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand",
     "expand_as", "chunk", "split", "split_with_sizes", "select", "slice", "narrow", "unbind", "detach", "alias",
     "dropout", "feature_dropout", "alpha_dropout", "contiguous", "to"]
)  # fmt: skip
# Moves data and computes nothing.
MOVES = frozenset(
    ["cat", "stack", "clone", "copy", "_to_copy", "pad", "constant_pad_nd", "roll", "flip", "repeat",
     "index_select", "channel_shuffle"]
)  # fmt: skip
# What an inference runtime computes where the layer before writes.
ACTIVATIONS = frozenset(
    ["relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "sigmoid", "tanh", "hardsigmoid",
     "hardswish", "silu", "gelu", "mish", "softplus", "clamp", "clamp_min", "clamp_max", "threshold"]
)  # fmt: skip
# What an inference runtime does in the memory of an operand that dies there.
IN_PLACE = ACTIVATIONS | {"prelu", "add", "sub", "mul", "div"}
