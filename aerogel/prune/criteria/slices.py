"""What the criteria share: a channel's slice of every weight in its group, and how slices become one score.

Letters: n channels of the group, m members, k indices that a channel takes of one member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Group, Member

Weights = Mapping[str, Tensor]
Criterion = Callable[[Group, Weights], Tensor]

BLOCK = 1 << 18  # numbers that stay in the processor's cache
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda pieces: pieces.sum(0),
    "max": lambda pieces: pieces.amax(0),
    "mean": lambda pieces: pieces.mean(0),
}


def reduced(pieces: Iterable[Tensor], how: str, group: Group) -> Tensor:
    """One score (n,) a channel of the scores (n,) of its slices; 0 where there is no slice to judge by."""
    check_reduce(how)
    pieces = list(pieces)
    return REDUCE[how](torch.stack(pieces)) if pieces else torch.zeros(len(group))


def check_reduce(how: str) -> None:
    """Raises CutError for an unknown reduction."""
    if how not in REDUCE:
        raise CutError(f"criterion: reduce {how!r} is unknown; {nearest(str(how), REDUCE)}")


def slice_sums(group: Group, weights: Weights, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """For each weight of two or more dimensions, the sum (n,) of `of` the weight over the channel's slice."""
    sums = []
    for member in group.members:
        weight = weights[member.target]
        if weight.ndim > 1:
            sums.append(by_channel(_sums(weight, member.dim, of), member))
    return sums


def _sums(weight: Tensor, dim: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum (size of dim,) of `of` the weight over all other dimensions, some rows at a time: no copy of it all."""
    others = [d for d in range(weight.ndim) if d != dim]
    rows = max(1, BLOCK * len(weight) // max(weight.numel(), 1))
    parts = [of(in_single(part)).sum(others) for part in weight.split(rows)]
    return torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0)


def slice_rows(group: Group, weights: Weights) -> list[Tensor]:
    """For each weight of two or more dimensions, the channels' slices as rows (n, k times the other dimensions)."""
    rows = []
    for member in group.members:
        weight = weights[member.target]
        if weight.ndim > 1:
            by_index = in_single(weight).transpose(0, member.dim).flatten(1)
            rows.append(by_index[index_of(member, by_index)].flatten(1))
    return rows


def by_channel(by_index: Tensor, member: Member) -> Tensor:
    """(size of the dimension, ...) -> (n, ...): a channel's sum over the indices it takes there."""
    return by_index[index_of(member, by_index)].sum(1)


def index_of(member: Member, like: Tensor) -> Tensor:
    return torch.from_numpy(member.index).to(like.device)


def in_single(weight: Tensor) -> Tensor:
    """Half precision would overflow in a sum of squares; double stays."""
    return weight if weight.dtype == torch.float64 else weight.float()
