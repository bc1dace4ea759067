"""Matching logits. Ba, Caruana 2014, "Do deep nets really need to be deep?", arXiv:1312.6184, eq. 1; Hinton, Vinyals,
Dean 2015, arXiv:1503.02531, section 2.1: what soft targets become at high temperature.

z, v = the student's and the teacher's logits, each less its mean over the C classes
loss = 1 / (2 C) * sum over the classes of (z - v)^2, the mean over the batch; its gradient on a row is (z - v) / C
Differs: Ba and Caruana keep the mean, which no softmax sees, and do not divide by C; here it is the limit of
soft_target_loss, so that one weight serves both.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.distill.checks import check_logits


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the mean squared distance of zero-mean logits: (n, C), (n, C) -> (). Symmetric; 0 when they agree.

    Raises AerogelError when the shapes are not one (n, C) or the teacher's logits are not finite.
    """
    check_logits("logit_mse_loss", student_logits, teacher_logits)
    apart = student_logits - teacher_logits
    return (apart - apart.mean(dim=1, keepdim=True)).square().mean() / 2
