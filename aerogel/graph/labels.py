"""Index labels pushed through the graph: which index of which tensor must go when another one goes.

Every index of every weight dimension has an integer label. The graph is run on labels instead of numbers:
- data movement (flatten, view, permute, cat, chunk ...) runs on the labels, so it is exact;
- compute unifies labels: a convolution's input channels with its weight's second dimension, a norm's
  parameters with its channels, both operands of an addition, the index that a product sums over;
- what must stay rectangular is tied: a view that splits channels into (groups, c) ties the groups' c-th
  channels, one that splits them into heads ties a head's channels, equal chunks tie their i-th channels.
Label 0 marks an index that must stay (the network's input, constants). What an op without a rule touches, and
the network's outputs, are pinned with the reason: they stay whole. What a statistic couples (a layer norm over
channels) is marked: a cut there changes what is left.

What a value's indices are called is its `Tag`. A tag's field is a label tensor of the value's rank, of size 1
along every dimension in which its labels do not change; the value's element exists while its labels in all of the
fields do. Most values have one field, along their channels; after a product over tokens there are two.

To teach a new op, add one row to a table in `aerogel.graph.rules`: a rule is `(state, op) -> tags of the outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.graph.graph import Graph, Op, Ref, Value

MANY = 1 << 14
ELEMENTS = 1 << 22  # a weight used element by element is followed up to this size


class Tag(NamedTuple):
    """fields: see above. base: the label of every index that no field names. free: dimensions along which one number
    is repeated as often as the code asks for, so that their size follows whatever they meet."""

    fields: tuple[Tensor, ...] = ()
    base: int = 0
    free: frozenset[int] = frozenset()


Rule = Callable[["Labels", Op], list[Tag]]


class Labels:
    """What running the graph on labels found.

    dims:    (target, dimension) -> labels (size,) of every weight dimension that a rule gave a meaning
    tags:    activation name -> Tag
    factors: activation name -> labels of each dimension, where it is a weight re-arranged or re-scaled
    pairs:   labels that stand for one thing, as (2, k) tensors
    pins:    (labels, reason) of what must stay whole
    marks:   (labels, reason) of what can only be cut inexactly
    pinned:  weight -> reason why all its dimensions stay whole
    grids:   (one label an element of a weight, the labels of its dimensions)
    sizes:   (module, number that its code holds) -> labels of the dimension that is as long, of widths of heads
    heads:   (labels, head) as (2, k) tensors: channels that products take head by head
    count:   how many labels there are, 0 among them
    """

    def __init__(self, graph: Graph, head_of: Tensor | None = None, *, whole_heads: bool = True) -> None:
        """head_of: from label to head, as an earlier run found them; None: this is that run."""
        self.graph = graph
        self.head_of, self.whole_heads = head_of, whole_heads
        self.dims: dict[tuple[str, int], Tensor] = {}
        self.tags: dict[str, Tag] = {}
        self.factors: dict[str, list[Tensor]] = {}
        self.pairs: list[Tensor] = []
        self.pins: list[tuple[Tensor, str]] = []
        self.marks: list[tuple[Tensor, str]] = []
        self.pinned: dict[str, str] = {}
        self.grids: list[tuple[Tensor, list[Tensor]]] = []
        self.sizes: dict[tuple[str, int], Tensor] = {}
        self.heads: list[Tensor] = []
        self._starts: dict[tuple[str, int], int] = {}  # numbered beforehand: the same in every run
        self.readers = graph.readers()
        self.count = 1
        for value in graph.values.values():
            if value.is_weight and (value.target, 0) not in self._starts:
                for d, size in enumerate(value.shape):
                    self._starts[value.target, d] = self.count
                    self.count += size

    # ------------------------------------------------------------ reading

    def value(self, ref: Ref) -> Value:
        return self.graph.values[ref.name]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.graph.values[ref.name].shape

    def is_matrix(self, *refs: Ref | None) -> bool:
        """Whether each is a weight, maybe re-arranged, whose dimensions can be named one by one.

        Whole numbers are no weights: they are looked up, compared with, counted.
        """
        return all(ref is None or self._is_matrix(self.value(ref)) for ref in refs)

    def _is_matrix(self, value: Value) -> bool:
        real = value.dtype.is_floating_point or value.dtype.is_complex
        return real and (value.is_weight or value.name in self.factors)

    def of(self, ref: Ref, along: Iterable[int] = ()) -> Tag:
        """The tag of a value; for a weight, `along` are the dimensions on which channels may run there."""
        if not self.is_matrix(ref):
            return self.tags.get(ref.name, Tag())
        value = self.value(ref)
        wide = [d for d, size in enumerate(value.shape) if size > 1]
        named = [d for d in wide if d in along] or wide
        if not wide:
            return Tag()
        if len(named) == 1:
            for d in wide:
                if d != named[0]:
                    self.pin(self.factor(ref, d), f"{value.target or ref.name} runs along no channels there")
            return Tag((along_dim(self.factor(ref, named[0]), named[0], len(value.shape)),))
        if value.numel > ELEMENTS:
            return Tag(base=self.fixed(self.pin_matrix(ref, f"{value.target or ref.name} is used element by element")))
        labels = self.fresh(value.numel).view(value.shape)
        self.grids.append((labels, [self.factor(ref, d) for d in range(labels.ndim)]))
        return Tag((labels,))

    def factor(self, ref: Ref, d: int) -> Tensor:
        """The labels of dimension d of a weight, maybe re-arranged."""
        if ref.name in self.factors:
            return self.factors[ref.name][d]
        value = self.value(ref)
        key = (value.target, d)
        if key not in self.dims:
            start = self._starts[key]
            self.dims[key] = torch.arange(start, start + value.shape[d])
            if value.kind == "constant":
                self.pin(self.dims[key], f"{value.target} is a constant, neither parameter nor buffer")
            elif value.target in self.pinned:
                self.pin(self.dims[key], self.pinned[value.target])
        return self.dims[key]

    # ------------------------------------------------------------ joining

    def unify(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        differ = a != b
        if differ.any():
            one, other = a[differ], b[differ]
            if len(one) > MANY:  # an activation's labels repeat a channel's for every pixel
                both = ((one << 32) + other).unique()
                one, other = both >> 32, both & 0xFFFFFFFF
            self.pairs.append(torch.stack([one, other]))

    def pin(self, labels: Tensor, reason: str) -> None:
        labels = labels[labels != 0].unique()
        if len(labels):
            self.pins.append((labels, reason))

    def mark(self, labels: Tensor, reason: str) -> None:
        """A cut of these labels is not exact."""
        self.marks.append((labels[labels != 0].unique(), reason))

    def pin_tag(self, tag: Tag, reason: str) -> None:
        for field in tag.fields:
            self.pin(field, reason)

    def pin_all(self, op: Op, reason: str) -> list[Tag]:
        """Refuse rather than guess: all that the op reads stays whole, and so does what meets its outputs."""
        held = False
        for name in op.inputs:
            ref = Ref(name)
            if self.is_matrix(ref):
                self.pin_matrix(ref, reason)
                held = True
            else:
                tag = self.of(ref)
                self.pin_tag(tag, reason)
                held = held or bool(tag.fields) or tag.base != 0
        base = self.fixed(reason) if held else 0
        return [Tag(base=base) for _ in op.outputs]

    def pin_matrix(self, ref: Ref, reason: str) -> str:
        """Every dimension of a weight stays; the reason."""
        if ref.name in self.factors:
            for labels in self.factors[ref.name]:
                self.pin(labels, reason)
        else:
            self.pin_weight(self.value(ref).target, reason)
        return reason

    def pin_weight(self, target: str, reason: str) -> None:
        """Every dimension of a weight stays, those already named and those named later."""
        self.pinned.setdefault(target, reason)
        d = 0
        while (target, d) in self._starts:
            if (target, d) in self.dims:
                self.pin(self.dims[target, d], reason)
            d += 1

    def fixed(self, reason: str) -> int:
        """A pinned label: whatever meets it stays, for this reason."""
        label = self.fresh(1)
        self.pin(label, reason)
        return int(label)

    def fresh(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    # ------------------------------------------------------------ what rules share

    def along(self, tag: Tag, dim: int, size: int, op: Op) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(labels (size,) of one dimension, the fields that do not touch it).

        Fields that change along it and along others too are pinned.
        """
        vector, rest = None, []
        for field in tag.fields:
            varying = wide(field)
            if varying == [dim]:
                if vector is not None:
                    self.unify(vector, field.flatten())
                vector = field.flatten()
            elif dim in varying:
                self.pin(field, f"{op.kind} ({op.where}) mixes them along another dimension than {dim}")
                vector = field.new_full((size,), int(field.max()))
            else:
                rest.append(field)
        if vector is None:
            vector = torch.full((size,), tag.base)
        return vector, tuple(rest)

    def rectangle(self, field: Tensor) -> Tensor:
        """The field along one dimension, the same positions along the others tied: a cut must leave a full rectangle.

        Of labels that change along several dimensions, (groups, c) say, the longest is cut, of heads the heads.
        """
        varying = wide(field)
        if len(varying) < 2 or self.head_of is None:
            return field
        keep = max(reversed(varying), key=lambda d: field.shape[d])
        if len(self.head_of):
            known = self.head_of[field.clamp_max(len(self.head_of) - 1)].where(field < len(self.head_of), -1)
            if (known >= 0).any():
                by_head = [d for d in varying if bool((known.narrow(d, 0, 1) != known).any())]
                others = [d for d in varying if d not in by_head]
                if self.whole_heads and by_head:
                    keep = max(by_head, key=lambda d: field.shape[d])
                elif others:
                    keep = max(reversed(others), key=lambda d: field.shape[d])
        first = field
        for d in varying:
            if d != keep:
                first = first.narrow(d, 0, 1)
        self.unify(field, first)
        return first.clone()


