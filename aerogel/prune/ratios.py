"""Ratios that the user sets layer by layer: {pattern of names: share of the channels to remove}.

A pattern names layers by what they make: the channels that come out of `features.3`, not those that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from aerogel.errors import CutError, nearest
from aerogel.graph import Graph, Ref
from aerogel.prune.coupling import Coupling, Dim, Group


def names_of(target: str) -> set[str]:
    """A weight's name and those of the modules it stands in: a.b.weight -> {a.b.weight, a.b, a}."""
    parts = target.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Raises CutError unless every ratio is a share in [0, 1)."""
    if not isinstance(ratios, Mapping):
        raise CutError(f"cut: ratios must name shares to remove, as {{'features.3': 0.5}}, got {ratios!r}")
    for pattern, share in ratios.items():
        if not (isinstance(share, int | float) and 0 <= share < 1):
            raise CutError(f"cut: ratio of {pattern!r} must be a share to remove in [0, 1), got {share!r}")


def fixed_counts(coupling: Coupling, ratios: Mapping[str, float]) -> dict[str, int]:
    """{group: how many of its channels go}, never more than the share asked for, of the groups that a pattern names.

    Raises CutError for a pattern that names nothing, or nothing that can be cut, and for two that name one group.
    """
    check_ratios(ratios)
    reads = reads_of(coupling.graph)
    names = {group.name: _makers(group, reads) for group in coupling.groups}
    fixed: dict[str, tuple[str, int]] = {}
    for pattern, share in ratios.items():
        hit = [group for group in coupling.groups if matches(pattern, names[group.name])]
        if not hit:
            raise CutError(f"cut: ratios: {_why(coupling, pattern, reads)}")
        for group in hit:
            count = math.floor(share * len(group) + 1e-9)
            before, other = fixed.get(group.name, (pattern, count))
            if other != count:
                raise CutError(
                    f"cut: ratios: both {before!r} and {pattern!r} name the channels of {group.name}; "
                    "give them one ratio, or narrower patterns"
                )
            fixed[group.name] = pattern, count
    return {name: count for name, (_, count) in fixed.items()}


def _why(coupling: Coupling, pattern: str, reads: set[Dim]) -> str:
    """What is wrong with a pattern that names no group."""
    for frozen, reason in coupling.frozen.items():
        target, _, dim = frozen.partition(" dim ")
        if matches(pattern, names_of(target)) and (target, int(dim or 0)) not in reads:
            return f"{pattern!r} names no channels that can be cut: {frozen} stays whole ({reason})"
    known = set[str]().union(*(names_of(v.target) for v in coupling.graph.values.values() if v.is_weight))
    if matches(pattern, known):
        return f"{pattern!r} makes no channels that can be cut; name the layer that makes them"
    return f"{pattern!r} names no layer; {nearest(pattern, known)}"


def _makers(group: Group, reads: set[Dim]) -> set[str]:
    """The group's name, and those of the weights and modules whose outputs its channels are."""
    made = (member for member in group.members if (member.target, member.dim) not in reads)
    return {group.name}.union(*(names_of(member.target) for member in made))


def reads_of(graph: Graph) -> set[Dim]:
    """The dimensions of weights that run over what a layer reads."""
    found = set()
    for op in graph.ops:
        place = _INPUTS.get(op.kind)
        if place is not None:
            weight = op.args[place[0]]
            if isinstance(weight, Ref) and graph.values[weight.name].is_weight:
                found.add((graph.values[weight.name].target, place[1]))
    return found


_INPUTS = {  # op: (position of its weight, the dimension that runs over its inputs)
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "linear"], (1, 1)),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "mm", "matmul"], (1, 0)),
    "addmm": (2, 0),
}
