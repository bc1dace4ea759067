"""Movement: a weight that training drives towards zero goes, however large it is. Sanh, Wolf, Rush 2020, "Movement
pruning: adaptive sparsity by fine-tuning", arXiv:2005.07683, equation 4.

S = - sum over steps of rate * dL/dw * w
Along plain SGD, dw = - rate * dL/dw, so S is the integral of w dw:  S = (w_now^2 - w_before^2) / 2.
That closed form is the score: it needs the weights before a training and after it, no gradients, and survives a stop.
Differs: the closed form, which leaves out terms of second order in the rate and counts momentum and weight decay as
movement; weights that are gone stay gone, where the paper lets them return (straight-through).
"""

from __future__ import annotations

from torch import Tensor


def movement(weight: Tensor, earlier: Tensor) -> Tensor:
    """(w_now^2 - w_before^2) / 2, of the weight's shape: negative for what shrank."""
    return (weight.square() - earlier.to(weight).square()) / 2
