"""What a network answers on a split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aerogel.data import Dataset, batches
from aerogel.graph import evaluating


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, split: str, batch_size: int = 500) -> Tensor:
    """Logits (n, classes) in the split's order; the model's train/eval flags are left as found."""
    with evaluating(model):
        return torch.cat([model(batch.inputs) for batch in batches(data, split, batch_size)])


def accuracy(model: nn.Module, data: Dataset, split: str) -> float:
    """Percent of the split that the network gets right."""
    answers = predict(model, data, split).argmax(1)
    return 100.0 * float((answers == getattr(data, split).labels).double().mean())
