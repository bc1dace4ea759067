"""Networks that teach themselves.

Deep supervision: Zhang, Song, Gao, Chen, Bao, Ma 2019, "Be your own teacher", arXiv:1905.08094. Classifiers at
shallow exits i learn from the labels, from the deepest one C, and from its features F:
  loss = sum over i of (1 - alpha) * cross-entropy(q_i, y) + alpha * T^2 * KL(q_C at T || q_i at T)
         + lambda * |F_i - F_C|^2
  Here T 3, alpha 0.3. Differs: the last term is aerogel.distill.hints; the deepest exit's own label loss is the
  objective's "hard"; an exit is a linear layer on the mean over places, where the paper has a bottleneck before it.

Born again: Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, arXiv:1805.04770. A network of the same shape, made
anew, learns from the one before: soft_target_loss at T = 1, then the next from it. Confidence-weighted by the teacher's
maximum (CWTM), which shows what of the gain is but a weight on the labels:
  loss = sum over samples of w_s / sum(w) * cross-entropy(student, y), w = max over classes of softmax(teacher)
  Differs: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.distill.checks import check_labels, check_logits, check_temperature
from aerogel.distill.features import channels, pooled
from aerogel.distill.soft_targets import soft_target_loss
from aerogel.errors import AerogelError


def deep_supervision_loss(
    exits: Sequence[Tensor], deepest: Tensor, labels: Tensor, temperature: float = 3.0, alpha: float = 0.3
) -> Tensor:
    """Of shallow exits' logits against the deepest's, (n, C) each, and labels (n,) -> (). No gradient to the deepest.

    Raises AerogelError for a bad temperature, alpha outside [0, 1], no exit, other shapes, bad labels, and deepest
    logits that are not finite.
    """
    check_temperature("deep_supervision_loss", temperature)
    if not 0 <= alpha <= 1 or not exits:
        raise AerogelError(
            f"deep_supervision_loss: alpha must be in [0, 1] and exits not empty, got {alpha} and {len(exits)}; "
            "0.3 is usual"
        )
    total = deepest.new_zeros(())
    for logits in exits:
        check_logits("deep_supervision_loss", logits, deepest)
        check_labels("deep_supervision_loss", labels, logits)
        soft = soft_target_loss(logits, deepest.detach(), temperature)
        total = total + (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft
    return total


class Exit(nn.Module):
    """A classifier on a feature, by its example: (n, C), (n, C, H, W) or (n, tokens, C) -> (n, classes)."""

    def __init__(self, feature: Tensor, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels(feature), classes)

    def forward(self, feature: Tensor) -> Tensor:
        return self.head(pooled(feature))


def confidence_weighted_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, samples weighed by the teacher's confidence: (n, C), (n, C), (n,) -> ().

    Raises AerogelError for other shapes, bad labels, and a teacher whose logits are not finite.
    """
    check_logits("confidence_weighted_loss", student_logits, teacher_logits)
    check_labels("confidence_weighted_loss", labels, student_logits)
    weights = teacher_logits.softmax(dim=1).amax(dim=1)
    return (weights / weights.sum() * F.cross_entropy(student_logits, labels, reduction="none")).sum()
