"""Normalised distillation (NKD). Yang, Zeng, Li, Zhang, Yuan, Li 2023, "From knowledge distillation to
self-knowledge distillation: a unified approach with normalized loss and customized soft labels", arXiv:2303.13005.

S, T = softmax of the student's and the teacher's logits at temperature 1, t the target class
N(.) = softmax over the other C - 1 classes alone, at temperature tau
loss = -T_t log S_t - gamma * tau^2 * sum over i != t of N(T_i) log N(S_i), the mean over the batch
A cross-entropy, not a divergence: it is not 0 when both agree, and its target part pulls S_t to 1.
Paper: gamma 1.5, tau 1 (ImageNet), beside the hard-label loss with weight 1. Differs: nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_labels, check_logits, check_positive, check_temperature, others


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    """(n, C), (n, C), int64 (n,) -> ().

    Raises AerogelError for a bad temperature, a negative gamma, other shapes, labels outside [0, C), and a teacher
    whose logits are not finite.
    """
    check_temperature("nkd_loss", temperature)
    check_positive("nkd_loss", gamma=gamma)
    check_logits("nkd_loss", student_logits, teacher_logits)
    check_labels("nkd_loss", labels, student_logits)
    sure = teacher_logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    target = sure * F.cross_entropy(student_logits, labels, reduction="none")
    student, teacher = others(student_logits, labels) / temperature, others(teacher_logits, labels) / temperature
    rest = F.cross_entropy(student, teacher.softmax(dim=1), reduction="none")
    return (target + gamma * temperature**2 * rest).mean()
