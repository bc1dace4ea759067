"""Statistics over channels held fixed, so that a cut through them can be proven all the same.

A layer norm over fewer channels has another mean and variance: cut and masked networks differ, and nothing in their
outputs shows whether the indices are right. With the statistic replaced by a constant in both (a layer norm by
x weight + bias, a mean by 1, a softmax by x), they must be equal again. Only the calls are replaced that reduce fewer
numbers in the cut network, told by running both and comparing sizes: a mean over pixels stays one.
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
        self.calls.append((str(func), _reduced(func._overloadpacket, args)))
        if len(self.calls) - 1 not in self.fixed:
            return func(*args, **(kwargs or {}))
        return constant(func, args, kwargs or {})


def changed(whole: list[Call], cut: list[Call]) -> set[int] | None:
    """The numbers of the calls that reduce less in the cut network; None where the two call other ops."""
    if [name for name, _ in whole] != [name for name, _ in cut]:
        return None
    return {i for i, (one, other) in enumerate(zip(whole, cut, strict=True)) if one[1] != other[1]}


def _reduced(packet: Any, args: Any) -> tuple[int, ...]:
    """The sizes of the dimensions that a statistic is taken over."""
    shape = tuple(args[0].shape)
    if packet in (aten.native_layer_norm, aten._fused_rms_norm):
        return shape[len(shape) - len(args[1]) :]
    if packet is aten.native_group_norm:
        return (shape[1] // args[6], *shape[2:])
    dims = next((a for a in args[1:] if isinstance(a, list | tuple) or type(a) is int), None)
    if packet is aten.linalg_vector_norm:
        dims = args[2] if len(args) > 2 else None
    if dims is None or dims == []:
        return shape
    return tuple(shape[d] for d in ([dims] if isinstance(dims, int) else dims))


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
