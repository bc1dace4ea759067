"""Knowledge review (ReviewKD). Chen, Liu, Zhao, Jia 2021, "Distilling knowledge via knowledge review",
arXiv:2104.09044, section 3: attention-based fusion (ABF) and hierarchical context loss (HCL).

The student's features, deep to shallow, flow into one another:
  x = 1 x 1 conv(student_i); y = the fused one of the deeper stage, enlarged to x's size
  (a, b) = sigmoid(1 x 1 conv(x, y)), one number a place; x = a x + b y, which goes on to the next; 3 x 3 conv(x) is
  compared with teacher_i
HCL: mean squared difference of the maps, and of their averages to 4 x 4, 2 x 2 and 1 x 1 where smaller than the map,
  weighed 1, 1/2, 1/4, 1/8 and divided by the weights' sum
Paper: mid channels 512 at most, weight 0.6 to 30 by pair (5 to 8 for ShuffleNets), which rises over 20 epochs.
Differs: group norm (one group) where the authors have batch norm, whose statistics would differ between processes; the
rise is left to the caller; the deepest pair is whatever the deepest tap gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.distill.features import check_features
from aerogel.errors import AerogelError

POOLS = (4, 2, 1)


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL of two maps of one shape: (n, C, H, W), (n, C, H, W) -> (). Symmetric; 0 when they agree.

    Raises AerogelError for other shapes, and a teacher whose features are not finite.
    """
    check_features("hierarchical_loss", student, teacher)
    if student.shape != teacher.shape or student.ndim != 4:
        raise AerogelError(
            f"hierarchical_loss: features must be maps of one shape (n, C, H, W), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; take what Review gives"
        )
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for pool in POOLS:
        if pool >= student.shape[2]:
            continue
        weight /= 2
        weights += weight
        ours, theirs = F.adaptive_avg_pool2d(student, pool), F.adaptive_avg_pool2d(teacher, pool)
        total = total + weight * F.mse_loss(ours, theirs)
    return total / weights


class Review(nn.Module):
    """The fusions, by examples of the features, shallow to deep: (students, teachers) -> loss (), the sum over stages.

    Raises AerogelError unless the features are equally many maps (n, C, H, W).
    """

    def __init__(self, students: Sequence[Tensor], teachers: Sequence[Tensor], most: int = 512) -> None:
        super().__init__()
        if len(students) != len(teachers) or not students or any(x.ndim != 4 for x in (*students, *teachers)):
            raise AerogelError(
                f"Review: features must be maps (n, C, H, W), a teacher's for each of the student's, got shapes "
                f"{[tuple(x.shape) for x in students]} and {[tuple(x.shape) for x in teachers]}; tap the stages"
            )
        mid = min(most, students[-1].shape[1])
        self.stages = nn.ModuleList(
            _Fusion(ours.shape[1], mid, theirs.shape[1], deepest=number == len(students) - 1)
            for number, (ours, theirs) in enumerate(zip(students, teachers, strict=True))
        )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        deeper: Tensor | None = None
        total = teachers[0].new_zeros(())
        for stage, ours, theirs in reversed(list(zip(self.stages, students, teachers, strict=True))):
            out, deeper = stage(ours, deeper, theirs.shape[2:])
            total = total + hierarchical_loss(out, theirs)
        return total


class _Fusion(nn.Module):
    """ABF: (student's map, the deeper fused one, the teacher's size) -> (a map like the teacher's, the fused one)."""

    def __init__(self, student: int, mid: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(student, mid, 1, bias=False), nn.GroupNorm(1, mid))
        self.attend = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        self.leave = nn.Sequential(nn.Conv2d(mid, teacher, 3, padding=1, bias=False), nn.GroupNorm(1, teacher))

    def forward(self, feature: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.enter(feature)
        if self.attend is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            shares = self.attend(torch.cat([x, y], dim=1)).sigmoid()
            x = x * shares[:, :1] + y * shares[:, 1:]
        out = x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")
        return self.leave(out), x
