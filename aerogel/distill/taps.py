"""Features by the name of their module, from any nn.Module:

    with Taps(model, ["features.3", "encoder.layer.0[0]"]) as taps:
        out = model(x)
    taps["features.3"]

A name is that of `named_modules()`; "[i]" picks one tensor of a tuple, list or mapping that a module gives. Wrappers of
DistributedDataParallel and torch.compile are looked through. Nothing stays in the model, but for a compiled one: it
does not look again at hooks after it was compiled, so they stay, idle, as long as it lives (`taps_of`).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aerogel.errors import AerogelError, nearest

_NAME = re.compile(r"(?P<module>.*?)(\[(?P<index>-?\d+|\w+)\])?")
_COMPILED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Taps]] = weakref.WeakKeyDictionary()


def bare(model: nn.Module) -> nn.Module:
    """The network inside what DistributedDataParallel and torch.compile put around it."""
    return _layers(model)[-1]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The wrappers, and last the network."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return [model, *_layers(model.module)]
    if isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        return [model, *_layers(inner)]
    return [model]


class Taps:
    """What the named modules gave in the one forward pass inside `with`. Gradients flow.

    Raises AerogelError for a name that is no module's (with the nearest ones) or given twice; on leaving, for a tap
    that did not fire, or more than once; on reading, for an output that is no tensor, or that was
    changed later.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(bare(model).named_modules())
        if len(set(names)) != len(names):
            raise AerogelError(f"Taps: names must differ, got {list(names)}; give each once")
        self.model, self.names = type(bare(model)).__name__, list(names)
        self._where = {name: _parsed(name, modules) for name in names}
        self._modules = {self._where[name][0]: modules[self._where[name][0]] for name in names}
        self._found: dict[str, list[Any]] = {}
        self._on = False
        self._handles: list[RemovableHandle] = []
        self._stay = False

    def __enter__(self) -> Taps:
        self._found.clear()
        self._on = True
        if not self._handles:
            self._handles = [module.register_forward_hook(_Hook(self, name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._on = False
        if not self._stay:
            self.remove()
        if kind is None:
            self._check_fired()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise AerogelError(f"Taps: {name!r} is not tapped; {nearest(name, self.names)}")
        module, index = self._where[name]
        output, versions = self._found[module][0]
        tensor = _picked(name, output, index)
        if versions is not None and versions.get(id(tensor), tensor._version) != tensor._version:
            raise AerogelError(
                f"Taps: what {name!r} gave was changed in place by a later module, an activation with inplace=True "
                "perhaps; tap that one, or set inplace=False"
            )
        return tensor

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_fired(self) -> None:
        for name, (module, _) in self._where.items():
            times = len(self._found.get(module, ()))
            if times == 0:
                raise AerogelError(
                    f"Taps: {name!r} of {self.model} did not fire: the forward pass never calls this module; tap one "
                    "that it calls"
                )
            if times > 1:
                raise AerogelError(
                    f"Taps: {name!r} of {self.model} fired {times} times in one forward pass, so which output is meant "
                    "is unknown; tap a module that is called once, the one after it perhaps"
                )


class _Hook:
    """Notes what a module gives while its taps are open."""

    def __init__(self, taps: Taps, name: str) -> None:
        self.taps, self.name = taps, name

    def __call__(self, module: nn.Module, args: object, output: Any) -> None:
        if self.taps._on:
            # inside a compiled graph nothing is changed in place
            versions = None if torch.compiler.is_compiling() else _versions(output)
            self.taps._found.setdefault(self.name, []).append((output, versions))


def taps_of(model: nn.Module, names: Sequence[str]) -> Taps:
    """Taps to open again and again: the same ones for a compiled model as long as it lives, else new ones."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in _layers(model))
    if not compiled:
        return Taps(model, names)
    held = _COMPILED.setdefault(model, {})
    if tuple(names) not in held:
        taps = held[tuple(names)] = Taps(model, names)
        taps._stay = True
        weakref.finalize(model, taps.remove)
    return held[tuple(names)]


def _parsed(name: str, modules: dict[str, nn.Module]) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    module = match["module"] if match else name
    if module not in modules or not module:
        raise AerogelError(f"Taps: {module!r} is no module of the network; {nearest(module, filter(None, modules))}")
    return module, match["index"] if match else None


def _versions(output: Any) -> dict[int, int]:
    """How often each tensor was changed in place so far."""
    if isinstance(output, Tensor):
        return {id(output): output._version}
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return {id(part): part._version for part in parts if isinstance(part, Tensor)}


def _picked(name: str, output: Any, index: str | None) -> Tensor:
    """The tensor meant. Raises AerogelError where it is not told which, or there is none."""
    module = name.partition("[")[0]
    if index is None:
        if isinstance(output, Tensor):
            return output
        raise AerogelError(
            f"Taps: {name!r} gives a {type(output).__name__}, not a tensor; say which part is meant: "
            f"{module + '[0]'!r} is the first"
        )
    try:
        picked = output[index] if isinstance(output, Mapping) and index in output else tuple(_parts(output))[int(index)]
    except (IndexError, KeyError, TypeError, ValueError):
        picked = None
    if not isinstance(picked, Tensor) or isinstance(output, Tensor):
        raise AerogelError(
            f"Taps: {name!r} must be a tensor in a tuple, list or mapping, but {module!r} gives a "
            f"{type(output).__name__}{'' if isinstance(output, Tensor) else ' without it'}; "
            f"{'leave the index out' if isinstance(output, Tensor) else 'take another index'}"
        )
    return picked


def _parts(output: Any) -> Any:
    return output.values() if isinstance(output, Mapping) else output
