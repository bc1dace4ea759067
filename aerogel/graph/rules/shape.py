"""Rules of ops that move numbers and compute none: they run on the labels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.graph.graph import Op, Ref, fill, refs
from aerogel.graph.labels import Labels, Tag, collapse, field_along, padded, reshaped, wide
from aerogel.graph.rules.compute import tie_fused_attention


def view(state: Labels, op: Op) -> list[Tag]:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: the same numbers in another shape."""
    x = op.args[0]
    if op.kind == "view" and not isinstance(op.args[1], list):
        return state.pin_all(op, f"{op.kind} ({op.where}) reads the memory as another type")
    before, after = state.shape(x), state.graph.values[op.outputs[0]].shape
    if state.is_matrix(x) and _moves_ones_only(before, after):
        named = iter([state.factor(x, d) for d, n in enumerate(before) if n > 1])
        one = torch.zeros(1, dtype=torch.long)
        state.factors[op.outputs[0]] = [next(named) if n > 1 else one for n in after]
        return [Tag()]
    tag = state.of(x)
    fields = tuple(state.rectangle(reshaped(field, before, after)) for field in tag.fields)
    if not state.whole_heads:
        _one_number(state, op, fields)
    free = tag.free if _moves_ones_only(before, after) and len(before) == len(after) else frozenset[int]()
    return [Tag(fields, tag.base, free)]


def _one_number(state: Labels, op: Op, fields: Sequence[Tensor]) -> None:
    """Widths of heads for which one module's code has the same number are one width."""
    for field in fields:
        for d in wide(field):
            if isinstance(op.args[1], list) and len(op.args[1]) == field.ndim and op.args[1][d] == field.shape[d]:
                state.unify(field.flatten(), state.sizes.setdefault((op.module, field.shape[d]), field.flatten()))


def _moves_ones_only(before: Sequence[int], after: Sequence[int]) -> bool:
    return [n for n in before if n > 1] == [n for n in after if n > 1]


def permutation(state: Labels, op: Op) -> list[Tag]:
    """permute, transpose, t: dimensions change places."""
    x = op.args[0]
    ndim = len(state.shape(x))
    order = _order(op, ndim)
    if state.is_matrix(x):
        state.factors[op.outputs[0]] = [state.factor(x, d) for d in order]
        return [Tag()]
    tag = state.of(x)
    fields = tuple(field.permute(order) for field in tag.fields)
    return [Tag(fields, tag.base, frozenset(order.index(d) for d in tag.free))]


def _order(op: Op, ndim: int) -> list[int]:
    """Which dimension stands at each place afterwards; found by moving sizes that tell them apart."""
    marked = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    return [int(n) - 2 for n in op.fn(marked, *op.args[1:]).shape]


def expand(state: Labels, op: Op) -> list[Tag]:
    """Size 1 becomes as many as the code asks for."""
    x = op.args[0]
    before, after = state.shape(x), state.graph.values[op.outputs[0]].shape
    tag, lead = state.of(x), len(after) - len(before)
    grown = {d for d, n in enumerate(after) if n > 1 and (d < lead or before[d - lead] == 1)}
    fields = tuple(padded(field, len(after)) for field in tag.fields)
    return [Tag(fields, tag.base, frozenset(grown | {d + lead for d in tag.free}))]


def movement(state: Labels, op: Op) -> list[Tag]:
    """Any other re-arrangement of one tensor runs itself on the labels, written out in full."""
    x = op.args[0]
    if len(list(refs(op.args))) > 1:
        return state.pin_all(op, f"{op.kind} ({op.where}) is steered by computed numbers")
    tag = state.of(x)
    fields = []
    for field in tag.fields:
        schema = getattr(op.fn, "_schema", None)
        positional = [a for a in schema.arguments if not a.kwarg_only] if schema else op.args
        moved = op.fn(*fill(op.args[: len(positional)], {x.name: field.expand(state.shape(x))}))
        fields.append(state.rectangle(collapse(moved)))
    return [Tag(tuple(fields), tag.base)]


