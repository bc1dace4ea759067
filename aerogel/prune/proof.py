"""The proof of a cut: the cut network against the masked one.

On random inputs, norm statistics and biases, the output of the cut network equals that of the whole network with the
same indices set to zero: |cut - masked| <= 1e-4 x |output| in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

from aerogel.errors import CutError
from aerogel.graph import evaluating, tensor_names
from aerogel.graph.capture import quiet
from aerogel.graph.resize import resize, sliced
from aerogel.prune.attributes import Key, set_attributes
from aerogel.prune.statistics import Statistics, changed

TOLERANCE = 1e-4
MANY = 16  # numbers of an index whose largest tells its size
SMALL = 1e-2  # of the usual size: smaller weights would hide what goes through them
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
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
    error, wrong, _ = prove_any(model, args, kwargs, kept, [dict(attributes or {})], seed)
    return error, wrong


def prove_any(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    kept: Kept,
    readings: Iterable[dict[Key, Any]],
    seed: int = 0,
) -> tuple[float, str | None, dict[Key, Any]]:
    """(error, wrong, attributes): the first of several readings of the numbers with which nothing is wrong.

    Where none is, the first of all. They are alike in which numbers they name.
    """
    pair = _Pair(model, args, kwargs, kept, seed, torch.float32)
    finer: _Pair | None = None
    first: tuple[float, str | None, dict[Key, Any]] | None = None
    for attributes in readings:
        error, wrong = pair.proven(attributes)
        if wrong and np.isfinite(error):
            with contextlib.suppress(CutError):  # code that insists on float32 has had its verdict
                finer = finer or _Pair(model, args, kwargs, kept, seed, torch.float64)
                again, still_wrong = finer.proven(attributes)
                error, wrong = (again, None) if not still_wrong else (error, wrong)
        if wrong is None:
            return error, None, attributes
        first = first or (error, wrong, attributes)
    assert first is not None
    return first


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
    pair = _Pair(model, args, kwargs, kept, seed, torch.float64)
    set_attributes(pair.smaller, attributes or {})
    difference, wrong = pair.compared()
    if wrong is None or not np.isfinite(difference):
        return difference, wrong, 0.0
    first, second = Statistics(), Statistics()
    pair.compared(first, second)
    fixed = changed(first.calls, second.calls)
    if fixed is None:
        return float("inf"), "the code runs other ops once it is cut", difference
    error, wrong = pair.compared(Statistics(fixed), Statistics(fixed))
    if wrong is None:
        return error, pair.in_training(), difference
    return error, f"{wrong}, with the statistics held fixed", difference


class _Pair:
    """The masked and the cut network, with random inputs, in one precision."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        kept: Kept,
        seed: int,
        precision: torch.dtype,
    ) -> None:
        self._whole: Any = None  # what the masked network answers
        generator = torch.Generator().manual_seed(seed)
        self.masked = copied(model).to(precision)
        _randomise(self.masked, generator)
        self.smaller = resize(copied(self.masked, besides=kept), slices(named_weights(self.masked), kept))
        for target, tensor in named_weights(self.masked).items():
            for dim, index in enumerate(kept.get(target, ())):
                if index is not None:
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                    gone[index] = False
                    tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
        rows = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
        given = (args, dict(kwargs or {}))
        self.inputs = tree_map_with_path(
            lambda path, x: _random_like(x, precision, generator, 1 if "mask" in keystr(path) else rows), given
        )

    def proven(self, attributes: Mapping[Key, Any]) -> tuple[float, str | None]:
        """(relative error, what is wrong or None) with these numbers in the cut network, in use and in training."""
        set_attributes(self.smaller, attributes)
        error, wrong = self.compared()
        wrong = wrong or self.in_training()
        return (error, None) if wrong is None else (error if error > TOLERANCE else float("inf"), wrong)

    def compared(
        self,
        around_masked: AbstractContextManager[Any] | None = None,
        around_smaller: AbstractContextManager[Any] | None = None,
    ) -> tuple[float, str | None]:
        """(relative error, what is wrong or None). Raises CutError where the masked network does not run."""
        args, kwargs = copy.deepcopy(self.inputs)  # a network may write into its input
        again, again_named = copy.deepcopy(self.inputs)
        with torch.no_grad(), evaluating(self.masked), evaluating(self.smaller), quiet(), _plainly():
            try:
                with around_masked or nullcontext():
                    whole = (
                        self._whole
                        if self._whole is not None and around_masked is None
                        else self.masked(*args, **kwargs)
                    )
                if around_masked is None:
                    self._whole = whole
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

    def in_training(self) -> str | None:
        """Why the cut network fails in training mode where the whole one does not: it takes another branch there."""
        failed = self._failure_in_training(self.smaller)
        if failed is None or self._failure_in_training(self.masked) is not None:  # or neither trains on such inputs
            return None
        return f"in training, which takes other branches, forward fails once it is cut: {failed}"

    def _failure_in_training(self, network: nn.Module) -> str | None:
        args, kwargs = copy.deepcopy(self.inputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), _plainly():
            try:
                network.train()(*args, **kwargs)
            except Exception as failure:
                return _brief(failure)
        return None


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Without the fused path of nn.TransformerEncoderLayer, which other sizes than the whole network's do not take."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name, detached."""
    tensors = [*model.parameters(), *model.buffers()]
    names = tensor_names(model)
    return {names[id(tensor)]: tensor.detach() for tensor in tensors}


