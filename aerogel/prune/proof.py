"""The proof of a cut: the cut network against the masked one.

On random inputs, norm statistics and biases, the output of the cut network equals that of the whole network with the
same indices set to zero: |cut - masked| <= 1e-4 x |output| in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aerogel.errors import CutError
from aerogel.graph import evaluating, tensor_names
from aerogel.graph.capture import quiet
from aerogel.graph.resize import resize, sliced
from aerogel.prune.attributes import Key, set_attributes
from aerogel.prune.statistics import Statistics, changed

TOLERANCE = 1e-4
Kept = dict[str, tuple[Tensor | None, ...]]


def prove(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    kept: Kept,
    attributes: Mapping[Key, Any] | None = None,
    seed: int = 0,
) -> tuple[float, str | None]:
    """(largest relative error, what is wrong or None): the cut network against the masked one.

    attributes: what numbers its modules hold become, {(module, attribute): value}.
    Masked: every removed index of every weight set to zero, in the shapes of the whole network. In float32; where
    that fails, once more in float64: some networks amplify rounding, a wrong index stays wrong.
    """
    error, wrong = _Pair(model, args, kwargs, kept, attributes, seed, torch.float32).compared()
    if wrong and np.isfinite(error):
        with contextlib.suppress(CutError):  # code that insists on float32 has had its verdict
            finer, still_wrong = _Pair(model, args, kwargs, kept, attributes, seed, torch.float64).compared()
            if not still_wrong:
                return finer, None
    return error, wrong


def prove_inexact(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    kept: Kept,
    attributes: Mapping[Key, Any] | None = None,
    seed: int = 0,
) -> tuple[float, str | None, float]:
    """(error, what is wrong or None, relative difference) of a cut through statistics over channels.

    The difference is what the cut changes; the error is what is left of it while these statistics are held fixed in
    both networks (aerogel.prune.statistics): rounding, unless an index is wrong. In float64.
    """
    pair = _Pair(model, args, kwargs, kept, attributes, seed, torch.float64)
    difference, wrong = pair.compared()
    if wrong is None or not np.isfinite(difference):
        return difference, wrong, 0.0
    first, second = Statistics(), Statistics()
    pair.compared(first, second)
    fixed = changed(first.calls, second.calls)
    if fixed is None:
        return float("inf"), "the code runs other ops once it is cut", difference
    error, wrong = pair.compared(Statistics(fixed), Statistics(fixed))
    return error, wrong and f"{wrong}, with the statistics held fixed", difference


class _Pair:
    """The masked and the cut network, with random inputs, in one precision."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        kept: Kept,
        attributes: Mapping[Key, Any] | None,
        seed: int,
        precision: torch.dtype,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.masked = copied(model).to(precision)
        _randomise(self.masked, generator)
        self.smaller = resize(copied(self.masked), slices(named_weights(self.masked), kept))
        set_attributes(self.smaller, attributes or {})
        for target, tensor in named_weights(self.masked).items():
            for dim, index in enumerate(kept.get(target, ())):
                if index is not None:
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                    gone[index] = False
                    tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
        given = (args, dict(kwargs or {}))
        self.inputs = tree_map(lambda x: _random_like(x, precision, generator), given)

    def compared(
        self,
        around_masked: AbstractContextManager[Any] | None = None,
        around_smaller: AbstractContextManager[Any] | None = None,
    ) -> tuple[float, str | None]:
        """(relative error, what is wrong or None). Raises CutError where the masked network does not run."""
        args, kwargs = copy.deepcopy(self.inputs)  # a network may write into its input
        again, again_named = copy.deepcopy(self.inputs)
        with torch.no_grad(), evaluating(self.masked), evaluating(self.smaller), quiet():
            try:
                with around_masked or nullcontext():
                    whole = self.masked(*args, **kwargs)
            except Exception as failure:
                what = f"{_brief(failure)}; make it take any numbers of the example's shape"
                raise CutError(f"cut: {type(self.masked).__name__} fails on random inputs: {what}") from failure
            try:
                with around_smaller or nullcontext():
                    less = self.smaller(*again, **again_named)
            except Exception as failure:  # the user's own code may fail in any way once sizes change
                return float("inf"), f"forward fails once it is cut: {_brief(failure)}"
        error = _relative_error(tree_leaves(whole), tree_leaves(less))
        wrong = None if error <= TOLERANCE else f"cut and masked outputs differ by {error:.1e} of the output"
        return error, wrong


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name, detached."""
    tensors = [*model.parameters(), *model.buffers()]
    names = tensor_names(model)
    return {names[id(tensor)]: tensor.detach() for tensor in tensors}


def to_tensors(kept: Mapping[str, tuple[np.ndarray | None, ...]]) -> Kept:
    return {t: tuple(None if k is None else torch.from_numpy(k) for k in dims) for t, dims in kept.items()}


def slices(weights: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    return {target: sliced(weights[target], dims) for target, dims in kept.items()}


def copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CutError(
            f"cut: {type(model).__name__} cannot be copied ({error}); remove what deepcopy refuses"
        ) from error


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random norm statistics, scales and biases of the size that they had.

    Fresh ones (all 0 or all 1) and dead channels would hide a wrong index.
    """

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.weight is not None:
                scale = module.weight.detach()
                scale.copy_((scale.abs().mean() or 1.0) * (0.5 + noise(scale)))
            if module.running_mean is not None and module.running_var is not None:
                mean, variance = module.running_mean, module.running_var
                # a mean below the true one keeps most units alive: every layer sends a signal on
                mean.sub_(variance.sqrt() * noise(mean))
                variance.mul_(0.5 + noise(variance))
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and bias is not None:  # noise no larger than the signal that it is added to
            signal = weight.detach().reshape(len(weight), -1).norm(dim=1).mean()
            bias.detach().add_(signal * (noise(bias) - 0.5))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _random_like(x: Any, precision: torch.dtype, generator: torch.Generator) -> Any:
    """Random numbers in the shape of a float tensor; of any other tensor a copy."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x.device, precision)
    return x.clone() if isinstance(x, Tensor) else x


def _relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest |got - expected| / max |expected| over the tensors; for whole numbers the share that differs.

    Infinite where shapes differ, where a number is not finite, and where there is nothing to compare.
    """
    expected, got = ([x for x in leaves if isinstance(x, Tensor)] for leaves in (expected, got))
    if [e.shape for e in expected] != [g.shape for g in got]:
        return float("inf")
    errors = []
    for e, g in zip(expected, got, strict=True):
        if not (e.is_floating_point() or e.is_complex()):
            errors.append((e != g).double().mean().item())
        elif e.numel():
            errors.append(((e - g).abs().max() / e.abs().max().clamp_min(1e-12)).item())
    return max((error if np.isfinite(error) else float("inf") for error in errors), default=float("inf"))