def wide(field: Tensor) -> list[int]:
    """The dimensions along which its labels change."""
    return [d for d, size in enumerate(field.shape) if size > 1]


def collapse(labels: Tensor) -> Tensor:
    """Size 1 along every dimension in which the labels do not change; a copy, free of the large one."""
    for d, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(d, 0, 1)
            if labels.stride(d) == 0 or bool((labels == first).all()):
                labels = first
    return labels.clone()


def along_dim(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """(n,) -> rank ndim with n at dim and 1 elsewhere."""
    return vector.view([-1 if d == dim % ndim else 1 for d in range(ndim)])


def field_along(vector: Tensor, dim: int, ndim: int) -> tuple[Tensor, ...]:
    """A field of these labels; none where all of them are 0, which says nothing."""
    return (along_dim(vector, dim, ndim),) if bool((vector != 0).any()) else ()


def padded(labels: Tensor, ndim: int) -> Tensor:
    return labels.view([1] * (ndim - labels.ndim) + list(labels.shape))


def reshaped(field: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """A field of a value of shape `before` seen in shape `after`. Only the dimensions that hold its labels are written
    out, not the whole tensor."""
    pieces = _blocks(before, after)
    sizes, shown = list(field.shape), [1] * len(after)
    for ins, outs in pieces:
        if any(sizes[d] > 1 for d in ins):
            for d in ins:
                sizes[d] = before[d]
            for d in outs:
                shown[d] = after[d]
    return collapse(field.expand(sizes).reshape(shown))


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The shortest runs of dimensions that hold the same elements in both shapes."""
    if 0 in before:
        return [(range(len(before)), range(len(after)))]
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start_i, start_j, a, b = i, j, 1, 1
        while True:
            if i < len(before) and (a <= b or j == len(after)):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            if a == b and (i > start_i or j > start_j):
                break
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks
