"""Losses on relations between samples see the whole global batch, under several processes too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from aerogel.train.distributed import World


def gathered(x: Tensor, world: World) -> Tensor:
    """The rows of all ranks as in the whole batch, of which rank r has the rows r::ranks: (n of this rank, ...) -> (n
    of all, ...). Gradients flow to every rank.

    Every rank computes the same loss from them and the loop weighs it by the rank's rows, so that the sum over ranks
    is the one loss, and its gradient.
    """
    if world.ranks == 1:
        return x
    counts = torch.zeros(world.ranks, dtype=torch.int64, device=x.device)
    counts[world.rank] = len(x)
    dist.all_reduce(counts)
    keys = [rank + world.ranks * torch.arange(int(n), device=x.device) for rank, n in enumerate(counts)]
    places = torch.searchsorted(torch.cat(keys).sort().values, keys[world.rank])
    rows = x.new_zeros(int(counts.sum()), *x.shape[1:]).index_copy(0, places, x)
    if x.requires_grad:
        return all_reduce(rows)
    dist.all_reduce(rows)
    return rows