def cat(state: Labels, op: Op) -> list[Tag]:
    """Along the joined dimension the labels stand side by side; along the others they are one thing."""
    parts, dim = (*op.args, 0)[:2]
    parts = [ref for ref in parts if state.shape(ref) != (0,)]
    shape = state.graph.values[op.outputs[0]].shape
    ndim = len(shape)
    dim %= ndim
    elsewhere = {d for ref in parts if not state.is_matrix(ref) for f in state.of(ref).fields for d in wide(f)}
    tags = [state.of(ref, elsewhere) for ref in parts]
    joined, fields, across = [], [], []
    for ref, tag in zip(parts, tags, strict=True):
        one = state.shape(ref)[dim] == 1  # an index by itself has its label all the same
        own = [f for f in tag.fields if dim in wide(f) or (one and (not wide(f) or state.head_of is None))]
        across.append([f for f in tag.fields if all(f is not o for o in own)])
        sizes = [state.shape(ref)[d] if d == dim else 1 for d in range(ndim)]
        if len(own) > 1:
            return state.pin_all(op, f"{op.kind} ({op.where}) joins them along several dimensions")
        joined.append(own[0] if own else torch.full(sizes, tag.base))
    if any(bool((f != 0).any()) for f in joined):
        sizes = [max(f.shape[d] for f in joined) for d in range(ndim)]
        full = [f.expand([f.shape[d] if d == dim else n for d, n in enumerate(sizes)]) for f in joined]
        fields.append(state.rectangle(collapse(torch.cat(full, dim))))
    kinds = {tuple(wide(f)): f for fs in across for f in fs}
    for varying, first in kinds.items():
        for tag, fs in zip(tags, across, strict=True):
            same = [f for f in fs if tuple(wide(f)) == varying]
            if not same and not set(varying) <= tag.free:
                state.unify(first, torch.tensor(tag.base))
            for f in same:
                state.unify(first, f)
        fields.append(first)
    return [Tag(tuple(fields), max(tag.base for tag in tags))]


def stack(state: Labels, op: Op) -> list[Tag]:
    """A new dimension; along the others the operands' labels are one thing."""
    parts, dim = (*op.args, 0)[:2]
    ndim = len(state.graph.values[op.outputs[0]].shape)
    elsewhere = {d for ref in parts if not state.is_matrix(ref) for f in state.of(ref).fields for d in wide(f)}
    tags = [state.of(ref, elsewhere) for ref in parts]
    kinds = {tuple(wide(f)): f for tag in tags for f in tag.fields}
    for varying, first in kinds.items():
        for tag in tags:
            same = [f for f in tag.fields if tuple(wide(f)) == varying]
            if not same and not set(varying) <= tag.free:
                state.unify(first, torch.tensor(tag.base))
            for f in same:
                state.unify(first, f)
    return [Tag(tuple(f.unsqueeze(dim % ndim) for f in kinds.values()), max(tag.base for tag in tags))]


def parts(state: Labels, op: Op) -> list[Tag]:
    """chunk, split: equal parts keep equal counts, so their i-th channels are tied.

    Parts of sizes that the code holds go each by itself: whether the code follows them, the proof shows.
    """
    x = op.args[0]
    shapes = [state.graph.values[name].shape for name in op.outputs]
    dim = _split_dim(op, len(state.shape(x)))
    sizes = [shape[dim] for shape in shapes]
    if state.is_matrix(x) and sum(sizes) == state.shape(x)[dim]:
        tie_fused_attention(state, x)
        for name, piece in zip(op.outputs, state.factor(x, dim).split(sizes), strict=True):
            state.factors[name] = [piece if d == dim else state.factor(x, d) for d in range(len(shapes[0]))]
        return [Tag() for _ in sizes]
    tag = state.of(x)
    if any(dim in wide(f) for f in tag.fields) and (
        sum(sizes) != state.shape(x)[dim] or ("chunk" in op.kind and len(set(sizes)) > 1)
    ):
        return state.pin_all(op, f"{op.kind} ({op.where}) splits channels unevenly")
    out: list[list[Tensor]] = [[] for _ in sizes]
    for field in tag.fields:
        pieces = field.split(sizes, dim) if dim in wide(field) else [field] * len(sizes)
        if dim in wide(field) and len(set(sizes)) == 1:
            for piece in pieces[1:]:
                state.unify(pieces[0], piece)
        for fields, piece in zip(out, pieces, strict=True):
            fields.append(piece.clone())
    return [Tag(tuple(fields), tag.base) for fields in out]


def _split_dim(op: Op, ndim: int) -> int:
    dim = op.args[2] if len(op.args) > 2 else 0
    return int(dim) % ndim


def slices(state: Labels, op: Op) -> list[Tag]:
    """x[a:b:c] along one dimension.

    Pieces that divide it evenly (halves, every second one) are taken for parts that stay equal, as in `parts`.
    """
    x, dim, start, end, step = op.args[:5]
    shape = state.shape(x)
    dim = int(dim or 0) % len(shape)
    start, end, step = slice(start, end, step).indices(shape[dim])
    chosen = torch.arange(start, max(start, end), step)
    if state.is_matrix(x):
        factors = [state.factor(x, d) for d in range(len(shape))]
        factors[dim] = factors[dim][chosen]
        state.factors[op.outputs[0]] = factors
        return [Tag()]
    tag, count = state.of(x), len(chosen)
    fields = []
    for field in tag.fields:
        if dim in wide(field) and count < shape[dim]:
            if step > 1 and shape[dim] % step == 0:
                by_step = field.unflatten(dim, (-1, step))
                state.unify(by_step, by_step.narrow(dim + 1, 0, 1))
            elif step == 1 and count and shape[dim] % count == 0 and start % count == 0 and _alone(state, op, count):
                by_part = field.unflatten(dim, (-1, count))
                state.unify(by_part, by_part.narrow(dim, 0, 1))
            field = field.index_select(dim, chosen)
        if count:
            fields.append(field)
    return [Tag(tuple(fields), tag.base, tag.free)]


def _alone(state: Labels, op: Op, count: int) -> bool:
    """Whether no other slice of the same dimension takes another number of indices."""
    others = [state.graph.ops[i] for i in state.readers[op.args[0].name]]
    sizes = {
        state.graph.values[other.outputs[0]].shape[int(op.args[1])]
        for other in others
        if other.kind == "slice" and other.args[:2] == op.args[:2]
    }
    return sizes <= {count, state.shape(op.args[0])[int(op.args[1])]}


def selection(state: Labels, op: Op) -> list[Tag]:
    """select, unbind: one index, by its number."""
    x, dim = (*op.args, 0)[:2]
    ndim = len(state.shape(x))
    dim %= ndim
    if state.is_matrix(x):
        kept = [state.factor(x, d) for d in range(ndim) if d != dim]
        state.pin(state.factor(x, dim), f"{op.kind} ({op.where}) takes one of them by its number")
        state.factors |= dict.fromkeys(op.outputs, kept)
        return [Tag() for _ in op.outputs]
    tag = state.of(x)
    fields = []
    for field in tag.fields:
        if dim in wide(field):
            state.pin(field, f"{op.kind} ({op.where}) takes one of them by its number")
            field = field.narrow(dim, 0, 1)
        fields.append(field.squeeze(dim))
    free = frozenset(d - (d > dim) for d in tag.free if d != dim)
    return [Tag(tuple(f for f in fields if wide(f)), tag.base, free)] * len(op.outputs)


def looked_up(state: Labels, op: Op) -> list[Tag]:
    """x[i, j]: dimensions that are looked up by number stay, the others pass."""
    x, indices = op.args[:2]
    shape, out = state.shape(x), state.graph.values[op.outputs[0]].shape
    given = [d for d, ref in enumerate(indices) if ref is not None]
    for ref in refs(indices):
        state.pin_tag(state.of(ref), f"{op.kind} ({op.where}) takes them for numbers of an index")
    grown = max((len(state.shape(ref)) for ref in refs(indices)), default=0)
    if not given or given != list(range(given[0], given[-1] + 1)) or len(out) != len(shape) - len(given) + grown:
        return state.pin_all(op, f"{op.kind} ({op.where}) looks up several dimensions by number")
    reason = f"{op.kind} ({op.where}) looks them up by number"

    def moved(d: int) -> int:
        return d if d < given[0] else d - len(given) + grown

    if state.is_matrix(x):
        for d in given:
            state.pin(state.factor(x, d), reason)
        rest = [d for d in range(len(shape)) if d not in given and shape[d] > 1]
        if len(rest) != 1:
            return state.pin_all(op, reason) if rest else [Tag()]
        return [Tag(field_along(state.factor(x, rest[0]), moved(rest[0]), len(out)))]
    tag, fields = state.of(x), []
    for field in tag.fields:
        if set(given) & set(wide(field)):
            state.pin(field, reason)
        else:
            sizes = [1] * len(out)
            for d in wide(field):
                sizes[moved(d)] = field.shape[d]
            fields.append(field.reshape(sizes))
    return [Tag(tuple(fields), tag.base)]


def looked_up_along(state: Labels, op: Op) -> list[Tag]:
    """index_select: as above, along one dimension."""
    x, dim, index = op.args[:3]
    indices: list[Ref | None] = [None] * len(state.shape(x))
    indices[dim] = index
    return looked_up(state, replace(op, args=(x, indices)))


def along_space(state: Labels, op: Op) -> list[Tag]:
    """Pooling, padding, resizing: the dimensions they work along must not be the ones channels run on."""
    x, worked = op.args[0], _worked_along(op)
    tag = state.of(x)
    ndim = len(state.shape(x))
    if state.is_matrix(x) or any(d - ndim in worked for field in tag.fields for d in wide(field)):
        return state.pin_all(op, f"{op.kind} ({op.where}) works along channels")
    return [tag for _ in op.outputs]


def _worked_along(op: Op) -> list[int]:
    """The last dimensions, as negative numbers: two for max_pool2d."""
    rank = re.search(r"(\d)d", op.kind)
    assert rank is not None, f"{op.kind} does not tell how many dimensions it works along"
    return [-1 - i for i in range(int(rank[1]))]


