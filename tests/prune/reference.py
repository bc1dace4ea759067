"""What a cut is held to, computed without anything of aerogel.prune: the whole network with zeros in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aerogel.graph import tensor_names
from aerogel.graph.capture import quiet

Kept = Mapping[str, tuple[Tensor | None, ...]]


def named(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name."""
    names = tensor_names(net)
    return {names[id(t)]: t for t in (*net.parameters(), *net.buffers())}


def composed(first: Kept, then: Kept, ranks: Mapping[str, int]) -> Kept:
    """The indices kept by one cut after another, counted in the whole network."""
    both: dict[str, tuple[Tensor | None, ...]] = {}
    for name in first.keys() | then.keys():
        whole = (None,) * ranks[name]
        pairs = zip(first.get(name, whole), then.get(name, whole), strict=True)
        both[name] = tuple(b if a is None else a if b is None else a[b] for a, b in pairs)
    return both


def masked(net: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the whole network with everything that is not kept set to zero."""
    net = copy.deepcopy(net)
    tensors = named(net)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in enumerate(dims):
                if indices is not None:
                    lost = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                    lost[indices] = False
                    tensors[name].index_fill_(dim, lost.nonzero().flatten(), 0)
    return net


def masked_but_for_norms(net: nn.Module, small: nn.Module, kept: Kept) -> nn.Module:
    """As masked, but layer, group and RMS norms take their statistics over the channels that are kept."""
    net = masked(net, kept)
    for name, module in _norms(net):
        index = kept.get(f"{name}.weight", (None,))[0]
        if index is not None:
            first = isinstance(module, nn.GroupNorm) or getattr(module, "data_format", "") == "channels_first"
            first |= type(module).__name__ == "SqueezeBertLayerNorm"
            module.forward = _over(copy.deepcopy(small.get_submodule(name)), index, 1 if first else -1)
    return net


def _norms(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in net.named_modules():
        kind = type(module).__name__
        if "Norm" in kind and "Batch" not in kind and getattr(module, "weight", None) is not None:
            yield name, module


def _over(norm: nn.Module, index: Tensor, dim: int) -> Any:
    def forward(x: Tensor, *rest: Any) -> Tensor:
        y = norm(x.index_select(dim, index), *rest)
        return torch.zeros(x.shape, dtype=y.dtype).index_copy(dim % x.ndim, index, y)

    return forward


def answers(net: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), quiet():
        return [leaf for leaf in tree_leaves(net.eval()(**inputs)) if isinstance(leaf, Tensor)]


def largest(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest |got - expected| / max |expected|; infinite for shapes that differ."""
    if [e.shape for e in expected] != [g.shape for g in got]:
        return float("inf")
    pairs = [(e.double(), g.double()) for e, g in zip(expected, got, strict=True) if e.numel()]
    return max(((e - g).abs().max() / e.abs().max().clamp_min(1e-12)).item() for e, g in pairs)
