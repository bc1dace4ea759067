"""What every loss asks of its input before it computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.errors import AerogelError


def check_temperature(caller: str, temperature: float) -> None:
    """Raises AerogelError unless 0 < temperature < infinity."""
    if not 0 < temperature < math.inf:
        raise AerogelError(f"{caller}: temperature must be > 0 and finite, got {temperature}; 1 to 20 are usual")


def check_logits(caller: str, student: Tensor, teacher: Tensor) -> None:
    """Raises AerogelError unless both are of one shape (n, C), and the teacher's are finite."""
    if student.shape != teacher.shape or student.ndim != 2:
        raise AerogelError(
            f"{caller}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
            "must give logits of one shape (n, classes); do they have the same classes?"
        )
    check_finite(caller, teacher)


def check_finite(caller: str, teacher: Tensor, what: str = "outputs") -> None:
    """Raises AerogelError when the teacher gave a number that is none."""
    good = torch.isfinite(teacher)
    if not good.all():
        raise AerogelError(
            f"{caller}: the teacher's {what} must be finite, got {int((~good).sum())} of {teacher.numel()} that are "
            "not; check its weights and how its inputs are normalised, or run it in single precision"
        )


def check_labels(caller: str, labels: Tensor, logits: Tensor) -> None:
    """Raises AerogelError unless labels are int64 (n,) in [0, C), C >= 2, for logits (n, C)."""
    n, classes = logits.shape
    if classes < 2:
        raise AerogelError(f"{caller}: there must be at least 2 classes, got {classes}; take soft_target_loss")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise AerogelError(
            f"{caller}: labels must be class numbers, int64 ({n},), got {labels.dtype} {tuple(labels.shape)}; mixed "
            "or soft labels go with soft_target_loss"
        )
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise AerogelError(
            f"{caller}: labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}; "
            "count classes from 0"
        )


def check_positive(caller: str, **values: float) -> None:
    """Raises AerogelError unless every value is >= 0 and finite."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise AerogelError(f"{caller}: {name} must be >= 0 and finite, got {value}; 0 leaves its part out")


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits without the labelled class: (n, C), (n,) -> (n, C - 1)."""
    n, classes = logits.shape
    kept = torch.arange(classes, device=logits.device) != labels[:, None]
    return logits[kept].view(n, classes - 1)