def to_tensors(kept: Mapping[str, tuple[np.ndarray | None, ...]]) -> Kept:
    return {t: tuple(None if k is None else torch.from_numpy(k) for k in dims) for t, dims in kept.items()}


def slices(weights: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    return {target: sliced(weights[target], dims) for target, dims in kept.items()}


def copied(model: nn.Module, besides: Container[str] = ()) -> nn.Module:
    """A deep copy. besides: weights that the copy shares, because they are about to be replaced in it."""
    names = tensor_names(model)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if names[id(t)] in besides}
    try:
        return copy.deepcopy(model, shared)
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
            mean, variance = module.running_mean, module.running_var
            if mean is not None and variance is not None:
                # a mean below the true one keeps most units alive: every layer sends a signal on
                mean.sub_(variance.sqrt() * noise(mean))
                variance.mul_(0.5 + noise(variance))
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and bias is not None:  # noise no larger than the signal that it is added to
            signal = weight.detach().reshape(len(weight), -1).norm(dim=1).mean()
            bias.detach().add_(signal * (noise(bias) - 0.5))
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        numbers = parameter.detach()
        if not numbers.is_floating_point() or numbers.numel() == 0:
            continue
        size, inputs = float(numbers.norm(1)) / numbers.numel(), numbers.numel() // len(numbers) if numbers.ndim else 1
        if numbers.numel() > max(numbers.shape, default=1):
            if size < SMALL * inputs**-0.5:  # a branch that begins at nothing
                numbers.copy_((noise(numbers) - 0.5) * (12 / inputs) ** 0.5)
        elif "bias" in name:
            numbers.add_(SMALL * (noise(numbers) - 0.5))
        elif size < SMALL or id(parameter) in norms:
            numbers.copy_((size if size >= SMALL else 1.0) * (0.5 + noise(numbers)))
        else:
            numbers.mul_(0.5 + noise(numbers))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _random_like(x: Any, precision: torch.dtype, generator: torch.Generator, rows: int) -> Any:
    """Random numbers in the shape of a float tensor; of whole numbers those of the example in another order.

    Where these are all the same, numbers of the rows of a table, of which the smallest has so many.
    """
    if not isinstance(x, Tensor):
        return x
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x.device, precision)
    if x.dtype == torch.bool or x.numel() < 2 or rows < 2:
        return x.clone()
    if (x == x.flatten()[0]).all():
        return torch.randint(0, rows, x.shape, generator=generator).to(x)
    return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(x.shape)


def _relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest relative difference over the tensors' channels; for whole numbers the share that differs.

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
            e, off = (x.reshape(1) if x.ndim == 0 else x for x in (e.abs(), (e - g).abs()))
            errors += [_by_index(e, off, d) for d in {min(1, e.ndim - 1), e.ndim - 1}]
    return max((error if np.isfinite(error) else float("inf") for error in errors), default=float("inf"))


def _by_index(sizes: Tensor, off: Tensor, dim: int) -> float:
    """The largest difference over the largest number of the same index: small channels count as much as large ones.

    A millionth of the largest number is as good as none. In single precision it takes MANY numbers to say that an index
    gives little: one logit of a thousand is near 0 by chance, and its rounding is not.
    """
    few = sizes.numel() < MANY * sizes.shape[dim] and sizes.dtype != torch.float64
    floor = 1e-2 if few else 1e-6
    sizes, off = (x.movedim(dim, 0).flatten(1).amax(1) for x in (sizes, off))
    return (off / sizes.clamp_min(max(floor * sizes.amax().item(), 1e-12))).amax().item()
