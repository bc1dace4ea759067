"""How far a student answers as its teacher does, and how far a network's confidence can be believed.

agreement        the share of samples on which both have the same largest logit
confusion[a, b]  the samples that the teacher calls a and the student b
ECE              sum over bins m of |B_m| / n * |accuracy(B_m) - confidence(B_m)|, B_m the samples whose largest
                 probability lies in ((m - 1) / M, m / M]
ECE is equation 3 of Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", arXiv:1706.04599;
M = 15 there. Agreement is the top-1 fidelity of Stanton, Izmailov, Kirichenko, Alemi, Wilson 2021, "Does knowledge
distillation really work?", arXiv:2106.05945. Differs: nothing; of equal logits the first counts as the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.distill.checks import check_labels, check_logits
from aerogel.errors import AerogelError

BINS = 15


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """(n, C), (n, C) -> the share in [0, 1].

    Raises AerogelError for other shapes, no sample, and a teacher whose logits are not finite.
    """
    check_logits("agreement", student_logits, teacher_logits)
    _check_some("agreement", student_logits)
    same = student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
    return float(same.double().mean())


def confusion(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(n, C), (n, C) -> int64 (C, C), the teacher's answer down, the student's across; its sum is n.

    Raises AerogelError for other shapes, and a teacher whose logits are not finite.
    """
    check_logits("confusion", student_logits, teacher_logits)
    classes = student_logits.shape[1]
    cells = teacher_logits.argmax(dim=1) * classes + student_logits.argmax(dim=1)
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram. Of each bin, (M,): how many samples, the mean of their confidence, the share right."""

    counts: Tensor
    confidence: Tensor  # 0 of an empty bin
    accuracy: Tensor

    @property
    def error(self) -> float:
        """ECE, in [0, 1]."""
        gaps = (self.accuracy - self.confidence).abs()
        return float((self.counts * gaps).sum() / self.counts.sum())


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """The confidence of softmax(logits) against what is right: (n, C), int64 (n,) -> bins of equal width.

    Raises AerogelError for no bin, no sample, bad labels, and logits that are not finite.
    """
    if bins < 1:
        raise AerogelError(f"calibration: bins must be >= 1, got {bins}; 15 is usual")
    _check_some("calibration", logits)
    check_logits("calibration", logits, logits)
    check_labels("calibration", labels, logits)
    sure, answers = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    places = torch.bucketize(sure, edges)  # a confidence on an edge falls into the bin below it
    counts = torch.bincount(places, minlength=bins)
    shared = counts.clamp_min(1)
    right = (answers == labels).double()
    return Calibration(
        counts,
        torch.bincount(places, weights=sure, minlength=bins) / shared,
        torch.bincount(places, weights=right, minlength=bins) / shared,
    )


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (ECE) in [0, 1]: (n, C), int64 (n,). Raises AerogelError as `calibration` does."""
    return calibration(logits, labels, bins).error


def _check_some(caller: str, logits: Tensor) -> None:
    if not len(logits) or not torch.isfinite(logits).all():
        raise AerogelError(
            f"{caller}: logits must be finite and of 1 sample at least, got {len(logits)} samples; has the training "
            "diverged?"
        )
