"""What each op computes: multiply-accumulates, and element-wise work. One row an op.

MACs: one multiply and one add into an accumulator. FLOPs = 2 x MACs + element-wise work.
Formulas read shapes only, so that they hold for a graph resized by a planned cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

from aerogel.cost.einsum import einsum
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


def _transposed(graph: Graph, op: Op) -> int:
    """Every input element is spread over (O/g) x kernel: weight (I, O/g, *k)."""
    return _in(graph, op, 0).numel * math.prod(_in(graph, op, 1).shape[1:])


def _matmul(graph: Graph, op: Op) -> int:
    """(.., n, k) @ (.., k, m), and with one-dimensional operands."""
    return _out(graph, op).numel * _in(graph, op, 0).shape[-1]


def _bilinear(graph: Graph, op: Op) -> int:
    """y = a W b: (.., i), (o, i, j), (.., j): first W b for every i, then a with it."""
    weight = _in(graph, op, 2).shape
    return _out(graph, op).numel * (weight[1] * weight[2] + weight[1])


def _attention(graph: Graph, op: Op) -> int:
    """softmax(q k^T) v: q (.., l, e), k (.., s, e), v (.., s, f): l s (e + f) for every head; what lacks a batch or a
    head is repeated over the others'."""
    query, key, value = (_in(graph, op, i).shape for i in range(3))
    scores = _scores(query, key) * query[-1]
    return scores + math.prod(_out(graph, op).shape[:-1]) * key[-2] * value[-1]


def _scores(query: Sequence[int], key: Sequence[int], mask: Sequence[int] = ()) -> int:
    """How many scores there are: l s for every head of either operand, or of a mask."""
    leading = (reversed(shape[:-2]) for shape in (query, key, mask))
    heads = (max(sizes) for sizes in zip_longest(*leading, fillvalue=1))
    return math.prod(heads) * query[-2] * key[-2]


def _recurrent(graph: Graph, op: Op) -> int:
    """Every weight matrix is used once for each step of each sequence."""
    matrices = (value.numel for value in _recurrent_weights(graph, op) if len(value.shape) == 2)
    return _positions(graph, op) * sum(matrices)


def _gates(graph: Graph, op: Op) -> int:
    """A convention: for every gate its bias, an activation (4) and a product with what it gates."""
    rows = sum(value.shape[0] for value in _recurrent_weights(graph, op) if len(value.shape) == 2) // 2
    return _positions(graph, op) * 6 * rows


def _positions(graph: Graph, op: Op) -> int:
    """Steps times sequences of a recurrent layer's input, batched or not."""
    return math.prod(_in(graph, op, 0).shape[:-1])


def _recurrent_weights(graph: Graph, op: Op) -> list[Value]:
    """The list of weights and biases among the arguments: after the input and the states; a packed sequence has its
    batch sizes between them."""
    packed = getattr(op.fn, "_overloadname", "") == "data"
    return [graph.values[ref.name] for ref in op.args[3 if packed else 2]]


def _cell(graph: Graph, op: Op) -> int:
    """One step of a recurrent layer: input, states, then the input's matrix (gates, i) and the state's (gates, h)."""
    rows = math.prod(_in(graph, op, 0).shape[:-1])
    return rows * (_in(graph, op, 2).numel + _in(graph, op, 3).numel)


def _cell_gates(graph: Graph, op: Op) -> int:
    """As `_gates`, of one step."""
    return math.prod(_in(graph, op, 0).shape[:-1]) * 6 * _in(graph, op, 2).shape[0]


def _tensordot(graph: Graph, op: Op) -> int:
    """Every output sums over the contracted dimensions of the left operand."""
    left = _in(graph, op, 0).shape
    return _out(graph, op).numel * math.prod(left[dim] for dim in op.args[2])


def _batches_summed(graph: Graph, op: Op) -> int:
    """addbmm: (n, m) + the sum over b of (b, n, k) @ (b, k, m)."""
    batches, _, inner = _in(graph, op, 1).shape
    return _out(graph, op).numel * batches * inner


def _affine_grid(graph: Graph, op: Op) -> int:
    """Every point of the grid, with a 1 behind it, times the matrix theta (n, d, d + 1)."""
    return _out(graph, op).numel * _in(graph, op, 0).shape[-1]


def _einsum(part: int) -> Formula:
    """Its multiply-accumulates (0) or its element-wise work (1)."""
    return lambda graph, op: einsum(op.args[0], [graph.values[ref.name].shape for ref in op.args[1]], op.args[2])[part]


