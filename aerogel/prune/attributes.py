"""The numbers that a module's code holds of its own shapes: `num_heads`, `inner_dim`, `split_sizes`, a config's fields.

A cut makes them wrong. Which of them it changes, the graph tells: the constants of a module's views, splits and slices,
before and after, and the sizes of its weights. An attribute that holds a constant that changes is given its new
value; where two numbers of the module are equal before and differ after, or one changes and the other stays, each
reading is tried, and the proof decides. A constant written into the code itself cannot be mended.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from aerogel.graph import Graph, Op, tensor_names
from aerogel.graph.graph import Ref
from aerogel.graph.resize import held_numbers, is_layers_own
from aerogel.prune.coupling import Coupling

Key = tuple[str, str]  # (module, attribute)
READINGS = 32  # tried at most

_COUNT = re.compile(r"(^|_)(n|num|number)_.*heads?|(^|_)heads?$|n_?heads?$")
_WIDTH = re.compile(r"head_(dim|size|width)|d_kv|d_head|dim_head")
_OUTER = re.compile(r"hidden|embed|model|in_(channels|features|dim)|^dim$|width|channels")
_SIZE = re.compile(
    r"head|dim|size|width|channel|feature|hidden|inner|inter|plane|unit|embed|embd|filter|group|expan|split|part|half|"
    r"^d_|^n_|_in$|_out$|^in_|^out_|num_|ff$|^[a-z]$"
)
_NEVER = re.compile(
    r"layer|depth|image|window|patch|stride|kernel|padding|dilation|index|idx|_id$|version|max_|vocab|position|num_labels"
)
_UNTOUCHED = re.compile(
    f"{_NEVER.pattern}|conv|groups|xvector|proj"
)  # of a config, whose numbers stand for many modules


def readings(model: nn.Module, coupling: Coupling, removed: np.ndarray) -> Iterator[dict[Key, Any]]:
    """Every reading of what the attributes become, the likeliest first: {(module, attribute): new value}."""
    constants = changed_constants(coupling, removed)
    sizes = changed_sizes(model, coupling, removed)
    fixed: dict[Key, Any] = layer_numbers(model, coupling, removed)
    open_: dict[tuple[type, str, str], dict[Key, list[Any]]] = defaultdict(dict)  # alike in every layer of a network
    for name, module in model.named_modules():
        wanted, seen = constants.get(name, {}), sizes.get(name, {})
        if not any(old not in new or len(new) > 1 for found in (wanted, seen) for old, new in found.items()):
            continue
        for attribute, value in held_numbers(module).items():
            if _NEVER.search(attribute) or is_layers_own(module, attribute):
                continue
            options = _options(attribute, value, wanted, seen)
            if len(options) > 1:
                open_[type(module), name.rpartition(".")[2], attribute][name, attribute] = options
            elif options[0] != value:
                fixed[name, attribute] = options[0]
    counts = [range(max(len(options) for options in keys.values())) for keys in open_.values()]
    for choice in itertools.islice(itertools.product(*counts), READINGS):
        found = dict(fixed)
        for number, keys in zip(choice, open_.values(), strict=True):
            found |= {key: options[min(number, len(options) - 1)] for key, options in keys.items()}
        yield found


def layer_numbers(model: nn.Module, coupling: Coupling, removed: np.ndarray) -> dict[Key, Any]:
    """Of torch's layers that have no weights to tell by: norms without scales, nn.Unflatten."""
    after = coupling.resized(removed)
    modules = dict(model.named_modules())
    found: dict[Key, Any] = {}
    for op in coupling.graph.ops:
        layer = modules.get(op.module)
        if layer is None or not op.outputs or any(True for _ in layer.parameters(recurse=False)):
            continue
        old, new = coupling.graph.values[op.outputs[0]].shape, after.values[op.outputs[0]].shape
        if old == new:
            continue
        if op.kind in ("batch_norm", "instance_norm") and hasattr(layer, "num_features"):
            found[op.module, "num_features"] = new[1]
        elif op.kind == "group_norm" and isinstance(layer, nn.GroupNorm):
            found[op.module, "num_channels"] = new[1]
            if layer.num_groups > 1:
                found[op.module, "num_groups"] = new[1] * layer.num_groups // old[1]
        elif op.kind == "layer_norm" and isinstance(layer, nn.LayerNorm):
            found[op.module, "normalized_shape"] = tuple(new[len(new) - len(layer.normalized_shape) :])
        elif op.kind == "unflatten" and isinstance(layer, nn.Unflatten) and isinstance(layer.dim, int):
            start = layer.dim % len(coupling.graph.values[op.args[0].name].shape)
            found[op.module, "unflattened_size"] = tuple(new[start : start + len(layer.unflattened_size)])
    return found


