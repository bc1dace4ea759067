"""Rules of ops that work number by number: operands of any number, broadcast together; what meets is one thing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aerogel.graph.graph import Op, Ref, refs
from aerogel.graph.labels import Labels, Tag, field_along, padded, wide


def elementwise(state: Labels, op: Op, operands: Sequence[tuple[Ref, Tag | None]] | None = None) -> list[Tag]:
    """Fields that change along the same dimensions are one thing.

    Where one operand has labels and another has none, the other is constant there and holds them, unless it has size
    1 (a one-channel gate, a scalar) or is as long as it needs to be: then it is no partner of any single index.
    operands: with their tags, where they are not the op's arguments.
    """
    if operands is None and _of_weights(state, op):
        return [Tag()]
    shape = state.graph.values[op.outputs[0]].shape
    given = [(ref, None) for ref in refs(op.args)] if operands is None else list(operands)
    lead = [len(shape) - len(state.shape(ref)) for ref, _ in given]
    known: list[Tag | None] = [tag or (None if state.is_matrix(ref) else state.of(ref)) for ref, tag in given]
    along = {d + n for tag, n in zip(known, lead, strict=True) if tag for field in tag.fields for d in wide(field)}
    tags = [
        _aligned(tag or state.of(ref, [d - n for d in along]), n, len(shape))
        for (ref, _), tag, n in zip(given, known, lead, strict=True)
    ]
    sizes = [[1] * n + list(state.shape(ref)) for (ref, _), n in zip(given, lead, strict=True)]
    fields = [(i, field) for i, tag in enumerate(tags) for field in tag.fields]
    for n, (i, field) in enumerate(fields):
        varying = set(wide(field))
        met = {i}
        for j, other in fields[n + 1 :]:
            common = varying & set(wide(other))
            if i == j or not common:
                continue
            if common in (varying, set(wide(other))):
                state.unify(field, other)
            else:
                for labels in (field, other):
                    state.pin(labels, f"{op.kind} ({op.where}) mixes them along several dimensions")
        met |= {j for j, other in fields if varying & set(wide(other))}
        for j, tag in enumerate(tags):
            if j not in met:
                _hold(state, op, field, tag, sizes[j], shape)
    out: dict[tuple[int, ...], Tensor] = {}
    for _, field in fields:
        out.setdefault(tuple(wide(field)), field)
    shown = [f for v, f in out.items() if v and not any(_says_more(state, set(u), set(v)) for u in out if u)]
    shown = shown or [f for f in out.values() if list(f.shape) == list(shape)][:1]
    everywhere = [tag.free for tag, size in zip(tags, sizes, strict=True) if list(size) == list(shape)]
    free = frozenset.intersection(*everywhere) if everywhere else frozenset[int]()
    return [Tag(tuple(shown), max((tag.base for tag in tags), default=0), free)] * len(op.outputs)


def _says_more(state: Labels, u: set[int], v: set[int]) -> bool:
    """Of two fields that are one thing, the one along fewer dimensions; while heads are looked for, along more."""
    return u > v if state.head_of is None else u < v


def _of_weights(state: Labels, op: Op) -> bool:
    """A weight computed from weights alone: its dimensions are theirs."""
    given = list(refs(op.args))
    if not given or not all(map(state.is_matrix, given)):
        return False
    ndim = len(state.graph.values[op.outputs[0]].shape)
    labels = [torch.zeros(1, dtype=torch.long)] * ndim
    for ref in given:
        for d, n in enumerate(state.shape(ref), start=ndim - len(state.shape(ref))):
            if n > 1:
                own = state.factor(ref, d - ndim + len(state.shape(ref)))
                if len(labels[d]) > 1:
                    state.unify(own, labels[d])
                labels[d] = own
    state.factors[op.outputs[0]] = labels
    return True


def _aligned(tag: Tag, lead: int, ndim: int) -> Tag:
    """A tag for the shape with which its value takes part."""
    return Tag(tuple(padded(field, ndim) for field in tag.fields), tag.base, frozenset(d + lead for d in tag.free))


def _hold(state: Labels, op: Op, field: Tensor, tag: Tag, size: Sequence[int], shape: Sequence[int]) -> None:
    """A partner without labels where `field` has some."""
    varying = [d for d in wide(field) if d not in tag.free]
    full = [d for d in varying if size[d] == shape[d]]
    if not full:
        return
    if len(full) == len(varying):
        state.unify(field, torch.tensor(tag.base))
        return
    for d in full:  # constant along one of several dimensions: that one stays as long as it is
        state.unify(field, field.narrow(d, 0, 1))


def activation_with_slope(state: Labels, op: Op) -> list[Tag]:
    """prelu: x (N, C, *), slope (C,) or (1,)."""
    x, slope = op.args[:2]
    if not state.is_matrix(slope):
        return state.pin_all(op, f"{op.kind} ({op.where}) computes its slope")
    tag = state.of(x)
    if state.shape(slope)[0] == 1 or len(state.shape(x)) < 2:
        return [tag]
    channels, rest = state.along(tag, 1, state.shape(x)[1], op)
    state.unify(channels, state.factor(slope, 0))
    return [Tag((*rest, *field_along(channels, 1, len(state.shape(x)))))]


def gated(state: Labels, op: Op) -> list[Tag]:
    """glu: a * sigmoid(b) of the two halves of a dimension: their i-th indices go together."""
    x, dim = (*op.args, -1)[:2]
    ndim = len(state.shape(x))
    dim %= ndim
    labels, rest = state.along(state.of(x), dim, state.shape(x)[dim], op)
    halves = labels.view(2, -1)
    state.unify(halves[1], halves[0])
    return [Tag((*rest, *field_along(halves[0], dim, ndim)))]


def repeated_number(state: Labels, op: Op) -> list[Tag]:
    """zeros, ones, full ...: one number, as often as the code asks for."""
    return [Tag(free=frozenset(range(len(state.graph.values[name].shape)))) for name in op.outputs]


ELEMENTWISE = {
    **dict.fromkeys([
        "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "float_power",
        "maximum", "minimum", "fmax", "fmin", "atan2", "where", "masked_fill", "addcmul", "addcdiv", "lerp",
        "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor",
        "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__",
        "relu", "relu6", "hardtanh", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
        "hardsigmoid", "sigmoid", "log_sigmoid", "tanh", "softplus", "softshrink",
        "hardshrink", "threshold", "abs", "neg", "square", "sqrt", "rsqrt", "reciprocal", "exp", "exp2",
        "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "erf", "sign", "floor", "ceil", "round", "trunc",
        "clamp", "clamp_min", "clamp_max", "clip", "isnan", "isinf", "nan_to_num",
        "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
        "contiguous", "clone", "detach", "detach_copy", "alias", "to", "type_as", "_to_copy", "lift_fresh_copy",
        "lift_fresh", "positive", "fill",
    ], elementwise),
    "prelu": activation_with_slope,
    "glu": gated,
    **dict.fromkeys(["zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like",
                     "new_zeros", "new_ones", "new_full", "new_empty"], repeated_number),
}  # fmt: skip
