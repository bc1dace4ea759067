"""L1 regularisation of weights, so that what is not needed is near zero when it is pruned. Han et al. 2015,
arXiv:1506.02626, section 3.1: L1 gives better accuracy after pruning and before retraining, L2 after retraining.

loss + penalty * sum |w|     over the weights of two or more dimensions
L2 is the recipe's weight_decay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError
from aerogel.prune.masks import prunable
from aerogel.train import Objective


def l1_norm(model: nn.Module) -> Tensor:
    """Sum of |w| over the weights that can be pruned: ()."""
    return torch.stack([weight.abs().sum() for weight in prunable(model).values()]).sum()


class L1(nn.Module):
    """The objective: another one's losses, and "l1": penalty * sum |w|.

    Raises AerogelError when the penalty is negative or not finite.
    """

    def __init__(self, objective: Objective, penalty: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= penalty < math.inf:
            raise AerogelError(f"L1: penalty must be >= 0 and finite, got {penalty}; 1e-5 is usual")
        self.objective, self.penalty = objective, penalty

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {**self.objective(student, batch), "l1": self.penalty * l1_norm(student)}
