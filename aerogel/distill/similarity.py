"""Similarity-preserving distillation (SP). Tung, Mori 2019, "Similarity-preserving knowledge distillation",
arXiv:1907.09682, eq. 1 to 4.

G = Q Q^T, Q the batch's features, n x D; each row of G divided by its length
loss = 1 / n^2 * |G student - G teacher|_F^2
Paper: weight 3,000 (CIFAR). Differs: nothing. Nothing is trained, and the shapes of the features may differ.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.features import check_features, flat


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, ...), (n, ...) -> (). Symmetric; 0 for features that differ by a factor or a rotation.

    Raises AerogelError for features that are none, of other samples, and a teacher whose features are not finite.
    """
    check_features("similarity_loss", student, teacher)
    return (similarities(student) - similarities(teacher)).square().sum() / len(student) ** 2


def similarities(feature: Tensor) -> Tensor:
    """(n, ...) -> (n, n), rows of length 1."""
    rows = flat(feature)
    return F.normalize(rows @ rows.T, dim=1)
