"""Relational distillation (RKD). Park, Kim, Lu, Cho 2019, "Relational knowledge distillation", arXiv:1904.05068.

distance  of a pair: |t_i - t_j| / the mean of all distances that are not 0
angle     of a triple: cosine of the angle at t_j between t_i and t_k
loss      Huber(student's, teacher's) with delta 1: the mean over the n^2 pairs, and over the n^3 triples
Paper: 25 on distances, 50 on angles, on embeddings. Differs: nothing; means as in the authors' code. Triples take
n^3 numbers: 64 samples are 262,144.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_positive
from aerogel.distill.features import check_features, flat

EPS = 1e-12


def relational_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """(n, ...), (n, ...) -> (). Symmetric; 0 for features that differ by a shift, a rotation or a factor.

    Raises AerogelError for a negative weight, features that are none, of other samples, and a teacher whose features
    are not finite.
    """
    check_positive("relational_loss", distance_weight=distance_weight, angle_weight=angle_weight)
    return distance_weight * distance_loss(student, teacher) + angle_weight * angle_loss(student, teacher)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, ...), (n, ...) -> ()."""
    check_features("distance_loss", student, teacher)
    return F.smooth_l1_loss(distances(flat(student)), distances(flat(teacher)))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, ...), (n, ...) -> ()."""
    check_features("angle_loss", student, teacher)
    return F.smooth_l1_loss(angles(flat(student)), angles(flat(teacher)))


def distances(rows: Tensor) -> Tensor:
    """(n, D) -> (n, n), the mean of those that are not 0 is 1."""
    squares = (rows[:, None] - rows).square().sum(dim=2)
    apart = squares > EPS
    found = torch.where(apart, squares, 1).sqrt() * apart  # no root of 0: it has no gradient
    return found / (found.sum() / apart.sum().clamp_min(1)).clamp_min(EPS)


def angles(rows: Tensor) -> Tensor:
    """(n, D) -> (n, n, n): [j, i, k] is the cosine at j between i and k."""
    towards = F.normalize(rows[None] - rows[:, None], dim=2)
    return towards @ towards.transpose(1, 2)
