"""Decoupled distillation (DKD). Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation",
arXiv:2203.08679, eq. 7.

b = (p_t, 1 - p_t), the target class against the rest, at T; p^ = softmax over the other C - 1 classes alone, at T
TCKD = KL(b teacher || b student), NCKD = KL(p^ teacher || p^ student), of a sample
loss = T^2 * (alpha * TCKD + beta * NCKD), the mean over the batch
Soft targets are TCKD + (1 - p_t teacher) * NCKD: what the teacher knows of the other classes counts least where it is
surest. DKD takes that weight away.
Paper: alpha 1, beta 8, T 4 on CIFAR-100 (beta from 1 to 10 by pair), alpha 1, beta 2 (later 0.5), T 1 on ImageNet; its
weight rises linearly over 20 epochs. Differs: the rise is left to the caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_labels, check_logits, check_positive, check_temperature, others


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """(n, C), (n, C), int64 (n,) -> (). 0 when both agree.

    Raises AerogelError for a bad temperature, a negative alpha or beta, other shapes, labels outside [0, C), and a
    teacher whose logits are not finite.
    """
    check_temperature("dkd_loss", temperature)
    check_positive("dkd_loss", alpha=alpha, beta=beta)
    check_logits("dkd_loss", student_logits, teacher_logits)
    check_labels("dkd_loss", labels, student_logits)
    target, rest = decoupled(student_logits / temperature, teacher_logits / temperature, labels)
    return temperature**2 * (alpha * target + beta * rest).mean()


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample, of logits that are divided by T already: (n, C), (n, C), (n,) -> (n,), (n,)."""
    target = _divergence(_against_the_rest(student, labels), _against_the_rest(teacher, labels))
    rest = _divergence(F.log_softmax(others(student, labels), dim=1), F.log_softmax(others(teacher, labels), dim=1))
    return target, rest


def _against_the_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """log (p_t, 1 - p_t): (n, C), (n,) -> (n, 2)."""
    chosen = logits.gather(1, labels[:, None]).squeeze(1)
    return F.log_softmax(torch.stack([chosen, others(logits, labels).logsumexp(dim=1)], dim=1), dim=1)


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
