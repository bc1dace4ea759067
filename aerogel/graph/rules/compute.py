"""Rules of ops that multiply and add: what is summed over is one thing on both sides.

Letters: N batch, I and O input and output channels, g groups, k kernel, H heads, T tokens, d width of a head.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from aerogel.graph.graph import Op, Ref
from aerogel.graph.labels import Labels, Tag, along_dim, field_along, wide
from aerogel.graph.rules.elementwise import elementwise


def convolution(state: Labels, op: Op) -> list[Tag]:
    """x (N, I, *), weight (O, I/g, *k) -> (N, O, *). Depthwise: input c feeds outputs c*m ... c*m+m-1.

    Otherwise grouped: the k-th channels of all groups are tied, so that groups keep equal counts.
    """
    x, weight, bias = op.args[:3]
    if not state.is_matrix(weight, bias) or state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) convolves with a computed weight")
    _hold_kernel(state, op, weight)
    ndim = len(state.shape(x))
    axis = 1 if ndim == len(state.shape(weight)) else 0  # 0: no batch dimension
    size, per_group = state.shape(x)[axis], state.shape(weight)[1]
    channels, rest = state.along(state.of(x), axis, size, op)
    out, groups = state.factor(weight, 0), size // per_group
    if groups == 1:
        state.unify(channels, state.factor(weight, 1))
    elif per_group == 1:
        state.unify(out.view(groups, -1), channels.view(groups, 1))
    else:
        state.unify(channels.view(groups, per_group), state.factor(weight, 1))
        state.unify(out.view(groups, -1), out.view(groups, -1)[:1])
    return _with_bias(state, op, bias, out, axis, ndim, rest)


def transposed(state: Labels, op: Op) -> list[Tag]:
    """x (N, I, *), weight (I, O/g, *k) -> (N, O, *). As above; one input a group: it goes with its O/g outputs."""
    x, weight, bias = op.args[:3]
    if not state.is_matrix(weight, bias) or state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) convolves with a computed weight")
    _hold_kernel(state, op, weight)
    ndim = len(state.shape(x))
    axis = 1 if ndim == len(state.shape(weight)) else 0
    size, each = state.shape(weight)[:2]
    groups = state.graph.values[op.outputs[0]].shape[axis] // each
    channels, rest = state.along(state.of(x), axis, size, op)
    state.unify(channels, state.factor(weight, 0))
    if groups == 1:
        out = state.factor(weight, 1)
    elif groups == size:
        out = channels.repeat_interleave(each)
    else:
        state.unify(channels.view(groups, -1), channels.view(groups, -1)[:1])
        out = state.factor(weight, 1).repeat(groups)
    return _with_bias(state, op, bias, out, axis, ndim, rest)


def _hold_kernel(state: Labels, op: Op, weight: Ref) -> None:
    """Of a computed weight every dimension has labels; those of the kernel's pixels stay."""
    for labels in state.factors.get(weight.name, [])[2:]:
        state.pin(labels, f"{op.kind} ({op.where}) has its kernel there")


def _with_bias(
    state: Labels, op: Op, bias: Ref | None, out: Tensor, axis: int, ndim: int, rest: tuple[Tensor, ...]
) -> list[Tag]:
    if bias is not None:
        state.unify(state.factor(bias, 0), out)
    for field in rest:
        if any(d > axis for d in wide(field)):
            state.pin(field, f"{op.kind} ({op.where}) works along them")
    return [Tag((*rest, *field_along(out, axis, ndim)))]


# ---------------------------------------------------------------- products


def linear(state: Labels, op: Op) -> list[Tag]:
    """x (*, I), weight (O, I), bias (O,) -> (*, O)."""
    x, weight, bias = op.args[:3]
    if not state.is_matrix(weight, bias):
        return state.pin_all(op, f"{op.kind} ({op.where}) multiplies by a computed weight")
    lead = string.ascii_lowercase[: len(state.shape(x)) - 1]
    tags = contract(state, op, [(x, lead + "I"), (weight, "OI")], lead + "O")
    if bias is not None:
        state.unify(state.factor(bias, 0), state.factor(weight, 0))
    tie_fused_attention(state, weight)
    return tags


def tie_fused_attention(state: Labels, weight: Ref) -> None:
    """nn.MultiheadAttention's three projections in one: its code takes their width from that of the input."""
    shape = state.shape(weight)
    if state.value(weight).target.endswith("in_proj_weight") and shape[0] == 3 * shape[1]:
        state.unify(state.factor(weight, 0).view(3, -1), state.factor(weight, 1))


def matmul(state: Labels, op: Op) -> list[Tag]:
    """a (*, m, k), b (*, k, n) -> (*, m, n); a vector has k alone."""
    a, b = op.args[:2]
    ranks = len(state.shape(a)), len(state.shape(b))
    lead = string.ascii_lowercase[: max(*ranks, 2) - 2]
    left = "K" if ranks[0] == 1 else f"{lead[len(lead) - ranks[0] + 2 :]}MK"
    right = "K" if ranks[1] == 1 else f"{lead[len(lead) - ranks[1] + 2 :]}KN"
    out = lead + ("M" if ranks[0] > 1 else "") + ("N" if ranks[1] > 1 else "")
    return contract(state, op, [(a, left), (b, right)], out)


def added_product(state: Labels, op: Op) -> list[Tag]:
    """addmm, baddbmm: c + a b."""
    c, a, b = op.args[:3]
    (product,) = matmul(state, _with_args(op, [a, b]))
    return elementwise(state, op, [(c, None), (Ref(op.outputs[0]), product)])


def einsum(state: Labels, op: Op) -> list[Tag]:
    """By its letters. "..." stands for as many dimensions as an operand has more than letters."""
    equation, operands = op.args[0].replace(" ", ""), op.args[1]
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or any(len(set(t.replace("...", ""))) < len(t.replace("...", "")) for t in terms):
        return state.pin_all(op, f"{op.kind} ({op.where}) takes a diagonal, or does not name its result")
    extra = [c for c in string.ascii_letters if c not in equation]
    ranks = [len(state.shape(ref)) - len(term.replace("...", "")) for ref, term in zip(operands, terms, strict=True)]
    dots = "".join(extra[: max(ranks, default=0)])
    named = [(ref, t.replace("...", dots[len(dots) - r :])) for ref, t, r in zip(operands, terms, ranks, strict=True)]
    return contract(state, op, named, out.replace("...", dots))


def attention(state: Labels, op: Op) -> list[Tag]:
    """q (*, H, T, d), k (*, H', S, d), v (*, H', S, e) -> (*, H, T, e): softmax(q k^T scale + mask) v."""
    q, k, v = op.args[:3]
    scale = op.args[6] if len(op.args) > 6 else None
    lead = string.ascii_lowercase[: len(state.shape(q)) - 2]
    if state.shape(q)[:-2] == state.shape(k)[:-2]:
        repeated: list[tuple[Ref, Tag | None]] = [(k, None), (v, None)]
    else:  # each of k's and v's heads serves several of q's
        times = state.shape(q)[-3] // state.shape(k)[-3]
        repeated = [(ref, _repeat_heads(state.of(ref), state.shape(ref), times)) for ref in (k, v)]
    (key, key_tag), (value, value_tag) = repeated
    scored: list[tuple[Ref, str]] = [(q, lead + "TD"), (key, lead + "SD")]
    if isinstance(op.args[3], Ref):  # a bias by head goes with the heads
        scored.append((op.args[3], (lead + "TS")[-len(state.shape(op.args[3])) :]))
    contract(state, op, scored, lead + "TS", [None, key_tag, None])
    if scale is None:
        for field in state.of(q).fields:
            if wide(field) == [field.ndim - 1]:
                state.pin(field, f"{op.kind} ({op.where}) scales by the width of a head: only whole heads can go")
    scores = Tag(tuple(f for f in state.of(q).fields if f.shape[-1] == 1 and f.shape[-2] == 1))
    out = Ref(op.outputs[0])
    return contract(state, op, [(out, lead + "TS"), (value, lead + "SE")], lead + "TE", [scores, value_tag])


def _repeat_heads(tag: Tag, shape: tuple[int, ...], times: int) -> Tag:
    d = len(shape) - 3
    return Tag(tuple(f.repeat_interleave(times, d) if f.shape[d] > 1 else f for f in tag.fields), tag.base)


def contract(
    state: Labels,
    op: Op,
    operands: Sequence[tuple[Ref, str]],
    out: str,
    tags: Sequence[Tag | None] | None = None,
) -> list[Tag]:
    """A product of operands whose dimensions have letters: what has one letter is one thing.

    tags: of the operands, where they are not those of the values. A weight's dimensions are labelled each by itself.
    """
    size: dict[str, int] = {}
    for ref, letters in operands:
        for letter, n in zip(letters, _shape(state, ref, letters, op, out), strict=True):
            size[letter] = max(n, size.get(letter, 1))
    vectors: dict[str, list[Tensor]] = {letter: [] for letter in size}
    for i, (ref, letters) in enumerate(operands):
        tag = tags[i] if tags else None
        if tag is None and state.is_matrix(ref):
            for d, letter in enumerate(letters):
                if state.shape(ref)[d] > 1 or size[letter] == 1:
                    vectors[letter].append(state.factor(ref, d))
            continue
        tag = state.of(ref) if tag is None else tag
        named = set()
        for field in tag.fields:
            varying = wide(field)
            if len(varying) == 1:
                vectors[letters[varying[0]]].append(field.flatten())
            elif varying:
                _note_heads(state, field, letters, operands, out)
                if state.head_of is not None:
                    state.pin(field, f"{op.kind} ({op.where}) mixes them along several dimensions")
            named |= {letters[d] for d in varying}
        for d, n in enumerate(_shape(state, ref, letters, op, out)):
            if n > 1 and letters[d] not in named and d not in tag.free:
                vectors[letters[d]].append(torch.tensor([tag.base]))
    fields = []
    for letter, found in vectors.items():
        for other in found[1:]:
            state.unify(found[0], other)
        named_one = next((v for v in found if len(v) > 1 and bool((v != 0).any())), None)
        if letter in out and named_one is not None:
            fields.append(along_dim(named_one, out.index(letter), len(out)))
    return [Tag(tuple(fields))]


