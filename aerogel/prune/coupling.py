"""Channel coupling: the sets of weight indices that must be cut together, single channel by single channel.

The labels of `aerogel.graph.labels` are joined by connected components: one component is one coupled channel.
Components that reach the same dimensions with the same counts form a Group (the channels of a residual stage,
the units of a hidden layer): what is ranked together and never cut to nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from aerogel.graph import Graph
from aerogel.graph.labels import Labels, along_dim
from aerogel.graph.rules import push_labels

Dim = tuple[str, int]  # (fully-qualified weight name, dimension)
_ONE = "all of it is one coupled channel"


@dataclass(frozen=True)
class Member:
    """One dimension that a group's channels run on. index (n, k): the k indices that channel i takes there."""

    target: str
    dim: int
    index: np.ndarray


@dataclass(frozen=True)
class Group:
    """Channels that are alike: `units` (n,) are their component numbers, `members` what each one takes.

    inexact: why a cut of them changes what is left, "" where it does not.
    """

    name: str
    units: np.ndarray
    members: tuple[Member, ...]
    inexact: str = ""

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True)
class Coupling:
    """dims: the component of every index of every weight dimension that a rule named; -1 where it stays.

    values: the same for activations: arrays broadcastable to their shapes, an element goes when it goes in one of
    them. groups: what can be cut.
    frozen: {dimension, weight or group: the reason why it stays whole}. count: components, cuttable or not.
    """

    graph: Graph
    dims: dict[Dim, np.ndarray]
    values: dict[str, tuple[np.ndarray, ...]]
    groups: tuple[Group, ...]
    frozen: dict[str, str]
    count: int

    def kept(self, removed: np.ndarray) -> dict[str, tuple[np.ndarray | None, ...]]:
        """{weight: kept indices by dimension, None for one left whole}, of the weights that a cut touches.

        removed (count,) flags the components that go.
        """
        kept: dict[str, list[np.ndarray | None]] = {}
        for (target, dim), components in self.dims.items():
            gone = _flag(removed, components)
            if gone.any():
                rank = len(self._shape_of[target])
                kept.setdefault(target, [None] * rank)[dim] = np.flatnonzero(~gone)
        return {target: tuple(dims) for target, dims in kept.items()}

    def resized(self, removed: np.ndarray) -> Graph:
        """The graph as it would be after that cut; no capture, no copying of weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        for target, dims in self.kept(removed).items():
            shape = tuple(n if k is None else len(k) for n, k in zip(self._shape_of[target], dims, strict=True))
            shapes |= dict.fromkeys(self._values_of[target], shape)
        for name, fields in self._wide_values:
            sizes = list(self.graph.values[name].shape)
            for components in fields:
                alive = ~_flag(removed, components)
                for d, size in enumerate(components.shape):
                    if size > 1:
                        others = tuple(i for i in range(alive.ndim) if i != d)
                        sizes[d] = int(alive.any(axis=others).sum())
            shapes[name] = tuple(sizes)
        return self.graph.with_shapes(shapes)

    @cached_property
    def _values_of(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for value in self.graph.values.values():
            if value.is_weight:
                names.setdefault(value.target, []).append(value.name)
        return names

    @cached_property
    def _shape_of(self) -> dict[str, tuple[int, ...]]:
        return {target: self.graph.values[names[0]].shape for target, names in self._values_of.items()}

    @cached_property
    def _wide_values(self) -> list[tuple[str, list[np.ndarray]]]:
        """Activations that any cut can change."""
        found = {n: [c for c in fields if c.size > 1 and (c >= 0).any()] for n, fields in self.values.items()}
        return [(name, fields) for name, fields in found.items() if fields]


def couple(graph: Graph, *, whole_heads: bool = True) -> Coupling:
    """Finds every coupled channel of a captured network.

    whole_heads: of attention heads can be cut, else the width of the heads.
    """
    state = push_labels(graph, whole_heads=whole_heads)
    _settle_grids(state)
    component, reasons = _join(state)
    marks = {int(c): why for labels, why in reversed(state.marks) for c in np.unique(component[labels.numpy()])}
    whole = {key: component[labels.numpy()] for key, labels in state.dims.items()}
    loose = np.ones(component.max() + 1, dtype=bool)
    loose[list(reasons)] = False
    dims = {key: np.where(loose[c], c, -1) for key, c in whole.items()}
    of_values = {n: [component[f.numpy()] for f in _fields(state, n)] for n in (*state.tags, *state.factors)}
    values = {n: tuple(np.where(loose[c], c, -1) for c in fields) for n, fields in of_values.items()}
    groups = _groups(dims, marks)
    frozen = {}
    for (target, dim), c in dims.items():
        stay = np.flatnonzero(c < 0)
        if len(stay):
            reason = reasons[int(whole[target, dim][stay[0]])]
            frozen[f"{target} dim {dim}"] = reason if len(stay) == len(c) else f"{len(stay)} of {len(c)}: {reason}"
    named = {target for target, _ in dims}
    frozen |= {target: reason for target, reason in state.pinned.items() if target not in named}
    for group in groups:
        if len(group) == 1:
            if not any(group.name == member.target for member in group.members):
                frozen[group.name] = _ONE
            for member in group.members:
                frozen.setdefault(f"{member.target} dim {member.dim}", _ONE)
    frozen |= dict.fromkeys(graph.unreached, "no op of the example run reads it")
    read = {name for op in graph.ops for name in op.inputs}
    frozen |= {name: "an input that nothing reads" for name in graph.inputs if name not in read}
    return Coupling(graph, dims, values, tuple(g for g in groups if len(g) > 1), frozen, len(loose))


def _fields(state: Labels, name: str) -> list[Tensor]:
    """Of a value's labels, those of weights re-arranged among them."""
    if name in state.factors:
        labels = state.factors[name]
        return [along_dim(vector, d, len(labels)) for d, vector in enumerate(labels) if len(vector) > 1]
    return list(state.tags[name].fields)


