"""Losses on relations between samples see the whole global batch, under several processes too."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from aerogel.train.distributed import World


def gathered(x: Tensor, world: World) -> Tensor:
    """The rows of all ranks, in their order: (n of this rank, ...) -> (n of all, ...). Gradients flow to every rank.

    Every rank computes the same loss from them and the loop weighs it by the rank's rows, so that the sum over ranks
    is the one loss, and its gradient.
    """
    if world.ranks == 1:
        return x
    counts = torch.zeros(world.ranks, dtype=torch.int64, device=x.device)
    counts[world.rank] = len(x)
    dist.all_reduce(counts)
    before, after = int(counts[: world.rank].sum()), int(counts[world.rank + 1 :].sum())
    rows = F.pad(x.contiguous(), (0, 0) * (x.ndim - 1) + (before, after))
    if x.requires_grad:
        return all_reduce(rows)
    dist.all_reduce(rows)
    return rows
