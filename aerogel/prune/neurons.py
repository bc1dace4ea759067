"""Dead neurons: those that pruning left without a weight in, or without a weight out. Han, Pool, Tran, Dally 2015,
arXiv:1506.02626, section 3.5.

nothing out   no output depends on it: its weights in, its bias and its norm go too; the network computes the same
nothing in    it is a constant, f(bias). It loses its bias and its weights out; what they added is gone, and retraining
              makes up for it
One death brings others: repeated until nothing changes. The paper leaves this to weight decay during retraining, which
takes long; here it is done at once. A neuron is a coupled channel (aerogel.prune.coupling): of a residual stage it is
dead once every layer that reads it has no weight left for it. What passes a statistic over channels (a layer norm) is
left alone: others depend on it there.
Then `without_dead` takes them out of the network, which becomes smaller and is as fast as it is small; proven, as
every cut is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.graph import capture, tensor_names
from aerogel.prune.coupling import Coupling, Dim, Group, Member, couple
from aerogel.prune.cut import Cut, proven
from aerogel.prune.masks import Masks, prunable
from aerogel.prune.proof import named_weights
from aerogel.prune.ratios import reads_of


@torch.no_grad()
def bury(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    protect: Sequence[str] = (),
) -> tuple[Masks, int]:
    """Zeroes all weights of dead neurons, in place: the masks of what is left, and how many neurons are dead.

    args, kwargs: example inputs. protect: patterns of layers, as of `prunable`, that lose nothing by it.
    Raises CaptureError when the model cannot be read.
    """
    coupling = _judged(model, couple(capture(model, args, kwargs)), protect)
    weights, reads, names = named_weights(model), reads_of(coupling.graph), tensor_names(model)
    trained = {names[id(weight)] for weight in model.parameters()}  # running statistics stay
    while True:
        changed = False
        for group in coupling.groups:
            dead = np.flatnonzero(_dead(group, weights, reads, either=True))
            for member in group.members:
                changed |= member.target in trained and _zero(weights[member.target], member, dead)
        if not changed:
            break
    flags = dead_channels(coupling, weights)
    return Masks.of(model), int(flags.sum())


def without_dead(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    protect: Sequence[str] = (),
) -> Cut:
    """A smaller copy without the neurons that no output depends on; every layer keeps one. It computes the same.

    protect: layers that stay whole. Raises CaptureError when the model cannot be read, CutError when its cut cannot be
    proven.
    """
    weights = named_weights(model)

    def choose(coupling: Coupling) -> np.ndarray:
        return dead_channels(_judged(model, coupling, protect), weights)

    return proven(model, args, kwargs, (), choose)


def _judged(model: nn.Module, coupling: Coupling, protect: Sequence[str]) -> Coupling:
    """With the groups alone that may be buried: exact ones that no protected layer is part of."""
    whole = prunable(model).keys() - prunable(model, protect=protect).keys() if protect else set()
    groups = (g for g in coupling.groups if not g.inexact and not any(m.target in whole for m in g.members))
    return dataclasses.replace(coupling, groups=tuple(groups))


def dead_channels(coupling: Coupling, weights: Mapping[str, Tensor]) -> np.ndarray:
    """Flags (coupling.count,) of the channels that have no weight out; of a group that is dead as a whole one stays."""
    flags, reads = np.zeros(coupling.count, bool), reads_of(coupling.graph)
    for group in coupling.groups:
        dead = _dead(group, weights, reads, either=False)
        if dead.all():
            dead[0] = False
        flags[group.units[dead]] = True
    return flags


def _dead(group: Group, weights: Mapping[str, Tensor], reads: set[Dim], *, either: bool) -> np.ndarray:
    """(n,): no weight out, or (`either`) no weight in. What no layer reads, or makes, is not judged by it."""
    many = [member for member in group.members if weights[member.target].ndim > 1]
    out = [member for member in many if (member.target, member.dim) in reads]
    into = [member for member in many if (member.target, member.dim) not in reads]
    dead = np.zeros(len(group), bool)
    for members in (out, into) if either else (out,):
        if members:
            dead |= np.all([_empty(weights[member.target], member) for member in members], axis=0)
    return dead


def _empty(weight: Tensor, member: Member) -> np.ndarray:
    """(n,): all that a channel takes of this weight is zero."""
    others = [d for d in range(weight.ndim) if d != member.dim]
    empty = (weight == 0).all(dim=others[0]) if len(others) == 1 else (weight == 0).sum(others) == _size(weight, others)
    return empty.cpu().numpy()[member.index].all(1)


def _size(weight: Tensor, dims: list[int]) -> int:
    return int(np.prod([weight.shape[d] for d in dims]))


def _zero(weight: Tensor, member: Member, channels: np.ndarray) -> bool:
    """Whether anything was left to be set to zero."""
    index = torch.from_numpy(member.index[channels].ravel()).to(weight.device)
    if not weight.index_select(member.dim, index).any():
        return False
    weight.index_fill_(member.dim, index, 0.0)
    return True