_LAYERS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
_CELLS = [f"{name}_cell" for name in _LAYERS]

MACS: dict[str, Formula] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed),
    "linear": _linear,
    **dict.fromkeys(["mm", "bmm", "mv", "dot", "vdot", "matmul", "inner", "linalg_matmul"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _product(1)),
    # A mixture of experts: each row goes through the matrix of its expert. The names of PyTorch and transformers.
    **dict.fromkeys(["_grouped_mm", "transformers.grouped_mm_fallback"], _matmul),
    "addbmm": _batches_summed,
    "tensordot": _tensordot,
    "affine_grid_generator": _affine_grid,
    "bilinear": _bilinear,
    "einsum": _einsum(0),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_LAYERS, _recurrent),
    **dict.fromkeys(_CELLS, _cell),
}


def _each_output(times: int) -> Formula:
    return lambda graph, op: times * _out(graph, op).numel


def _each_input(graph: Graph, op: Op) -> int:
    return _in(graph, op, 0).numel


def _each_input_times(times: int) -> Formula:
    return lambda graph, op: times * _in(graph, op, 0).numel


def _window(graph: Graph, op: Op) -> int:
    """Pooling with a kernel: one operation for every element of every window."""
    kernel, rank = op.args[1], int(op.kind.split("pool")[1][0])
    size = list(kernel) if isinstance(kernel, list | tuple) else [kernel]
    return _out(graph, op).numel * math.prod(size * rank if len(size) == 1 else size)


def _bias(graph: Graph, op: Op) -> int:
    """The addition of a bias, where there is one."""
    return _out(graph, op).numel if op.args[2] is not None else 0


def _batch_norm(graph: Graph, op: Op) -> int:
    """Scale and shift, where the statistics are constants; else as an instance norm's."""
    return (7 if computes_statistics(op) else 2) * _out(graph, op).numel


def computes_statistics(op: Op) -> bool:
    """Whether a batch norm takes its statistics from the batch, in eval mode too: it has no running ones, or is told
    to train. Such a norm cannot be folded into the layer before it."""
    return op.args[3] is None or bool(op.args[5])


def _softmax_of_scores(graph: Graph, op: Op) -> int:
    """The scores' scale (1) and softmax (5)."""
    mask = _in(graph, op, 3).shape if op.args[3] is not None else ()
    return 6 * _scores(_in(graph, op, 0).shape, _in(graph, op, 1).shape, mask)


def _fft(graph: Graph, op: Op) -> int:
    """A convention: 5 n log2 n for each transform of n points; the real ones half of it."""
    shape, out = _in(graph, op, 0).shape, _out(graph, op).shape
    rank = len(shape)
    sizes, dims = ([given] if isinstance(given, int) else given for given in op.args[1:3])
    if dims is None and op.kind.endswith("n"):
        dims = range(-len(sizes), 0) if sizes else range(rank)
    elif dims is None:
        dims = range(-2, 0) if op.kind.endswith("2") else [-1]
    across = [out[dim] for dim in dims]  # what is padded or cut is transformed as that
    if op.kind.startswith("fft_rfft"):  # of n real points half are written
        across[-1] = sizes[-1] if sizes and sizes[-1] > 0 else shape[dims[-1]]
    points = math.prod(across)
    others = math.prod(shape[d] for d in range(rank) if d not in {i % rank for i in dims})
    whole = int(5 * points * math.log2(max(2, points))) * others
    return whole // 2 if "rfft" in op.kind else whole


def _scattered(graph: Graph, op: Op) -> int:
    """One addition for every number put somewhere."""
    return _in(graph, op, 3).numel


def _sampled(graph: Graph, op: Op) -> int:
    """grid_sampler: as an interpolation, bilinear 7, nearest 0, bicubic 35 for each number."""
    return (7, 0, 35)[op.args[2]] * _out(graph, op).numel


def _searched(graph: Graph, op: Op) -> int:
    """A binary search for each number: among the boundaries that the other operand is."""
    boundaries = _in(graph, op, 1 if op.kind == "bucketize" else 0).shape[-1]
    return _out(graph, op).numel * max(1, math.ceil(math.log2(boundaries + 1)))


def _bags(graph: Graph, op: Op) -> int:
    """embedding_bag: every row looked up is added to its bag."""
    return _in(graph, op, 1).numel * _in(graph, op, 0).shape[-1]


