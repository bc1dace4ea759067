"""Statistics over channels held fixed, so that a cut through them can be proven all the same.

A layer norm over fewer channels has another mean and variance: cut and masked networks differ, and nothing in their
outputs shows whether the indices are right. With the statistic replaced by a constant in both (a layer norm by
x weight + bias, a mean by 1, a softmax by x), they must be equal again. Only the calls are replaced whose input has
fewer channels in the cut network, told by running both and comparing shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Call = tuple[str, tuple[int, ...]]


class Statistics(TorchDispatchMode):
    """Notes the statistics that run inside, in order; those whose numbers are in `fixed` give a constant."""

    def __init__(self, fixed: Container[int] = ()) -> None:
        super().__init__()
        self.fixed = fixed
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        constant = CONSTANT.get(func._overloadpacket)
        if constant is None:
            return func(*args, **(kwargs or {}))
        self.calls.append((str(func), tuple(args[0].shape)))
        if len(self.calls) - 1 not in self.fixed:
            return func(*args, **(kwargs or {}))
        return constant(func, args, kwargs or {})


def changed(whole: list[Call], cut: list[Call]) -> set[int] | None:
    """The numbers of the calls whose input is smaller in the cut network; None where the two call other ops."""
    if [name for name, _ in whole] != [name for name, _ in cut]:
        return None
    return {i for i, (one, other) in enumerate(zip(whole, cut, strict=True)) if one[1] != other[1]}


def _layer_norm(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, normalized, weight, bias = args[:4]
    one = x.new_ones([*x.shape[: x.ndim - len(normalized)], *(1 for _ in normalized)])
    return _affine(x, weight, bias), torch.zeros_like(one), one


def _group_norm(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, batch, _, _, groups = args[:7]
    shape = (-1, *(1 for _ in x.shape[2:]))
    weight, bias = (None if p is None else p.view(shape) for p in (weight, bias))
    one = x.new_ones(batch, groups)
    return _affine(x, weight, bias), torch.zeros_like(one), one


def _rms_norm(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    x, normalized, weight = args[:3]
    one = x.new_ones([*x.shape[: x.ndim - len(normalized)], *(1 for _ in normalized)])
    return _affine(x, weight, None), one


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x.clone() if bias is None else x + bias


def _one(func: Any, args: Any, kwargs: Any) -> Any:
    """The statistic's shape, filled with 1."""
    found = func(*args, **kwargs)
    return tuple(map(torch.ones_like, found)) if isinstance(found, tuple | list) else torch.ones_like(found)


def _itself(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0].clone()


CONSTANT: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten._fused_rms_norm: _rms_norm,
    **dict.fromkeys([aten.mean, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.amax, aten.amin, aten.prod,
                     aten.logsumexp, aten.sum, aten.linalg_vector_norm], _one),
    **dict.fromkeys([aten._softmax, aten._log_softmax], _itself),
}  # fmt: skip
