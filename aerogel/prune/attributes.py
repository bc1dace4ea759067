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
from aerogel.graph.resize import held_numbers, holders
from aerogel.prune.coupling import Coupling

Key = tuple[str, str]  # (module, attribute)
READINGS = 32  # tried at most

_COUNT = re.compile(r"(^|_)(n|num|number)_.*heads?|(^|_)heads?$|n_?heads?$")
_WIDTH = re.compile(r"head_(dim|size|width)|d_kv|d_head|dim_head")
_OUTER = re.compile(r"hidden|embed|model|in_(channels|features|dim)|^dim$|width|channels")
_NEVER = re.compile(
    r"layer|depth|image|window|patch|stride|kernel|padding|dilation|index|idx|_id$|version|max_|vocab|position|num_labels"
)
_UNTOUCHED = re.compile(f"{_NEVER.pattern}|conv|groups")  # of a config, whose numbers stand for many modules


def readings(model: nn.Module, coupling: Coupling, removed: np.ndarray) -> Iterator[dict[Key, Any]]:
    """Every reading of what the attributes become, the likeliest first: {(module, attribute): new value}."""
    constants = changed_constants(coupling, removed)
    sizes = changed_sizes(model, coupling, removed)
    fixed: dict[Key, Any] = {}
    open_: dict[tuple[type, str], dict[Key, list[Any]]] = defaultdict(dict)
    for name, module in model.named_modules():
        wanted, seen = constants.get(name, {}), sizes.get(name, {})
        if not any(old not in new or len(new) > 1 for found in (wanted, seen) for old, new in found.items()):
            continue
        for attribute, value in held_numbers(module).items():
            if _NEVER.search(attribute):
                continue
            options = _options(attribute, value, wanted, seen)
            if len(options) > 1:
                open_[type(module), attribute][name, attribute] = options
            elif options[0] != value:
                fixed[name, attribute] = options[0]
    counts = [range(max(len(options) for options in keys.values())) for keys in open_.values()]
    for choice in itertools.islice(itertools.product(*counts), READINGS):
        found = dict(fixed)
        for number, keys in zip(choice, open_.values(), strict=True):
            found |= {key: options[min(number, len(options) - 1)] for key, options in keys.items()}
        yield found


def _options(attribute: str, value: Any, wanted: Mapping[int, set[int]], seen: Mapping[int, set[int]]) -> list[Any]:
    """What the attribute may be afterwards, the likeliest first."""
    if isinstance(value, list | tuple):
        new = [_options(attribute, v, wanted, seen)[0] for v in value]
        return [type(value)(new)] if type(value) in (list, tuple) else [value]
    if value not in wanted or wanted[value] == {value}:
        sizes = seen.get(value, {value})
        return [next(iter(sizes))] if len(sizes) == 1 and value not in wanted else [value]
    options = sorted(wanted[value] | (seen.get(value, set()) & {value}))
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
    configs = {path.removesuffix("config").rstrip("."): c for path, c in holders(model).items() if _is_config(c)}
    new: dict[str, dict[int, set[int]]] = {path: defaultdict(set) for path in configs}
    for found in (constants, sizes):
        for name, pairs in found.items():
            over = [path for path in configs if not path or name == path or name.startswith(f"{path}.")]
            for old, becomes in pairs.items():
                if over:
                    new[max(over, key=len)][old] |= becomes
    untold: dict[str, str] = {}
    for path, config in configs.items():
        for field, held in held_numbers(config).items():
            becomes = new[path].get(held, set()) if type(held) is int and not _UNTOUCHED.search(field) else set()
            if len(becomes) == 1:
                setattr(config, field, becomes.pop())
            elif len(becomes) > 1 and held not in becomes:
                where = f"{path}.config.{field}".lstrip(".")
                untold[where] = f"what was {held} became {', '.join(map(str, sorted(becomes)))}: it stays {held}"
    return untold


def _is_config(holder: object) -> bool:
    return hasattr(holder, "to_dict") and not isinstance(holder, nn.Module)