def _distances(graph: Graph, op: Op) -> int:
    """cdist: a difference, a square and a sum for each pair of points and each dimension."""
    return 3 * _out(graph, op).numel * _in(graph, op, 0).shape[-1]


_COMPARISONS = ["gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal",
                "isnan", "isinf", "isfinite", "isclose", "logical_and", "logical_or", "logical_not", "logical_xor",
                "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "__and__", "__or__", "__xor__",
                "__lshift__", "__rshift__"]  # fmt: skip
_ONCE = ["relu", "relu6", "hardtanh", "leaky_relu", "add", "sub", "mul", "div", "neg", "abs", "square", "maximum",
         "minimum", "clamp", "clamp_min", "clamp_max", "clip", "threshold", "prelu", "floor", "ceil", "round", "trunc",
         "frac", "fix", "sign", "sgn", "where", "masked_fill", "outer", "rsub", "reciprocal", "remainder", "fmod",
         "floor_divide", "fmax", "fmin", "softshrink", "hardshrink", "heaviside", "nan_to_num", "diff", "cumsum",
         "cumprod", "cummax", "cummin", "absolute", "negative", "subtract", "multiply", "divide", "true_divide",
         "deg2rad", "rad2deg", "__rsub__", "copysign", "_conj", "conj_physical", *_COMPARISONS]  # fmt: skip
_FOUR = ["elu", "selu", "celu", "sigmoid", "tanh", "hardsigmoid", "hardswish", "silu", "gelu", "mish", "softplus",
         "log_sigmoid", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "float_power", "sqrt", "rsqrt",
         "erf", "erfc", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh",
         "atanh", "sinc", "polar", "logaddexp", "logit", "hypot"]  # fmt: skip
_STATISTICS = ["mean", "sum", "amax", "amin", "aminmax", "max", "min", "argmax", "argmin", "prod", "topk", "sort",
               "argsort", "median", "kthvalue", "any", "all", "nansum", "nanmean", "count_nonzero", "histc",
               "bincount", "trace"]  # fmt: skip
_DEVIATIONS = ["var", "std", "var_mean", "std_mean", "norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
               "frobenius_norm", "norm_except_dim"]  # fmt: skip

ELEMENTWISE: dict[str, Formula] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d",
                     "conv_transpose3d"], _bias),
    **dict.fromkeys(_ONCE, _each_output(1)),
    **dict.fromkeys(_FOUR, _each_output(4)),  # a convention: a handful of simple operations each
    "batch_norm": _batch_norm,
    "instance_norm": _each_output(7),  # mean 1, variance 2, scale and shift 4
    **dict.fromkeys(["layer_norm", "group_norm"], _each_output(7)),
    "rms_norm": _each_output(4),
    **dict.fromkeys(["softmax", "log_softmax", "logsumexp", "logcumsumexp"], _each_input_times(5)),
    "scaled_dot_product_attention": _softmax_of_scores,
    **dict.fromkeys(_LAYERS, _gates),
    **dict.fromkeys(_CELLS, _cell_gates),
    "einsum": _einsum(1),
    **dict.fromkeys(["addcmul", "addcdiv"], _each_output(2)),
    "lerp": _each_output(3),
    "cosine_similarity": _each_input_times(6),
    "pairwise_distance": _each_input_times(3),
    "cdist": _distances,
    "_weight_norm": _each_input_times(4),  # a norm (3) and a scale
    "grid_sampler": _sampled,
    **dict.fromkeys(["bucketize", "searchsorted"], _searched),
    "embedding_bag": _bags,
    "col2im": _each_input,
    "glu": _each_output(5),
    **dict.fromkeys(["upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"], _each_output(7)),
    "upsample_bicubic2d": _each_output(35),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _each_output(1)),
    **{f"fft_{name}{dims}": _fft for name in ("fft", "ifft", "rfft", "irfft") for dims in ("", "2", "n")},
    **dict.fromkeys(["scatter_add", "scatter_reduce", "index_add", "index_reduce"], _scattered),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
                     "max_pool2d_with_indices"], _window),
    **dict.fromkeys(["adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
                     "adaptive_max_pool2d", "adaptive_max_pool3d", *_STATISTICS], _each_input),
    **dict.fromkeys(_DEVIATIONS, _each_input_times(3)),
}  # fmt: skip

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
_REDUCTIONS = {*_STATISTICS, *_DEVIATIONS, "softmax", "log_softmax", "logsumexp", "logcumsumexp", "cumsum", "cumprod",
               "cummax", "cummin"}  # fmt: skip