def _options(attribute: str, value: Any, wanted: Mapping[int, set[int]], seen: Mapping[int, set[int]]) -> list[Any]:
    """What the attribute may be afterwards, the likeliest first."""
    if isinstance(value, list | tuple):
        new = [_options(attribute, v, wanted, seen)[0] for v in value]
        return [type(value)(new)] if type(value) in (list, tuple) else [value]
    if value not in wanted or wanted[value] == {value}:
        sizes = seen.get(value, {value})
        return [next(iter(sizes))] if len(sizes) == 1 and value not in wanted and _SIZE.search(attribute) else [value]
    options = sorted(
        wanted[value] | (seen.get(value, set()) & {value}) | (set() if _SIZE.search(attribute) else {value})
    )
    outer = _OUTER.search(attribute) and not _COUNT.search(attribute)
    stays = value in options and (_WIDTH.search(attribute) or outer)
    return sorted(options, key=lambda new: (new != value) if stays else (new == value))


def changed_constants(coupling: Coupling, removed: np.ndarray) -> dict[str, dict[int, set[int]]]:
    """{module: {a constant of its code: what it must be after the cut, itself where it stays}}."""
    before, after = coupling.graph, coupling.resized(removed)
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for op in before.ops:
        for old, new in _constants(op, before, after, coupling, removed):
            found[op.module][old].add(new)
    return found


def _constants(
    op: Op, before: Graph, after: Graph, coupling: Coupling, removed: np.ndarray
) -> Iterator[tuple[int, int]]:
    shapes = [(before.values[name].shape, after.values[name].shape) for name in op.outputs]
    if not shapes:
        return
    old_shape, new_shape = shapes[0]
    if op.kind in _SHAPED:
        given = op.args[_SHAPED[op.kind]]
        if isinstance(given, list):
            offset = next((d for d, n in enumerate(old_shape) if list(old_shape[d : d + len(given)]) == given), 0)
            offset = offset if op.kind == "unflatten" else 0
            for d, size in enumerate(given):
                if type(size) is int and size > 0 and d + offset < len(old_shape) and old_shape[d + offset] == size:
                    yield size, new_shape[d + offset]
    elif op.kind in ("split_with_sizes", "split"):
        dim = int(op.args[2]) % len(old_shape)
        for old, new in shapes:
            yield old[dim], new[dim]
    elif op.kind == "slice" and isinstance(op.args[0], Ref):
        dim = int(op.args[1]) % len(old_shape)
        size = before.values[op.args[0].name].shape[dim]
        alive = _alive(coupling, removed, op.args[0].name, dim, size)
        for bound in op.args[2:4]:
            if type(bound) is int and 0 < abs(bound) < size:
                count = int(alive[:bound].sum()) if bound > 0 else int(alive[bound:].sum())
                yield abs(bound), count


_SHAPED = {"view": 1, "reshape": 1, "_unsafe_view": 1, "unflatten": 2, "expand": 1, "zeros": 0, "ones": 0, "full": 0,
           "new_zeros": 1, "new_ones": 1, "new_full": 1, "empty": 0}  # fmt: skip


