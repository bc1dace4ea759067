"""One distribution from several teachers. Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 1: "the arithmetic or
geometric mean of their individual predictive distributions".

p_k = softmax(z_k / T), k = 1..K, weights w_k that sum to 1
arithmetic  p = sum w_k p_k                        unsure where the teachers disagree
geometric   p ~ product p_k^w_k, that is, softmax(sum w_k z_k / T)   only what all teachers allow
Given back are logits v with softmax(v / T) = p, so that every loss takes them as one teacher's. Those of the arithmetic
mean depend on T.
Differs: nothing; the paper leaves the weights equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_temperature
from aerogel.errors import AerogelError

COMBINE = ("arithmetic", "geometric")


def ensemble_logits(
    logits: Tensor, weights: Sequence[float] | None = None, combine: str = "arithmetic", temperature: float = 1.0
) -> Tensor:
    """Logits of the mean distribution at T: (K, n, C) -> (n, C). Exact for one teacher, up to a constant a row.

    Raises AerogelError for a bad temperature, another shape, an unknown `combine`, and weights that are not K
    numbers >= 0 with a positive sum (it is made 1).
    """
    check_temperature("ensemble_logits", temperature)
    if logits.ndim != 3 or not len(logits):
        raise AerogelError(
            f"ensemble_logits: logits must be (teachers, n, classes) with a teacher at least, got "
            f"{tuple(logits.shape)}; stack what the teachers gave"
        )
    shares = logits.new_tensor(check_ensemble("ensemble_logits", len(logits), weights, combine))[:, None, None]
    if combine == "geometric":
        return (shares * logits).sum(dim=0)
    return temperature * torch.logsumexp(F.log_softmax(logits / temperature, dim=2) + shares.log(), dim=0)


def check_ensemble(caller: str, teachers: int, weights: Sequence[float] | None, combine: str) -> list[float]:
    """The weights, with sum 1. Raises AerogelError as `ensemble_logits` does."""
    if combine not in COMBINE:
        raise AerogelError(f"{caller}: combine must be {' or '.join(COMBINE)}, got {combine!r}")
    weights = [1.0] * teachers if weights is None else list(weights)
    bad = len(weights) != teachers or not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0
    if bad:
        raise AerogelError(
            f"{caller}: weights must be {teachers} numbers >= 0 with a positive sum, one a teacher, got {weights}; "
            "leave them out for equal ones"
        )
    return [w / sum(weights) for w in weights]
