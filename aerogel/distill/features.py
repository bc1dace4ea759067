"""Features of any network in one shape: (n, P, C), P places of C channels.

(n, C)             one place
(n, C, H, W)       H * W places
(n, tokens, C)     a place a token, as transformers give them
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_finite
from aerogel.errors import AerogelError


def check_features(caller: str, student: Tensor, teacher: Tensor) -> None:
    """Raises AerogelError unless both are features of equally many samples, and the teacher's are finite."""
    for who, feature in (("student", student), ("teacher", teacher)):
        if feature.ndim not in (2, 3, 4) or not feature.is_floating_point():
            raise AerogelError(
                f"{caller}: the {who}'s feature must be (n, C), (n, C, H, W) or (n, tokens, C) of floating-point "
                f"numbers, got {feature.dtype} {tuple(feature.shape)}; tap another module"
            )
    if len(student) != len(teacher):
        raise AerogelError(
            f"{caller}: student and teacher must see the same samples, got {len(student)} and {len(teacher)}; "
            "take both features from one batch"
        )
    check_finite(caller, teacher, "features")


def channels(feature: Tensor) -> int:
    return feature.shape[2] if feature.ndim == 3 else feature.shape[1]


def places(feature: Tensor) -> Tensor:
    """-> (n, P, C)."""
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    return feature[:, None] if feature.ndim == 2 else feature


def pooled(feature: Tensor) -> Tensor:
    """The mean over places: -> (n, C)."""
    return places(feature).mean(dim=1)


def flat(feature: Tensor) -> Tensor:
    """All numbers of a sample: -> (n, D)."""
    return feature.flatten(1)


def matched(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n, P, C) with one P; channels may differ. The larger of two maps is averaged to the smaller's size.

    Raises AerogelError where the places of tokens cannot be told apart in the other.
    """
    check_features(caller, student, teacher)
    if student.ndim == teacher.ndim == 4:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    student, teacher = places(student), places(teacher)
    if student.shape[1] != teacher.shape[1]:
        raise AerogelError(
            f"{caller}: {student.shape[1]} places of the student and {teacher.shape[1]} of the teacher do not "
            "match; tap two maps, or two modules with equally many tokens"
        )
    return student, teacher