def _alive(coupling: Coupling, removed: np.ndarray, name: str, dim: int, size: int) -> np.ndarray:
    """Which indices of a value's dimension are left."""
    alive = np.ones(size, bool)
    for field in coupling.values.get(name, ()):
        if field.shape[dim] > 1:
            gone = removed[field] & (field >= 0)
            alive &= ~gone.all(axis=tuple(d for d in range(field.ndim) if d != dim))
    return alive


def changed_sizes(model: nn.Module, coupling: Coupling, removed: np.ndarray) -> dict[str, dict[int, set[int]]]:
    """{module: {a size of its own or its children's weights, or of a view that it leaves open: what it becomes}}."""
    kept = coupling.kept(removed)
    names = tensor_names(model)
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, module in model.named_modules():
        own: list[Tensor] = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
        for tensor in own:
            target = names[id(tensor)]
            dims = kept.get(target, (None,) * tensor.ndim)
            for size, index in zip(tensor.shape[:2], dims, strict=False):
                new = size if index is None else len(index)
                found[name][size].add(new)
                if name:
                    found[name.rpartition(".")[0]][size].add(new)
    before, after = coupling.graph, coupling.resized(removed)
    for op in before.ops:
        given = op.args[_SHAPED[op.kind]] if op.kind in _SHAPED else None
        if isinstance(given, list) and -1 in given and op.kind != "expand" and op.outputs:
            d = given.index(-1)
            shape = before.values[op.outputs[0]].shape
            if len(shape) == len(given):
                found[op.module][shape[d]].add(after.values[op.outputs[0]].shape[d])
    return found


def set_attributes(model: nn.Module, values: Mapping[Key, Any]) -> None:
    """Gives the modules the numbers of a reading, in place."""
    for (name, attribute), value in values.items():
        setattr(model.get_submodule(name), attribute, value)


def follow_in_config(model: nn.Module, original: nn.Module, coupling: Coupling, removed: np.ndarray) -> dict[str, str]:
    """Fields of Hugging Face configs take the new value, in place, where all modules under them agree on it.

    Returns {field: why it keeps the old one}.
    """
    constants, sizes = changed_constants(coupling, removed), changed_sizes(original, coupling, removed)
    modules = dict(original.named_modules())
    over: dict[int, list[str]] = defaultdict(list)  # where each config stands
    for path, module in model.named_modules():
        if _is_config(vars(module).get("config")):
            over[id(module.config)].append(path)
    nearest: dict[str, int] = {}
    for path in modules:
        under = [
            (len(p), c) for c, paths in over.items() for p in paths if not p or path == p or path.startswith(f"{p}.")
        ]
        if under:
            nearest[path] = max(under)[1]
    new: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    named: dict[int, dict[tuple[str, int], set[int]]] = defaultdict(lambda: defaultdict(set))
    for found in (constants, sizes):
        for path, pairs in found.items():
            for old, becomes in pairs.items():
                if path in nearest:
                    new[nearest[path]][old] |= becomes
    for path, module in model.named_modules():
        for attribute, value in held_numbers(modules[path]).items():
            if path in nearest and type(value) is int:
                named[nearest[path]][attribute, value].add(getattr(module, attribute))
    untold: dict[str, str] = {}
    for number, paths in over.items():
        config = model.get_submodule(paths[0]).config
        for field, held in held_numbers(config).items():
            where = f"{paths[0]}.config.{field}".lstrip(".")
            if _UNTOUCHED.search(field) or not _SIZE.search(field):
                continue
            if type(held) is not int:
                moved = [n for n in held if new[number].get(n, {n}) != {n}]
                if moved:
                    untold[where] = f"holds several sizes, of which {moved[0]} changed: it stays {list(held)}"
                continue
            becomes = named[number].get((field, held)) or new[number].get(held, {held})
            if len(becomes) == 1:
                (value,) = becomes
                setattr(config, field, value)
            else:
                untold[where] = f"what was {held} became {', '.join(map(str, sorted(becomes)))}: it stays {held}"
    return untold


def _is_config(holder: object) -> bool:
    return hasattr(holder, "to_dict") and not isinstance(holder, nn.Module)
