"""Rules of norms and statistics. Over one channel they are exact; over several, a cut changes them: marked."""

from __future__ import annotations

from torch import Tensor

from aerogel.graph.graph import Op, Ref, refs
from aerogel.graph.labels import Labels, Tag, field_along, wide
from aerogel.graph.rules.elementwise import elementwise


def channel_norm(state: Labels, op: Op) -> list[Tag]:
    """batch_norm, instance_norm: x (N, C, *); weight, bias, running mean and variance (C,)."""
    x, *parameters = op.args[:5]
    if not state.is_matrix(*parameters) or state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) scales by a computed weight")
    ndim = len(state.shape(x))
    channels, rest = state.along(state.of(x), 1, state.shape(x)[1], op)
    for parameter in parameters:
        if parameter is not None:
            state.unify(channels, state.factor(parameter, 0))
    return [Tag((*rest, *field_along(channels, 1, ndim)))] * len(op.outputs)


def group_norm(state: Labels, op: Op) -> list[Tag]:
    """x (N, C, *), groups, weight and bias (C,): the channels of one group go together, all of them. One group over all
    channels is a statistic over them."""
    x, groups, *parameters = op.args[:4]
    if not state.is_matrix(*parameters) or state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) scales by a computed weight")
    ndim, size = len(state.shape(x)), state.shape(x)[1]
    channels, rest = state.along(state.of(x), 1, size, op)
    if groups == 1:
        state.mark(channels, _statistic(op))
    else:
        state.unify(channels.view(groups, -1), channels.view(groups, -1)[:, :1])
    for parameter in parameters:
        if parameter is not None:
            state.unify(channels, state.factor(parameter, 0))
    return [Tag((*rest, *field_along(channels, 1, ndim)))]


def layer_norm(state: Labels, op: Op) -> list[Tag]:
    """layer_norm, rms_norm: x (*, *normalized), weight and bias (*normalized)."""
    x, normalized, *parameters = op.args[:4]
    weights = [ref for ref in parameters if isinstance(ref, Ref)]
    if not state.is_matrix(*weights) or state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) scales by a computed weight")
    tag, shape = state.of(x), state.shape(x)
    first = len(shape) - len(normalized)
    fields = [field for field in tag.fields if not any(d >= first for d in wide(field))]
    for d in range(first, len(shape)):
        if shape[d] == 1:
            continue
        labels, _ = state.along(Tag(tuple(f for f in tag.fields if d in wide(f)), tag.base), d, shape[d], op)
        state.mark(labels, _statistic(op))
        for ref in weights:
            state.unify(labels, state.factor(ref, d - first))
        fields += field_along(labels, d, len(shape))
    return [Tag(tuple(fields), tag.base)]


def reduction(state: Labels, op: Op) -> list[Tag]:
    """mean, var, amax ... over dimensions: exact where no channel runs along them. A sum, or a norm, over channels that
    are zero loses nothing: whether they are, the proof shows."""
    x = op.args[0]
    dims, keep = _reduced(op)
    tag, ndim = state.of(x), len(state.shape(x))
    over = {d % ndim for d in dims} if dims else set(range(ndim))
    fields = []
    for field in tag.fields:
        if not over & set(wide(field)):
            fields.append(field)
        elif op.kind not in _SUMS:
            state.mark(field, _statistic(op))
    if not (keep and dims):
        fields = [f.reshape([n for d, n in enumerate(f.shape) if d not in over]) for f in fields]
    return [Tag(tuple(fields), tag.base)] * len(op.outputs)


def _reduced(op: Op) -> tuple[list[int], bool]:
    """(dimensions, whether they are kept with size 1); no dimensions: over everything."""
    names = [a.name for a in op.fn._schema.arguments] if hasattr(op.fn, "_schema") else []
    given = dict(zip(names, op.args, strict=False))
    dims = given.get("dim", given.get("axis"))
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    return dims, bool(given.get("keepdim", False))


def softmax(state: Labels, op: Op) -> list[Tag]:
    """softmax, log_softmax, normalisation to one along a dimension."""
    x, dim = op.args[:2]
    tag, ndim = state.of(x), len(state.shape(x))
    for field in tag.fields:
        if dim % ndim in wide(field):
            state.mark(field, _statistic(op))
    return [tag]


def picks(state: Labels, op: Op) -> list[Tag]:
    """argmax, topk, sort, cumsum ...: along channels they give numbers of channels, or depend on their order."""
    x = op.args[0]
    if op.kind in ("max", "min") and len(list(refs(op.args))) > 1:
        return elementwise(state, op)
    dims, _ = _reduced(op)
    if state.is_matrix(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) orders the numbers of a weight")
    tag, ndim = state.of(x), len(state.shape(x))
    over = {d % ndim for d in dims} if dims else set(range(ndim))
    if any(over & set(wide(field)) for field in tag.fields):
        return state.pin_all(op, f"{op.kind} ({op.where}) orders or numbers channels")
    out = []
    for name in op.outputs:
        fields: list[Tensor] = list(tag.fields)
        if len(state.graph.values[name].shape) < ndim:
            fields = [f.reshape([n for d, n in enumerate(f.shape) if d not in over]) for f in fields]
        out.append(Tag(tuple(fields), tag.base))
    return out


def _statistic(op: Op) -> str:
    return f"{op.kind} ({op.where}) takes a statistic over channels"


_SUMS = {"sum", "norm", "linalg_vector_norm", "count_nonzero", "any"}
NORMS = {
    **dict.fromkeys(["batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"],
                    channel_norm),
    "group_norm": group_norm,
    **dict.fromkeys(["layer_norm", "rms_norm"], layer_norm),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "norm",
                     "linalg_vector_norm", "any", "all", "count_nonzero"], reduction),
    **dict.fromkeys(["softmax", "log_softmax", "_softmax", "_log_softmax"], softmax),
    **dict.fromkeys(["argmax", "argmin", "topk", "sort", "argsort", "cumsum", "cumprod", "max", "min", "median"],
                    picks),
}  # fmt: skip
