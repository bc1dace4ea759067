"""Objectives: `objective(student, batch) -> {"hard": loss, "soft": loss, ...}`. The loop sums and logs them."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError


class Objective(Protocol):
    """Named scalar losses, already weighted. An objective with parameters of its own is an nn.Module."""

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]: ...


class HardLabels:
    """Cross-entropy with the true labels; `smoothing` in [0, 1) spreads that share of the target over all classes."""

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise AerogelError(f"HardLabels: smoothing must be in [0, 1), got {smoothing}; 0.1 is usual")
        self.smoothing = smoothing

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"hard": F.cross_entropy(student(batch.inputs), batch.labels, label_smoothing=self.smoothing)}
