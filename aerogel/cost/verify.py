"""`verify`: a second count of the MACs, made another way, must agree with the first, module by module.

The first, `count`, has one formula for each op of the captured graph. The second never sees that graph: it runs a copy
of the model on PyTorch's meta device, where tensors have shapes and no numbers, under PyTorch's own FlopCounterMode.
There attention, recurrent layers, einsum and the like fall apart into matrix products and convolutions, which
FlopCounterMode counts one by one as they are dispatched. (On a CPU they are single kernels, and it counts them as 0.)
What it lacks has a formula here: products with a vector, nn.Bilinear's, those of experts. The tensors are fake too, as
they are for torch.export: networks that look into a tensor unless they are traced ask for that.

Neither the model nor its weights are touched: the copy's tensors are made on the meta device, tied ones stay tied.
Both count what an op multiplies and adds; element-wise work is the first count's alone and is not verified.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from aerogel.cost.count import Cost, Verified
from aerogel.graph import evaluating
from aerogel.graph.capture import quiet
from aerogel.imports import one_line

Shape = tuple[int, ...]


def verified(cost: Cost, model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Cost:
    """The cost of that call with the second count beside it, in `verified`."""
    return replace(cost, verified=verify(model, args, kwargs, cost))


def verify(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, cost: Cost) -> Verified:
    """Counts `model(*args, **kwargs)` in eval mode a second time and compares it with `cost`, the first.

    Where the model cannot be copied or does not run without numbers, `agrees` is None and `reason` says why.
    """
    try:
        with quiet(), evaluating(model), FakeTensorMode(allow_non_fake_inputs=True):
            theirs = _macs_by_module(_on_meta(model), _on_meta(args), _on_meta(dict(kwargs or {})))
    except Exception as error:  # the user's own code runs here
        return Verified(None, None, {}, f"the model does not run on the meta device: {one_line(error)}")
    first = {id(module): name for name, module in reversed([*model.named_modules(remove_duplicate=False)])}
    alias = {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
    ours: dict[str, int] = {}
    for layer in cost.layers:
        name = alias.get(layer.module, layer.module)
        ours[name] = ours.get(name, 0) + layer.macs
    pairs = {name: (ours.get(name, 0), theirs.get(name, 0)) for name in [*ours, *(theirs.keys() - ours.keys())]}
    differs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return Verified(sum(theirs.values()), not differs, differs)


class _MetaCopies(TorchFunctionMode):
    """Inside, deepcopy gives every tensor a twin on the meta device, one twin for a tensor that is met twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _twin(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _twin(tensor: Tensor) -> Tensor:
    """The same shape, type and strides, and no numbers; nothing is to be trained."""
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


def _on_meta(held: Any) -> Any:
    """A deep copy whose tensors lie on the meta device."""
    memo: dict[int, Any] = {}
    if isinstance(held, nn.Module):
        memo = {id(tensor): _twin(tensor) for tensor in [*held.parameters(), *held.buffers()]}
        with _MetaCopies():
            return copy.deepcopy(held, memo)
    return tree_map(lambda leaf: _twin(leaf) if isinstance(leaf, Tensor) else leaf, held)


def _macs_by_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """MACs of one forward pass, each with the innermost module that was running: the differences of the running total
    as modules begin and end."""
    found: dict[str, int] = {}
    running = [""]
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING)

    def settle() -> None:
        done = sum(found.values())
        found[running[-1]] = found.get(running[-1], 0) + counter.get_total_flops() // 2 - done

    def begin(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            settle()
            running.append(name)

        return hook

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        settle()
        running.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(begin(name), prepend=True)
        module.register_forward_hook(end)
    with torch.no_grad(), _no_fused_attention(), torch.device("meta"), counter:
        model(*args, **kwargs)
    settle()
    return {name: macs for name, macs in found.items() if macs}


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer as the ops they are made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ---------------------------------------------------------------- FLOPs of what FlopCounterMode does not know


def _vector(matrix: Shape, vector: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * math.prod(matrix)


def _added_vector(bias: Shape, matrix: Shape, vector: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * math.prod(matrix)


def _trilinear(
    left: Shape, weight: Shape, right: Shape, expand1: list[int], expand2: list[int], expand3: list[int],
    sumdim: list[int], *_: Any, out_shape: Shape = (), **__: Any,
) -> int:  # fmt: skip
    """sum over i, j of left[n, i] weight[o, i, j] right[n, j]: for each n and o first over j, then over i."""
    outputs, first, second = weight[-3:]
    return 2 * math.prod(left[:-1]) * outputs * (first * second + first)


def _added_batches(bias: Shape, left: Shape, right: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    """(b, n, k) @ (b, k, m), summed over b."""
    return 2 * math.prod(left) * right[-1]


def _affine_grid(theta: Shape, size: list[int], *_: Any, out_shape: Shape = (), **__: Any) -> int:
    """Every point of the grid times theta (n, d, d + 1)."""
    return 2 * math.prod(theta) * math.prod(size[2:])


def _grouped(rows: Shape, weight: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    """Each row times one matrix (.., k, m)."""
    return 2 * math.prod(rows) * weight[-1]


_ATEN = torch.ops.aten
_MISSING = {
    _ATEN.mv: _vector,
    _ATEN.dot: _vector,
    _ATEN.vdot: _vector,
    _ATEN.addmv: _added_vector,
    _ATEN.addbmm: _added_batches,
    _ATEN.affine_grid_generator: _affine_grid,
    _ATEN._trilinear: _trilinear,
    _ATEN._grouped_mm: _grouped,
}