def _settle_grids(state: Labels) -> None:
    """A weight used element by element: where its elements are alike along all dimensions but one, it is that one that
    channels run on. Where they differ along several it stays."""
    component = _join(state)[0] if state.grids else np.zeros(0, int)
    for elements, dims in state.grids:
        found = component[elements.numpy()]
        along = [d for d in range(found.ndim) if (found != found.take([0], axis=d)).any()]
        if len(along) == 1:
            first = elements
            for d in range(found.ndim):
                if d != along[0]:
                    first = first.narrow(d, 0, 1)
            state.unify(dims[along[0]], first.flatten())
            rest = [labels for d, labels in enumerate(dims) if d != along[0] and len(labels) > 1]
        else:
            if along:
                state.unify(elements, elements.new_zeros(1))
            rest = dims
        for labels in rest:
            state.pin(labels, "used element by element, along no dimension of channels")


def _join(state: Labels) -> tuple[np.ndarray, dict[int, str]]:
    """(component of every label, {component that must stay: reason})."""
    pairs = np.concatenate([np.zeros((2, 0), int), *(p.numpy() for p in state.pairs)], axis=1)
    shape = (state.count, state.count)
    matrix = coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=shape)
    component = connected_components(matrix, directed=False)[1]
    reasons = {int(component[0]): "tied to the network's input or to a constant"}
    for labels, reason in state.pins:
        for c in np.unique(component[labels.numpy()]):
            reasons.setdefault(int(c), reason)
    return component, reasons


def _groups(dims: dict[Dim, np.ndarray], marks: dict[int, str]) -> tuple[Group, ...]:
    """Components sorted into groups by where they reach: {(target, dim): how many indices}."""
    keys = list(dims)
    component = np.concatenate([np.zeros(0, int), *dims.values()])
    key = np.concatenate([np.zeros(0, int), *(np.full(len(c), i) for i, c in enumerate(dims.values()))])
    index = np.concatenate([np.zeros(0, int), *(np.arange(len(c)) for c in dims.values())])
    loose = component >= 0
    component, key, index = component[loose], key[loose], index[loose]
    order = np.lexsort((index, key, component))
    component, key, index = component[order], key[order], index[order]
    starts = np.flatnonzero(np.diff(component, prepend=-1)).tolist()
    alike: dict[tuple[bytes, str], list[tuple[int, int]]] = {}  # signature -> [(start, stop)] of components
    for start, stop in itertools.pairwise([*starts, len(component)]):
        why = marks.get(int(component[start]), "")
        alike.setdefault((key[start:stop].tobytes(), why), []).append((start, stop))
    groups: dict[str, Group] = {}
    for (_, why), spans in alike.items():
        rows = np.stack([index[a:b] for a, b in spans])  # (n, indices a channel)
        row_keys = key[spans[0][0] : spans[0][1]]
        members = tuple(Member(keys[k][0], keys[k][1], rows[:, row_keys == k]) for k in np.unique(row_keys).tolist())
        units = component[[a for a, _ in spans]]
        name = _unused(_producer(members), groups)
        groups[name] = Group(name, units, members, why)
    return tuple(groups.values())


def _producer(members: tuple[Member, ...]) -> str:
    """The layer that makes these channels: the first whose output dimension is a member."""
    producer = next((m for m in members if m.dim == 0 and m.target.endswith("weight")), members[0])
    return producer.target.removesuffix(".weight")


def _unused(name: str, names: Container[str]) -> str:
    """The name, numbered where a layer makes channels of several groups."""
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in names)


def _flag(removed: np.ndarray, components: np.ndarray) -> np.ndarray:
    """removed[component], and False where the component is -1."""
    return removed[components] & (components >= 0)
