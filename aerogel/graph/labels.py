"""Index labels pushed through the graph: which index of which tensor must go when another one goes.

Every index of every weight dimension gets an integer label. The graph is run on labels instead of numbers:
- data movement (flatten, view, permute, cat, chunk ...) simply runs on the label tensor, so it is exact;
- compute unifies labels: a convolution's input channels with its weight's second dimension, a norm's
  parameters with its channels, both operands of an addition;
- what must stay rectangular is tied: a view that splits channels into (groups, c) ties the groups' c-th
  channels, equal chunks tie their i-th channels.
Label 0 marks an index that must stay (the network's input, constants). What an op without a rule touches, and
the network's outputs, are pinned with the reason: they stay whole.

A label tensor has its value's rank; a dimension along which nothing changes has size 1.
To teach a new op, add one row to RULES. A rule is `(state, op) -> label tensors of the outputs`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.graph.graph import Graph, Op, Ref, Value, fill

Rule = Callable[["Labels", Op], list[Tensor]]


class Labels:
    """What running the graph on labels found.

    dims:   (target, dimension) -> labels (size,) of every weight dimension that a rule gave a meaning
    values: activation name -> label tensor, broadcastable to the value's shape
    pairs:  labels that stand for one thing, as (2, k) tensors
    pins:   (labels, reason) of what must stay whole
    pinned: weight -> reason why all its dimensions stay whole
    count:  how many labels there are, 0 among them
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.dims: dict[tuple[str, int], Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.pairs: list[Tensor] = []
        self.pins: list[tuple[Tensor, str]] = []
        self.pinned: dict[str, str] = {}
        self.count = 1

    def of(self, ref: Ref) -> Tensor:
        """Labels of an activation or input; a weight has none of its own until a rule names a dimension."""
        known = self.values.get(ref.name)
        return _zeros(len(self.value(ref).shape)) if known is None else known

    def value(self, ref: Ref) -> Value:
        return self.graph.values[ref.name]

    def are_weights(self, *refs: Ref | None) -> bool:
        return all(ref is None or self.value(ref).is_weight for ref in refs)

    def dim(self, ref: Ref, d: int) -> Tensor:
        """The labels of dimension d of a weight, allotted on first use."""
        value = self.value(ref)
        key = (value.target, d)
        if key not in self.dims:
            self.dims[key] = self._fresh(value.shape[d])
            if value.kind == "constant":
                self.pin(self.dims[key], f"{value.target} is a constant, neither parameter nor buffer")
            elif value.target in self.pinned:
                self.pin(self.dims[key], self.pinned[value.target])
        return self.dims[key]

    def unify(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        differ = a != b
        if differ.any():
            self.pairs.append(torch.stack([a[differ], b[differ]]).unique(dim=1))

    def pin(self, labels: Tensor, reason: str) -> None:
        labels = labels[labels != 0].unique()
        if len(labels):
            self.pins.append((labels, reason))

    def pin_all(self, op: Op, reason: str) -> list[Tensor]:
        """Refuse rather than guess: all that the op reads stays whole, and so does what meets its outputs."""
        for name in op.inputs:
            self.pin(self.of(Ref(name)), reason)
            if self.graph.values[name].is_weight:
                self.pin_weight(self.graph.values[name].target, reason)
        ranks = [len(self.graph.values[name].shape) for name in op.outputs]
        return [self.fixed(n, reason) if op.inputs else _zeros(n) for n in ranks]

    def pin_weight(self, target: str, reason: str) -> None:
        """Every dimension of a weight stays, those already named and those named later."""
        self.pinned.setdefault(target, reason)
        for (name, _), labels in self.dims.items():
            if name == target:
                self.pin(labels, reason)

    def fixed(self, ndim: int, reason: str) -> Tensor:
        """One label in every place, pinned: whatever meets it stays, for this reason."""
        label = self._fresh(1)
        self.pin(label, reason)
        return label.view([1] * ndim)

    def only_along(self, labels: Tensor, dim: int, op: Op) -> Tensor:
        """The label vector along `dim`; where labels also change along another dimension they are pinned."""
        dim %= labels.ndim
        if any(size > 1 for d, size in enumerate(labels.shape) if d != dim):
            self.pin(labels, f"{op.kind} ({op.where}) mixes them along another dimension than {dim}")
            return labels.max().view(1)
        return labels.flatten()

    def full(self, ref: Ref) -> Tensor:
        return self.of(ref).expand(self.value(ref).shape)

    def _fresh(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)


def push_labels(graph: Graph) -> Labels:
    """Runs the graph on labels."""
    state = Labels(graph)
    for op in graph.ops:
        rule = RULES.get(op.kind)
        if rule is None:
            out = state.pin_all(op, f"op {op.kind} ({op.where}) is not understood")
        else:
            out = rule(state, op)
        state.values |= dict(zip(op.outputs, out, strict=True))
    for name in graph.outputs:
        state.pin(state.of(Ref(name)), "network output")
        if graph.values[name].is_weight:
            state.pin_weight(graph.values[name].target, "network output")
    return state


def collapse(labels: Tensor) -> Tensor:
    """Size 1 along every dimension in which the labels do not change; a copy, free of the large one."""
    for d, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(d, 0, 1)
            if labels.stride(d) == 0 or bool((labels == first).all()):
                labels = first
    return labels.clone()


def _zeros(ndim: int) -> Tensor:
    """Label 0 in every place."""
    return torch.zeros([1] * ndim, dtype=torch.long)


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """(n,) -> rank ndim with n at dim and 1 elsewhere."""
    return vector.view([-1 if d == dim % ndim else 1 for d in range(ndim)])


# ---------------------------------------------------------------- compute


def convolution(state: Labels, op: Op) -> list[Tensor]:
    """x (N, I, *), weight (O, I/g, *k) -> (N, O, *). Depthwise: input c feeds outputs c*m ... c*m+m-1.

    Otherwise grouped: the k-th channels of all groups are tied, so that groups keep equal counts.
    """
    x, weight, bias = op.args[:3]
    if not state.are_weights(weight, bias) or state.are_weights(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) convolves with a computed weight")
    ndim = len(state.value(x).shape)
    axis = 1 if ndim == len(state.value(weight).shape) else 0  # 0: no batch dimension
    channels = state.only_along(state.of(x), axis, op).expand(state.value(x).shape[axis])
    out, per_group = state.dim(weight, 0), state.value(weight).shape[1]
    groups = len(channels) // per_group
    if groups == 1:
        state.unify(channels, state.dim(weight, 1))
    elif per_group == 1:
        state.unify(out.view(groups, -1), channels.view(groups, 1))
    else:
        state.unify(channels.view(groups, per_group), state.dim(weight, 1))
        state.unify(out.view(groups, -1), out.view(groups, -1)[:1])
    if bias is not None:
        state.unify(state.dim(bias, 0), out)
    return [_along(out, axis, ndim)]


def linear(state: Labels, op: Op) -> list[Tensor]:
    """x (*, I), weight (O, I) -> (*, O)."""
    x, weight, bias = op.args[:3]
    if not state.are_weights(weight, bias) or state.are_weights(x):
        return state.pin_all(op, f"{op.kind} ({op.where}) multiplies by a computed weight")
    state.unify(state.only_along(state.of(x), -1, op), state.dim(weight, 1))
    out = state.dim(weight, 0)
    if bias is not None:
        state.unify(state.dim(bias, 0), out)
    return [_along(out, -1, len(state.value(x).shape))]


def batch_norm(state: Labels, op: Op) -> list[Tensor]:
    """x (N, C, *), weight, bias, running mean and variance (C,)."""
    x, *parameters = op.args[:5]
    if not state.are_weights(*parameters):
        return state.pin_all(op, f"{op.kind} ({op.where}) scales by a computed weight")
    labels = state.only_along(state.of(x), 1, op)
    for parameter in parameters:
        if parameter is not None:
            state.unify(labels, state.dim(parameter, 0))
    return [_along(labels, 1, len(state.value(x).shape))]


def elementwise(state: Labels, op: Op) -> list[Tensor]:
    """Operands of any number, broadcast together: what meets is one thing.

    An operand of size 1 where another one's labels change (a one-channel gate, a scalar) is no partner of any
    single index: it stays, and does not hold the others.
    """
    shape = state.graph.values[op.outputs[0]].shape
    operands = [arg for arg in op.args if isinstance(arg, Ref)]
    known = [_padded(state.of(ref), len(shape)) for ref in operands]
    varying = {d for labels in known for d in range(len(shape)) if labels.shape[d] > 1}
    partners = []
    for ref, labels in zip(operands, known, strict=True):
        size = [1] * (len(shape) - len(state.value(ref).shape)) + list(state.value(ref).shape)
        if state.are_weights(ref):
            labels = _parameter_labels(state, ref, size, varying)
        if any(size[d] == 1 < shape[d] for d in varying):
            state.pin(labels, f"{op.kind} ({op.where}) broadcasts it over channels")
        elif math.prod(size) > 1 or math.prod(shape) == 1:
            partners.append(labels)
    for labels in partners[1:]:
        state.unify(partners[0], labels)
    out = _zeros(len(shape))
    for labels in partners:  # the same things under several names: carry one that has a name at all
        out, labels = torch.broadcast_tensors(out, labels)
        out = torch.where(out == 0, labels, out)
    return [out]


def _parameter_labels(state: Labels, ref: Ref, size: Sequence[int], varying: set[int]) -> Tensor:
    """A bare parameter (a layer scale, a position table) is labelled along the dimension channels run on."""
    lead = len(size) - len(state.value(ref).shape)
    wide = [d for d in range(len(size)) if size[d] > 1]
    along = [d for d in wide if d in varying] if varying else wide
    if len(along) == 1:
        return _along(state.dim(ref, along[0] - lead), along[0], len(size))
    if not wide:  # a scalar
        return _zeros(len(size))
    reason = f"{state.value(ref).target} is used element by element, along no single dimension of channels"
    state.pin_weight(state.value(ref).target, reason)
    return state.fixed(len(size), reason)


def _padded(labels: Tensor, ndim: int) -> Tensor:
    return labels.view([1] * (ndim - labels.ndim) + list(labels.shape))


# ---------------------------------------------------------------- shape


def unchanged(state: Labels, op: Op) -> list[Tensor]:
    """Activations, dropout, casts: one input, the same shape out."""
    if len(op.inputs) != 1 or state.are_weights(op.args[0]):
        return state.pin_all(op, f"{op.kind} ({op.where}) reads a weight, or more than one tensor")
    return [state.of(op.args[0])]


def along_space(state: Labels, op: Op) -> list[Tensor]:
    """Pooling, padding, resizing: the dimensions they work along must not be the ones channels run on."""
    labels = state.of(op.args[0])
    if state.are_weights(op.args[0]) or any(labels.shape[d] > 1 for d in _worked_along(op)):
        return state.pin_all(op, f"{op.kind} ({op.where}) works along channels")
    return [labels for _ in op.outputs]


def _worked_along(op: Op) -> list[int]:
    """The last dimensions, as negative numbers: two for max_pool2d, those that a list of paddings changes."""
    if "pad" in op.kind:
        return [-1 - i // 2 for i, amount in enumerate(op.args[1]) if amount != 0]
    rank = re.search(r"(\d)d", op.kind)
    assert rank is not None, f"{op.kind} does not tell how many dimensions it works along"
    return [-1 - i for i in range(int(rank[1]))]


def reduction(state: Labels, op: Op) -> list[Tensor]:
    """mean, sum, amax ... over dimensions: exact where no channel runs along them."""
    x, dims, keep = (*op.args, None, False)[:3]
    labels = state.of(x)
    some = isinstance(dims, list) and len(dims) > 0  # no list at all: over everything
    over = {d % labels.ndim for d in dims} if some else set(range(labels.ndim))
    if state.are_weights(x) or any(labels.shape[d] > 1 for d in over):
        return state.pin_all(op, f"{op.kind} ({op.where}) takes a statistic over channels")
    if not (some and keep):
        labels = labels.reshape([size for d, size in enumerate(labels.shape) if d not in over])
    return [labels]


def movement(state: Labels, op: Op) -> list[Tensor]:
    """Runs the op itself on the labels, then ties what must stay rectangular."""
    if any(state.graph.values[name].is_weight for name in op.inputs):
        return state.pin_all(op, f"{op.kind} ({op.where}) re-arranges a weight")
    held = {name: state.full(Ref(name)) for name in op.inputs}
    out = op.fn(*fill(op.args, held))
    parts = [collapse(part) for part in (out if isinstance(out, list | tuple) else [out])]
    for part in parts:
        _tie_rectangle(state, part)
    return parts


def view(state: Labels, op: Op) -> list[Tensor]:
    """As any movement; but labels lie in memory in another order than the numbers did, so they are copied."""
    if not isinstance(op.args[1], list):
        return state.pin_all(op, f"{op.kind} ({op.where}) reads the memory as another type")
    return movement(state, replace(op, fn=torch.reshape))


def expand(state: Labels, op: Op) -> list[Tensor]:
    """As any movement; its third argument goes by keyword only, and concerns tracing alone."""
    return movement(state, replace(op, args=op.args[:2]))


def equal_parts(state: Labels, op: Op) -> list[Tensor]:
    """chunk, split: equal parts keep equal counts, so their i-th channels are tied; uneven ones stay whole."""
    before = state.of(op.args[0])
    parts = movement(state, op)
    shapes = {state.graph.values[name].shape for name in op.outputs}
    split_channels = any(
        before.shape[d] > 1 and size != before.shape[d] for shape in shapes for d, size in enumerate(shape)
    )
    if split_channels and len(shapes) > 1:
        return state.pin_all(op, f"{op.kind} ({op.where}) splits channels unevenly, by sizes that the code holds")
    if split_channels:
        for part in parts[1:]:
            state.unify(parts[0], part)
    return parts


def _tie_rectangle(state: Labels, labels: Tensor) -> None:
    """Labels that change along several dimensions, (groups, c) say: a cut must leave a full rectangle.

    The longest such dimension is cut; along the others the same positions are tied.
    """
    wide = [d for d, size in enumerate(labels.shape) if size > 1]
    if len(wide) > 1:
        longest = max(reversed(wide), key=lambda d: labels.shape[d])
        rows = labels.movedim(longest, -1).reshape(-1, labels.shape[longest])
        state.unify(rows, rows[:1])


RULES: dict[str, Rule] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], convolution),
    "linear": linear,
    "batch_norm": batch_norm,
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "minimum"], elementwise),
    **dict.fromkeys(["relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish",
                     "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "abs", "neg", "square",
                     "clamp", "clamp_min", "clamp_max"], unchanged),
    **dict.fromkeys(["dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias",
                     "to", "_to_copy"], unchanged),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
                     "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                     "adaptive_avg_pool3d", "adaptive_max_pool2d", "pad", "constant_pad_nd",
                     "upsample_nearest2d", "upsample_bilinear2d"], along_space),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], reduction),
    **dict.fromkeys(["flatten", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "expand_as",
                     "cat"], movement),
    "view": view,
    "expand": expand,
    **dict.fromkeys(["chunk", "split", "split_with_sizes"], equal_parts),
}  # fmt: skip
