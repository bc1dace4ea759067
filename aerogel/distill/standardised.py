"""Logit standardisation. Sun, Ren, Li, Wang, Cao 2024, "Logit standardization in knowledge distillation",
arXiv:2403.01993.

Z(z) = (z - mean) / standard deviation, over the classes of a row (1 / C inside the root)
loss = T^2 * KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), the mean over the batch
A student need not reach the teacher's range of logits, only its ranking and its relations.
Paper: T = 2, weight 9 beside 0.1 on the hard labels (ten times the usual weight of soft targets).
Differs: nothing; the authors' code divides by C - 1 inside the root.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.distill.checks import check_logits, check_temperature
from aerogel.distill.soft_targets import soft_target_loss

EPS = 1e-7  # beside the standard deviation: equal logits become zeros


def standardised(logits: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1: (n, C) -> (n, C). Scale and shift of a row do not matter."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / ((centred.square().mean(dim=1, keepdim=True) + EPS**2).sqrt() + EPS)


def standardised_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Soft targets on standardised logits: (n, C), (n, C) -> (). 0 when they agree up to each row's scale and shift.

    Raises AerogelError when the temperature is not positive and finite, the shapes are not one (n, C), or the teacher's
    logits are not finite.
    """
    check_temperature("standardised_loss", temperature)
    check_logits("standardised_loss", student_logits, teacher_logits)
    return soft_target_loss(standardised(student_logits), standardised(teacher_logits), temperature)
