"""Dropout while a pruned network retrains. Han et al. 2015, arXiv:1506.02626, section 3.2, equations 1 and 2.

D_r = D_o sqrt(C_ir / C_io)
D dropout, o the original, r retraining, C_i connections of layer i, ir after pruning. Pruning has already lowered the
capacity, so dropout must be smaller; it works on neurons, and connections vary quadratically with neurons.
Here layer i is the one before the dropout, whose outputs it drops, in the order in which modules are registered; a
dropout before the first layer, or behind one without a mask, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.prune.masks import Masks


def retraining_dropout(rate: float, kept: int, whole: int) -> float:
    """D_r of D_o, for a layer that kept so many of its connections."""
    return rate * math.sqrt(kept / whole) if whole else rate


def dropout_rates(model: nn.Module, masks: Masks) -> dict[str, tuple[float, float]]:
    """{dropout: (its rate, the rate for retraining)}."""
    counts, last, found = masks.counts(), None, {}
    for name, module in model.named_modules():
        own = f"{name}.weight" if name else "weight"
        if own in counts:
            last = counts[own]
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1:
            last = None  # a layer without a mask is whole
        elif isinstance(module, nn.modules.dropout._DropoutNd) and last is not None:
            found[name] = (module.p, retraining_dropout(module.p, *last))
    return found


def set_dropout(model: nn.Module, rates: Mapping[str, float]) -> None:
    """In place; {dropout: rate}."""
    for name, rate in rates.items():
        module = model.get_submodule(name)
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            raise AerogelError(f"set_dropout: {name} must be a dropout, got {type(module).__name__}")
        module.p = rate
