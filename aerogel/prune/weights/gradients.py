"""The mean gradient of every weight over some labelled batches: what taylor and snip look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.graph import evaluating


def mean_gradients(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> dict[str, Tensor]:
    """{name: gradient of the cross-entropy, the mean over batches}; the network is in eval mode and left as it was.

    Raises AerogelError for no batch, and for a loss that is not finite.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sums: dict[str, Tensor] = {}
    count = 0
    with evaluating(model), torch.enable_grad():
        for inputs, labels, *_ in batches:
            loss = F.cross_entropy(model(inputs), labels)
            if not torch.isfinite(loss):
                raise AerogelError(f"mean_gradients: the loss must be finite, got {loss.item()}; check the weights")
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    sums[name] = sums[name] + gradient if name in sums else gradient
            count += 1
    if not count:
        raise AerogelError("mean_gradients: batches must hold at least one, got none; a generator serves once")
    return {name: total / count for name, total in sums.items()}
