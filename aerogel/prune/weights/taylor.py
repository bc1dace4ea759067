"""First-order Taylor expansion. Molchanov, Mallya, Tyree, Frosio, Kautz 2019, "Importance estimation for neural network
pruning", arXiv:1906.10771, equation 8, of single weights.

score = (g w)^2, g the gradient of the mean loss: the squared change of the loss when w goes, to first order.
Differs: single weights instead of filters; g is the mean over the batches seen, where the paper averages squares.
"""

from __future__ import annotations

from torch import Tensor


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """(g w)^2, of the weight's shape."""
    return (gradient * weight).square()