def family(graph: Graph, op: Op) -> str:
    """The kind of kernel: all of one family reach about the same speed on a device, those of two do not.

    conv (dense, k x k), pointwise (dense, 1 x 1), grouped, depthwise, transposed, matmul, recurrent, norm, pool,
    reduce, elementwise, move (data only) or unknown (no formula). What is only a view of memory is for
    `aerogel.cost.memory.views` to say.
    """
    if op.kind in _CONVOLUTIONS:
        channels, weight = _in(graph, op, 0).shape, _in(graph, op, 1).shape
        groups = channels[1 if len(channels) == len(weight) else 0] // weight[1]
        if groups == 1:
            return "pointwise" if math.prod(weight[2:]) == 1 else "conv"
        return "depthwise" if weight[1] == 1 else "grouped"
    if op.kind.startswith("conv_transpose"):
        return "transposed"
    if op.kind in _LAYERS or op.kind in _CELLS:
        return "recurrent"
    if op.kind in MACS:
        return "matmul"
    if "pool" in op.kind:
        return "pool"
    if op.kind in _NORMS:
        return "norm"
    if op.kind in _REDUCTIONS:
        return "reduce"
    if op.kind in ELEMENTWISE:
        return "elementwise"
    return "move" if op.kind in MOVES | VIEWS else "unknown"


# Another order of the same memory, given by dimensions alone.
PERMUTES = frozenset(
    ["permute", "transpose", "t", "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "diagonal"]
)
# The same memory again and again.
EXPANDS = frozenset(["expand", "expand_as", "broadcast_to"])
# The parts of complex numbers: a view of another type.
COMPLEX_VIEWS = frozenset(["real", "imag", "view_as_real", "view_as_complex"])
# Another view of the same memory: no work, no traffic, no storage; but see `aerogel.cost.memory.views`.
VIEWS = PERMUTES | EXPANDS | COMPLEX_VIEWS | frozenset(
    ["view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "chunk",
     "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "_unsafe_view", "select", "slice",
     "narrow", "unbind", "detach", "alias", "lift", "atleast_1d", "atleast_2d", "atleast_3d", "resolve_conj",
     "resolve_neg", "dropout", "feature_dropout", "alpha_dropout", "contiguous", "to", "type_as", "as_strided"]
)  # fmt: skip
# Makes a tensor of a shape: whatever it takes that shape from, it reads none of it.
CREATES = frozenset(
    ["zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "zeros_like", "ones_like", "full_like",
     "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor", "tril_indices", "triu_indices",
     "rand", "randn", "rand_like", "randn_like", "randint", "randperm", "fill", "zero", "fft_fftfreq",
     "fft_rfftfreq"]
)  # fmt: skip
# Moves data and computes nothing.
MOVES = CREATES | frozenset(
    ["cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "block_diag", "diag",
     "diag_embed", "clone", "copy", "_to_copy", "pad", "constant_pad_nd", "roll", "flip", "fliplr", "flipud", "rot90",
     "repeat", "index_select", "channel_shuffle", "native_channel_shuffle", "embedding", "gather", "scatter", "index",
     "index_put", "index_copy", "index_fill", "masked_scatter", "take", "take_along_dim", "repeat_interleave", "tril",
     "triu", "pixel_shuffle", "pixel_unshuffle", "unfold", "im2col", "upsample_nearest1d", "upsample_nearest2d",
     "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
     "lift_fresh_copy", "one_hot", "tile", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
     "replication_pad1d", "replication_pad2d", "replication_pad3d", "select_scatter", "slice_scatter",
     "diagonal_scatter", "complex", "fft_fftshift", "fft_ifftshift", "cartesian_prod", "combinations", "meshgrid"]
)  # fmt: skip
# What an inference runtime computes where the layer before writes.
ACTIVATIONS = frozenset(
    ["relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "sigmoid", "tanh", "hardsigmoid",
     "hardswish", "silu", "gelu", "mish", "softplus", "clamp", "clamp_min", "clamp_max", "threshold"]
)  # fmt: skip
# What an inference runtime does in the memory of an operand that dies there.
IN_PLACE = ACTIVATIONS | {"prelu", "add", "sub", "mul", "div"}
