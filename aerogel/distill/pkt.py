"""Probabilistic knowledge transfer (PKT). Passalis, Tefas 2018, "Learning deep representations with probabilistic
knowledge transfer", arXiv:1803.10837.

K(i, j) = (cosine of rows i and j + 1) / 2; p(j | i) = K(i, j) / sum over j of K(i, j)
loss = the mean over the n^2 pairs of p teacher * log(p teacher / p student)
Paper: the sum, j other than i. Differs: the mean with j = i among them, as in the authors' code, for which the weight
of 30,000 (RepDistiller, CIFAR) is meant. Nothing is trained, and the shapes of the features may differ.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.features import check_features, flat

EPS = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, ...), (n, ...) -> (). Not negative; 0 for rows that differ by a factor each, or all by a rotation.

    Raises AerogelError for features that are none, of other samples, and a teacher whose features are not finite.
    """
    check_features("pkt_loss", student, teacher)
    p, q = affinities(teacher), affinities(student)
    return (p * ((p + EPS).log() - (q + EPS).log())).mean()


def affinities(feature: Tensor) -> Tensor:
    """(n, ...) -> p(j | i), (n, n), rows that sum to 1."""
    rows = F.normalize(flat(feature), dim=1, eps=EPS)
    kernel = (rows @ rows.T + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)