def _shape(state: Labels, ref: Ref, letters: str, op: Op, out: str) -> tuple[int, ...]:
    """Attention's scores are no value: their sizes are not needed, every letter of theirs is some operand's too."""
    return state.shape(ref) if ref.name not in op.outputs else (1,) * len(letters)


def _note_heads(state: Labels, field: Tensor, letters: str, operands: Sequence[tuple[Ref, str]], out: str) -> None:
    """Labels that change along a letter of all operands and the result are taken head by head; that letter counts."""
    batch = [
        d for d in wide(field) if letters[d] in out and all(letters[d] in other for _, other in operands)
    ]  # fmt: skip
    if len(batch) == 1 and len(wide(field)) == 2:
        head = along_dim(torch.arange(field.shape[batch[0]]), batch[0], field.ndim).expand(field.shape)
        state.heads.append(torch.stack([field.flatten(), head.flatten()]))


# ---------------------------------------------------------------- look-up and recurrence


def embedding(state: Labels, op: Op) -> list[Tag]:
    """weight (V, D), index (*) -> (*, D). Rows are looked up by number: they stay."""
    weight, index = op.args[:2]
    if not state.is_matrix(weight):
        return state.pin_all(op, f"{op.kind} ({op.where}) looks up a computed weight")
    state.pin_tag(state.of(index), f"{op.kind} ({op.where}) takes them for row numbers")
    state.pin(state.factor(weight, 0), f"{op.kind} ({op.where}) looks rows up by number")
    shape = state.graph.values[op.outputs[0]].shape
    return [Tag(field_along(state.factor(weight, 1), len(shape) - 1, len(shape)))]


def recurrent(state: Labels, op: Op) -> list[Tag]:
    """lstm, gru, rnn: x (T, N, I) or (N, T, I), weights (G*H, I), (G*H, H), biases (G*H,) for G gates -> (T, N, D*H).

    The module has one hidden size: the k-th units of all gates, layers and directions are tied.
    """
    x, state_in, parameters, has_biases, layers = op.args[:5]
    if not isinstance(parameters, list) or not isinstance(has_biases, bool):
        return state.pin_all(op, f"{op.kind} ({op.where}) reads packed sequences")
    both = bool(op.args[7])
    each = 4 if has_biases else 2
    first = [state.shape(ref) for ref in parameters[:2]]
    gates, hidden = first[1][0] // first[1][1], first[1][1]
    if not state.is_matrix(*parameters) or len(parameters) != each * layers * (1 + both):
        return state.pin_all(op, f"{op.kind} ({op.where}) projects its output, or computes its weights")
    x_channels, rest = state.along(state.of(x), len(state.shape(x)) - 1, state.shape(x)[-1], op)
    for field in rest:
        state.pin(field, f"{op.kind} ({op.where}) works along them")
    units = state.factor(parameters[1], 1)
    for i in range(0, len(parameters), each):
        w_in, w_hidden, *biases = parameters[i : i + each]
        inputs = x_channels if i < each * (1 + both) else units.repeat(1 + both)
        state.unify(state.factor(w_in, 1), inputs)
        state.unify(state.factor(w_hidden, 1), units)
        for ref in (w_in, w_hidden, *biases):
            state.unify(state.factor(ref, 0).view(gates, hidden), units)
    for ref in state_in if isinstance(state_in, list) else [state_in]:
        tag, last = state.of(ref), len(state.shape(ref)) - 1
        if last not in tag.free:
            state.unify(state.along(tag, last, hidden, op)[0], units)
    shapes = [state.graph.values[name].shape for name in op.outputs]
    vectors = [units.repeat(1 + both), *(units for _ in shapes[1:])]
    return [Tag(field_along(v, len(s) - 1, len(s))) for v, s in zip(vectors, shapes, strict=True)]


def weight_norm(state: Labels, op: Op) -> list[Tag]:
    """v (O, I, *k), g (O, 1, *1), dim -> g v / |v|: a weight, its dimensions are v's. Zeros add nothing to |v|."""
    v, g, dim = (*op.args, 0)[:3]
    if not state.is_matrix(v, g):
        return state.pin_all(op, f"{op.kind} ({op.where}) scales a computed weight")
    labels = [state.factor(v, d) for d in range(len(state.shape(v)))]
    state.unify(labels[dim], state.factor(g, dim))
    state.factors[op.outputs[0]] = labels
    return [Tag() for _ in op.outputs]


def _with_args(op: Op, args: list[Ref]) -> Op:
    return Op(op.name, op.kind, op.fn, tuple(args), op.outputs, op.module, op.source)


COMPUTE = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], transposed),
    "linear": linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot"], matmul),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], added_product),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], recurrent),
    **dict.fromkeys(["_weight_norm", "_weight_norm_interface"], weight_norm),
}  # fmt: skip
