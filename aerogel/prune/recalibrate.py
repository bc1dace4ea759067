"""Batch-norm recalibration: the running statistics of a network whose weights have changed, measured anew.

What was averaged while the network was whole is wrong for what is left of it. Cumulative: after batch k of a pass
mean = mean + (batch mean - mean) / k, the same for the variance, so that every batch counts alike; PyTorch's own
average with momentum=None. Wu and Johnson 2021, arXiv:2105.07576, section 3, use it under the name of PreciseBN.
Differs: theirs adds the spread of the batches' means to the variance, which is small where batches are large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.graph import evaluating

Norm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Measures the running mean and variance of every batch norm again, in place; returns the model.

    batches: what the model reads, an input tensor, a tuple that begins with it (inputs, labels), or a dict of keyword
    arguments; a few dozen training batches are enough. Only the norms run in training mode (dropout stays off) and
    only their statistics change; a norm that no batch reaches keeps what it had.
    Raises AerogelError when there is no batch, or one of another kind.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, Norm) and norm.track_running_stats]
    if not norms:
        return model
    count = 0
    with evaluating(model), _averaging(norms):
        for batch in batches:
            args, kwargs = _arguments(batch)
            model(*args, **kwargs)
            count += 1
    if not count:
        raise AerogelError("recalibrate: batches must hold at least one, got none; pass some training batches")
    return model


@contextmanager
def _averaging(norms: list[Norm]) -> Iterator[None]:
    """Inside, the norms average over the batches that they see, from the first of them on."""
    held = [(norm, norm.momentum, _counter(norm).clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.training = None, True
            _counter(norm).zero_()  # the first batch then replaces the statistics, as 1 / 1 of the average
        yield
    finally:
        for norm, momentum, counted in held:
            norm.momentum = momentum
            if not _counter(norm):
                _counter(norm).copy_(counted)


def _counter(norm: Norm) -> Tensor:
    if norm.num_batches_tracked is None:  # networks saved before PyTorch 0.4.1 have none
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return norm.num_batches_tracked


def _arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """How the model is called with a batch."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    kind = type(batch).__name__
    raise AerogelError(f"recalibrate: a batch must be a tensor, a tuple that begins with one, or a dict, got {kind}")
