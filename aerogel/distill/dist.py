"""DIST. Huang, You, Wang, Qian, Xu 2022, "Knowledge distillation from a stronger teacher", arXiv:2205.10536.

Y = softmax(logits / tau), n x C; d(u, v) = 1 - Pearson's correlation of u and v
inter = the mean over the n rows of d, intra = the mean over the C columns of d
loss = inter_weight * inter + intra_weight * intra, beside the hard-label loss with weight 1
Correlation asks for the teacher's relations, not for its numbers: a stronger teacher need not be matched exactly.
Paper: both weights 1, tau 1; the authors' code has both 2, tau 1 (ImageNet) and 4 (CIFAR), and multiplies by tau^2.
Here 2, 2 and 4. Differs: no tau^2, as in the paper. A row or column without any spread counts as uncorrelated.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.distill.checks import check_logits, check_positive, check_temperature

EPS = 1e-8


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    inter_weight: float = 2.0,
    intra_weight: float = 2.0,
) -> Tensor:
    """(n, C), (n, C) -> (). Symmetric; 0 when both agree. The columns want a batch of some size.

    Raises AerogelError for a bad temperature, a negative weight, other shapes, and a teacher whose logits are not
    finite.
    """
    check_temperature("dist_loss", temperature)
    check_positive("dist_loss", inter_weight=inter_weight, intra_weight=intra_weight)
    check_logits("dist_loss", student_logits, teacher_logits)
    student, teacher = ((z / temperature).softmax(dim=1) for z in (student_logits, teacher_logits))
    inter, intra = 1 - pearson(student, teacher).mean(), 1 - pearson(student.T, teacher.T).mean()
    return inter_weight * inter + intra_weight * intra


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of each pair of rows: (r, k), (r, k) -> (r,), from -1 to 1."""
    one, other = (x - x.mean(dim=1, keepdim=True) for x in (one, other))
    sizes = (one.square().sum(dim=1) * other.square().sum(dim=1)).clamp_min(EPS**4).sqrt()
    return (one * other).sum(dim=1) / sizes
