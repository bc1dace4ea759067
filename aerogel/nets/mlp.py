"""The multilayer perceptrons of Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network",
arXiv:1503.02531, section 3.

Each hidden layer is linear, ReLU, dropout.

| widths    | layers             | params    | MACs      | the paper's test errors of 10,000             |
| 1200-1200 | 784-1200-1200-10   | 2,395,210 | 2,392,800 | 67, with dropout, max-norm, jittered images   |
| 800-800   | 784-800-800-10     | 1,276,810 | 1,275,200 | 146 with nothing, 74 distilled from the above |
(1 x 28 x 28 inputs, 10 classes: the defaults. Biases are counted.)

widths is the hidden layers' units, joined by "-", or one integer. dropout (after every hidden layer) and
input_dropout are rates, 0 by default; 0.5 and 0.2 are those of the paper's reference 5 (Hinton, Srivastava,
Krizhevsky, Sutskever, Salakhutdinov 2012, arXiv:1207.0580), where the teacher's regularisation comes from.
max_norm is that reference's other one: no hidden unit's incoming weight vector may be longer. The net only
keeps the number, in its spec; the training calls max_norm_(net.features, max_norm) after every step.
Differs: the papers do not say how the weights start; here He normal (fan in), biases 0.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.nets.blocks import Net, check, named


def mlp(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    input_size: int = 28,
    widths: str | int = "1200-1200",
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    max_norm: float | None = None,
) -> Net:
    """Hidden layers of these widths; the image is flattened first, so any size and number of channels will do."""
    check("mlp", num_classes=num_classes, in_channels=in_channels, input_size=input_size, max_norm=max_norm)
    check("mlp", dropout=dropout, input_dropout=input_dropout)
    features = named(flatten=nn.Flatten(), input_dropout=nn.Dropout(input_dropout))
    fan_in = in_channels * input_size * input_size
    for number, units in enumerate(_units(widths), start=1):
        features.add_module(f"fc{number}", nn.Linear(fan_in, units))
        features.add_module(f"relu{number}", nn.ReLU())
        features.add_module(f"dropout{number}", nn.Dropout(dropout))
        fan_in = units
    net = Net(features, named(fc=nn.Linear(fan_in, num_classes)))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net


def _units(widths: str | int) -> list[int]:
    """Reads "1200-1200" as [1200, 1200]."""
    if isinstance(widths, bool) or not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", str(widths)):
        raise AerogelError(f"mlp: widths must be integers >= 1 joined by '-', such as 1200-1200, got {widths!r}")
    return [int(units) for units in str(widths).split("-")]


def max_norm_(module: nn.Module, limit: float) -> None:
    """In place: every incoming weight vector longer than `limit` is scaled back to it (L2 norm); biases stay.

    A unit's vector is its row of a linear layer's weight, its filter of a convolution's. To be called after
    each optimizer step. The reference limits the hidden units only: give it `net.features`.
    Raises AerogelError where limit is not a number > 0.
    """
    check("max_norm_", limit=limit)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.renorm_(p=2, dim=0, maxnorm=limit)
