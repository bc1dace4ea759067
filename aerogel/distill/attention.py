"""Attention transfer (AT). Zagoruyko, Komodakis 2017, "Paying more attention to attention", arXiv:1612.03928, eq. 2.

Q = sum over the channels of |A|^p at each of P places, A a feature; Q / |Q|_2
loss = the mean over the samples and places of (Q student / |Q student| - Q teacher / |Q teacher|)^2
Paper: p 2, and the plain norm of the difference with a weight of 1,000 / P or so. Differs: the mean of squares, as in
RepDistiller, whose weight is 1,000. Maps of two sizes are averaged to the smaller one; the tokens of a transformer are
places too. Nothing is trained, and channels may differ.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.features import matched
from aerogel.errors import AerogelError


def attention_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """(n, C, H, W) or (n, tokens, C), two of them -> (). Symmetric; 0 for maps that differ by a factor a sample.

    Raises AerogelError for (n, C), which has no places, for places that do not match, power <= 0, and a teacher whose
    features are not finite.
    """
    if not power > 0:
        raise AerogelError(f"attention_loss: power must be > 0, got {power}; the paper has 2")
    if student.ndim == 2 or teacher.ndim == 2:
        raise AerogelError(
            f"attention_loss: features must have places, (n, C, H, W) or (n, tokens, C), got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; tap a module before the pooling"
        )
    student, teacher = matched("attention_loss", student, teacher)
    return (_attention(student, power) - _attention(teacher, power)).square().mean()


def _attention(feature: Tensor, power: float) -> Tensor:
    """(n, P, C) -> (n, P), of length 1."""
    return F.normalize(feature.abs().pow(power).mean(dim=2), dim=1)