def pad(state: Labels, op: Op) -> list[Tag]:
    """Zeros along channels stand beside them and stay; any other padding, or a cropping, must leave channels alone."""
    x, amounts = op.args[:2]
    mode = op.args[2] if op.kind == "pad" and len(op.args) > 2 else "constant"
    ndim = len(state.shape(x))
    changed = {ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    tag, fields = state.of(x), []
    for field in tag.fields:
        hit = changed & set(wide(field))
        if hit and (mode != "constant" or min(amounts) < 0 or len(wide(field)) > 1):
            return state.pin_all(op, f"{op.kind} ({op.where}) works along channels")
        for d in hit:
            before, after = amounts[2 * (ndim - 1 - d)], amounts[2 * (ndim - 1 - d) + 1]
            stays = state.fixed(f"{op.kind} ({op.where}) puts {before + after} constant channels there")
            sides = [torch.full([n if e == d else 1 for e in range(ndim)], stays) for n in (before, after)]
            field = torch.cat([sides[0], field, sides[1]], d)
        fields.append(field)
    return [Tag(tuple(fields), tag.base)]


def channel_shuffle(state: Labels, op: Op) -> list[Tag]:
    """(g, c) -> (c, g): the g groups' c-th channels are tied."""
    x, groups = op.args[:2]
    ndim = len(state.shape(x))
    axis = 1 if op.kind != "channel_shuffle" or ndim > 3 else ndim - 3
    channels, rest = state.along(state.of(x), axis, state.shape(x)[axis], op)
    grid = channels.view(groups, -1)
    state.unify(grid, grid[:1])
    return [Tag((*rest, *field_along(grid[0].repeat_interleave(groups), axis, ndim)))]


def pixel_shuffle(state: Labels, op: Op) -> list[Tag]:
    """(C r^2, H, W) -> (C, H r, W r): the r^2 channels of one pixel block go together."""
    x, r = op.args[:2]
    ndim = len(state.shape(x))
    channels, rest = state.along(state.of(x), ndim - 3, state.shape(x)[-3], op)
    grid = channels.view(-1, r * r)
    state.unify(grid, grid[:, :1])
    return [Tag((*_not_along_space(state, op, rest), *field_along(grid[:, 0].clone(), ndim - 3, ndim)))]


def pixel_unshuffle(state: Labels, op: Op) -> list[Tag]:
    """(C, H r, W r) -> (C r^2, H, W)."""
    x, r = op.args[:2]
    ndim = len(state.shape(x))
    channels, rest = state.along(state.of(x), ndim - 3, state.shape(x)[-3], op)
    return [Tag((*_not_along_space(state, op, rest), *field_along(channels.repeat_interleave(r * r), ndim - 3, ndim)))]


def patches(state: Labels, op: Op) -> list[Tag]:
    """im2col: (N, C, H, W), kernel -> (N, C k, L), a channel's k pixels side by side; col2im: the reverse."""
    x, kernel = op.args[0], math.prod(op.args[1 if op.kind == "im2col" else 2])
    shape = state.shape(x)
    axis = len(shape) - (3 if op.kind == "im2col" else 2)
    ndim = len(state.graph.values[op.outputs[0]].shape)
    channels, rest = state.along(state.of(x), axis, shape[axis], op)
    for field in rest:
        state.pin(field, f"{op.kind} ({op.where}) works along them")
    if op.kind == "im2col":
        return [Tag(field_along(channels.repeat_interleave(kernel), axis, ndim))]
    grid = channels.view(-1, kernel)
    state.unify(grid, grid[:, :1])
    return [Tag(field_along(grid[:, 0].clone(), axis, ndim))]


def _not_along_space(state: Labels, op: Op, fields: Sequence[Tensor]) -> list[Tensor]:
    for field in fields:
        if any(d >= field.ndim - 2 for d in wide(field)):
            state.pin(field, f"{op.kind} ({op.where}) works along them")
    return [field for field in fields if not any(d >= field.ndim - 2 for d in wide(field))]


SHAPE = {
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as",
                     "reshape_as", "_reshape_alias"], view),
    **dict.fromkeys(["permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT",
                     "adjoint"], permutation),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], expand),
    **dict.fromkeys(["flip", "roll", "repeat", "tile", "repeat_interleave", "rot90", "fliplr", "flipud"], movement),
    **dict.fromkeys(["cat", "concat", "concatenate"], cat),
    "stack": stack,
    **dict.fromkeys(["chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split"], parts),
    "slice": slices,
    **dict.fromkeys(["select", "unbind"], selection),
    "index": looked_up,
    "index_select": looked_up_along,
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
                     "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                     "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
                     "_adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
                     "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
                     "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"], along_space),
    **dict.fromkeys(["pad", "constant_pad_nd"], pad),
    **dict.fromkeys(["channel_shuffle", "native_channel_shuffle"], channel_shuffle),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(["im2col", "col2im"], patches),
}  # fmt: skip
