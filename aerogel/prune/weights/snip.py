"""Connection sensitivity, at initialisation. Lee, Ajanthan, Torr 2019, "SNIP: single-shot network pruning based on
connection sensitivity", arXiv:1810.02340, equation 5.

score = |g w|, g the gradient of the loss of a mini-batch at the initial weights; one global ranking, then one training.
Paper: one batch of 100 (MNIST) or 128. The paper divides by the sum over all weights, which changes no ranking.
Differs: any number of batches, the mean of their gradients.
"""

from __future__ import annotations

from torch import Tensor


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|g w|, of the weight's shape."""
    return (gradient * weight).abs()
