"""Knowledge distillation by soft targets. Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.

p_T = softmax(teacher logits / T), q_T = softmax(student logits / T), classes C, batch n
soft = T^2 * KL(p_T || q_T), the mean over the batch; its gradient keeps its size as T moves
loss = hard_weight * cross-entropy(student at T = 1, labels) + soft_weight * soft
Paper: T from 1 to 20, and a considerably lower weight on the hard labels. Here T = 4, 0.1 and 0.9, the setting
that the CIFAR literature shares. Differs: nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.distill.checks import check_logits, check_temperature
from aerogel.graph import evaluating


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL of the softened distributions, batch mean: (n, C), (n, C) -> (). 0 when both agree.

    Raises AerogelError when the temperature is not positive and finite, the shapes are not one (n, C), or the teacher's
    logits are not finite.
    """
    check_temperature("soft_target_loss", temperature)
    check_logits("soft_target_loss", student_logits, teacher_logits)
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class SoftTargets:
    """The objective: hard labels and a teacher's soft targets. The teacher runs in eval mode, without gradient.

    Raises AerogelError when the temperature is not positive and finite.
    """

    def __init__(
        self, teacher: nn.Module, temperature: float = 4.0, hard_weight: float = 0.1, soft_weight: float = 0.9
    ) -> None:
        check_temperature("SoftTargets", temperature)
        self.teacher = teacher
        self.temperature, self.hard_weight, self.soft_weight = temperature, hard_weight, soft_weight

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), evaluating(self.teacher):
            teacher_logits = self.teacher(batch.inputs)
        logits = student(batch.inputs)
        return {
            "hard": self.hard_weight * F.cross_entropy(logits, batch.labels),
            "soft": self.soft_weight * soft_target_loss(logits, teacher_logits, self.temperature),
        }
