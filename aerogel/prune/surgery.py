"""What training holds beside the weights is cut along with them, so that it goes on where it was.

    made = cut(net, (x,), target={"macs": 0.8})
    made.apply_to(optimizer, average)
    net = made.model

An optimizer's memory (momentum; Adam's two moments) has one number for every number of a weight: it keeps the same
indices as the weight. Its step counts stay. Parameter groups keep their places and settings, so that a scheduler,
which holds the optimizer, goes on. Another network of the same weights (an average of them, AveragedModel) is cut
itself. With the removed weights held at zero in the one network, further steps of both are the same numbers: momentum,
weight decay and Adam treat every number by itself. What does not (Adafactor's means over rows, L-BFGS's history)
is refused, not guessed at.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from aerogel.errors import CutError
from aerogel.graph import tensor_names
from aerogel.graph.resize import changed_numbers, resize, set_numbers, sliced
from aerogel.prune.proof import Kept, named_weights, slices


@dataclass(frozen=True)
class Origin:
    """The network before a cut, as far as surgery must know it, without keeping it alive.

    parameters: {name: its parameter, weakly}. shapes: of every parameter and buffer. numbers: those that its modules
    hold of shapes and that the cut changed (`aerogel.graph.resize.changed_numbers`).
    """

    parameters: Mapping[str, weakref.ref[nn.Parameter]]
    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Origin], tuple[Any, ...]]:
        """In another process none of them is alive."""
        return Origin, ({}, self.shapes, self.numbers)


def origin_of(model: nn.Module, cut: nn.Module | None = None) -> Origin:
    """cut: what became of it; None for one that is only compared."""
    names = tensor_names(model)
    parameters = {names[id(p)]: weakref.ref(p) for p in model.parameters()}
    return Origin(parameters, {name: tuple(t.shape) for name, t in named_weights(model).items()},
                  changed_numbers(model, cut) if cut is not None else {})  # fmt: skip


def apply_to(origin: Origin, model: nn.Module, kept: Kept, *holders: Optimizer | nn.Module) -> None:
    """Cuts optimizers, and other networks of the weights before the cut, in place. All of them or, on an error, none.

    model: the cut network, whose parameters an optimizer then trains; gradients not yet used go along.
    Raises CutError naming what is neither of the two, has nothing of the network before the cut, or keeps a memory
    that is not one number a weight.
    """
    if not holders:
        raise CutError("apply_to: give what is to be cut along: an optimizer, an average of the weights")
    for holder in holders:
        _check(origin, holder)
    for holder in holders:
        if isinstance(holder, Optimizer):
            _repoint(holder, origin, model, kept)
        else:
            network = _plain(holder)
            resize(network, slices(named_weights(network), kept))
            set_numbers(network, origin.numbers)


def _check(origin: Origin, holder: Any) -> None:
    """Raises CutError unless `holder` can be cut along."""
    kind = type(holder).__name__
    if isinstance(holder, nn.parallel.DistributedDataParallel):
        raise CutError(f"apply_to: {kind} holds buffers of the old shapes; wrap the cut network in a new one")
    if isinstance(holder, Optimizer):
        _check_optimizer(origin, holder)
    elif isinstance(holder, nn.Module):
        _check_network(origin, holder)
    else:
        raise CutError(
            f"apply_to: takes optimizers and networks of the weights, got {kind}; "
            "a scheduler needs nothing, it holds the optimizer"
        )


def _check_optimizer(origin: Origin, optimizer: Optimizer) -> None:
    kind, old = type(optimizer).__name__, _old(origin)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in old for p in held):
        raise CutError(
            f"apply_to: {kind} holds no parameter of the network that was cut; was it made for another network, or "
            "cut along already?"
        )
    for parameter in held:
        name = old.get(id(parameter))
        for entry, value in optimizer.state.get(parameter, {}).items() if name else ():
            if not (_is_count(value) or (isinstance(value, Tensor) and value.shape == parameter.shape)):
                shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise CutError(
                    f"apply_to: {kind} keeps {entry!r} for {name}, {shape}, which is not one number a weight; "
                    "make a new optimizer of the cut network's parameters"
                )


def _check_network(origin: Origin, holder: nn.Module) -> None:
    shapes = origin_of(_plain(holder)).shapes
    for name, shape in origin.shapes.items():
        if shapes.get(name) != shape:
            found = f"of shape {shapes[name]}" if name in shapes else "absent"
            raise CutError(
                f"apply_to: {type(holder).__name__} is no copy of the network that was cut: {name} must be of shape "
                f"{shape}, is {found}; give a copy made before the cut"
            )


def _old(origin: Origin) -> dict[int, str]:
    """id -> name of the parameters before the cut that anything still holds."""
    alive = {name: ref() for name, ref in origin.parameters.items()}
    return {id(parameter): name for name, parameter in alive.items() if parameter is not None}


def _is_count(value: Any) -> bool:
    """A step count, a setting: nothing that has an index to lose."""
    return value.ndim == 0 if isinstance(value, Tensor) else not isinstance(value, list | tuple | dict)


def _repoint(optimizer: Optimizer, origin: Origin, model: nn.Module, kept: Kept) -> None:
    """The optimizer trains the cut network's parameters, with the memory that belongs to them."""
    names, new = _old(origin), {name: model.get_parameter(name) for name in origin.parameters}
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                continue  # the objective's own, another network's
            name = names[id(parameter)]
            dims = kept.get(name, ())
            group["params"][place] = new[name]
            if parameter.grad is not None and new[name].grad is None:
                new[name].grad = sliced(parameter.grad, dims)
            if parameter in optimizer.state:
                memory = optimizer.state.pop(parameter)
                optimizer.state[new[name]] = {entry: _kept_of(value, dims) for entry, value in memory.items()}


def _kept_of(value: Any, dims: tuple[Tensor | None, ...]) -> Any:
    return sliced(value, dims) if isinstance(value, Tensor) and value.ndim else value


def _plain(holder: nn.Module) -> nn.Module:
    """The network itself, inside an average of its weights."""
    return holder.module if isinstance(holder, AveragedModel) else holder
