"""What data says of a network's channels, gathered in one pass: gradients, curvature, activations.

    evidence = gather(model, batches)                      # batches: (inputs, labels), a few dozen
    cut(model, args, target=..., criterion=criterion("taylor", evidence=evidence))

Everything is kept by index of a weight's dimension, {(weight, dimension): (.., size)}, as coupling keeps its labels, so
that evidence holds whatever the groups are:
gradients  (batches, size)  sum of g w over the slice, g the gradient of the batch's loss
curvature  (size,)          sum of h w^2 / 2 over the slice, h the Gauss-Newton diagonal (see criteria/hessian.py)
zeros      (size,)          for a dimension that runs over a layer's inputs: the share of them that is 0
sizes      (size,)          the same: the mean of their absolute value
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from aerogel.errors import CutError, nearest
from aerogel.graph import evaluating, tensor_names
from aerogel.prune.coupling import Dim, Group, Member

KINDS = ("gradients", "curvature", "activations")
Loss = Callable[[Any, Any], Tensor]
Draw = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class Evidence:
    """See the head of this file. batches: how many were seen; 0 before `gather`."""

    batches: int = 0
    gradients: dict[Dim, Tensor] = field(default_factory=dict)
    curvature: dict[Dim, Tensor] = field(default_factory=dict)
    zeros: dict[Dim, Tensor] = field(default_factory=dict)
    sizes: dict[Dim, Tensor] = field(default_factory=dict)


def gather(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    *,
    loss: Loss = F.cross_entropy,
    draw: Draw | None = None,
    kinds: Iterable[str] = KINDS,
    seed: int = 0,
) -> Evidence:
    """One forward pass a batch, in eval mode, and a backward pass each for gradients and curvature.

    batches: (inputs, labels); inputs are a tensor, a tuple of positional or a dict of keyword inputs; tensors are moved
    to the network's device. loss(outputs, labels): the batch's mean. draw(outputs, generator): labels that the network
    itself would give, one for each term of the mean, for the curvature; of the loss cross_entropy it is known, with
    another loss and no draw there is no curvature. kinds: of gradients, curvature, activations those wanted; only
    gradients look at the labels. The network is left as it was: weights, buffers, gradients, modes.
    Raises CutError for no batch, an unknown kind, or a loss that is not one finite number.
    """
    kinds = set([kinds] if isinstance(kinds, str) else kinds)
    for kind in sorted(kinds - {*KINDS}):
        raise CutError(f"gather: kind {kind!r} is unknown; {nearest(kind, KINDS)}")
    draw = draw_classes if draw is None and loss is F.cross_entropy else draw
    sums = _Sums(model)
    generator = torch.Generator().manual_seed(seed)
    with _differentiable(model) as weights, evaluating(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
        for inputs, labels, *_ in batches:
            inputs, labels = (_on(sums.device, x) for x in (inputs, labels))
            with sums if "activations" in kinds else contextlib.nullcontext():
                outputs = _answer(model, inputs)
            if loss is F.cross_entropy and kinds != {"activations"}:
                _check_logits(outputs)
            if "gradients" in kinds:
                sums.gradients(weights, _loss(loss, outputs, labels), keep="curvature" in kinds and draw is not None)
            if "curvature" in kinds and draw is not None:
                drawn = draw(_detached(outputs), generator)
                sums.curvature(weights, _loss(loss, outputs, drawn), _terms(drawn))
            sums.batches += 1
    if not sums.batches:
        raise CutError("gather: batches must hold at least one (inputs, labels), got none; a generator serves once")
    return sums.evidence()


def draw_classes(logits: Any, generator: torch.Generator) -> Tensor:
    """One class for each softmax: logits (N, C, ...) -> (N, ...)."""
    chances = logits.float().movedim(1, -1).softmax(-1)
    flat = torch.multinomial(chances.reshape(-1, chances.shape[-1]).cpu(), 1, generator=generator)
    return flat.view(chances.shape[:-1]).to(logits.device)


def held(
    evidence: Evidence | None, kind: str, group: Group, weights: Mapping[str, Tensor]
) -> Iterator[tuple[Member, Tensor]]:
    """(member, what is known of it (.., size)) for the members that evidence of this kind speaks of.

    Raises CutError without evidence, where there is none of the group, and for that of a network of another width.
    """
    known: dict[Dim, Tensor] = getattr(check_evidence(evidence, kind), kind)
    members = [member for member in group.members if (member.target, member.dim) in known]
    if not members:
        raise CutError(f"cut: group {group.name}: {_SILENT[kind]}; use criterion='l2' or protect the group")
    for member in members:
        found, size = known[member.target, member.dim], weights[member.target].shape[member.dim]
        if found.shape[-1] != size:
            raise CutError(
                f"cut: evidence of {member.target} is of {found.shape[-1]} channels, the network has {size}; "
                "gather it again after a cut"
            )
        yield member, found


_SILENT = {
    "gradients": "no gradient reaches its weights",
    "curvature": "no gradient reaches its weights",
    "zeros": "no convolution or linear layer reads its activations",
    "sizes": "no convolution or linear layer reads its activations",
}


def check_evidence(evidence: Evidence | None, kind: str, criterion: str | None = None) -> Evidence:
    """Raises CutError unless there is evidence of that kind."""
    who = f"criterion {criterion!r}" if criterion else "the criterion"
    if evidence is None:
        name = criterion or "taylor"
        raise CutError(
            f"cut: {who} needs to see data; pass criterion({name!r}, evidence=gather(model, batches)) of aerogel.prune"
        )
    if not getattr(evidence, kind):
        wanted = "activations" if kind in ("zeros", "sizes") else kind
        more = ", and with a loss of your own pass draw=" if kind == "curvature" else ""
        raise CutError(f"cut: {who} needs {wanted}, which were not gathered; name them in gather(kinds=...){more}")
    return evidence


class _Sums(TorchDispatchMode):
    """Adds up what batches say. As a dispatch mode it sees what every convolution and matrix product reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.batches = 0
        self.device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        names = tensor_names(model)
        self._by_memory = {p.data_ptr(): (names[id(p)], p) for p in model.parameters() if p.numel()}
        self._contributions: dict[Dim, list[Tensor]] = {}
        self._saliency: dict[Dim, Any] = {}
        self._seen: dict[Dim, Any] = {}  # (zeros, absolute values, how many each)

    def gradients(self, weights: dict[str, Tensor], loss: Tensor, keep: bool) -> None:
        for key, by_index in _by_index(weights, _gradients(weights, loss, keep), lambda g, w: g * w):
            self._contributions.setdefault(key, []).append(by_index)

    def curvature(self, weights: dict[str, Tensor], loss: Tensor, terms: int) -> None:
        found = _gradients(weights, loss, keep=False)
        for key, by_index in _by_index(weights, found, lambda g, w: 0.5 * terms * (g * w).square()):
            self._saliency[key] = self._saliency.get(key, 0) + by_index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet == _ATEN.convolution:
            self._read(args[0], args[1], 0 if args[6] else 1)  # transposed
        elif packet in _PRODUCTS:
            x, by = args[_PRODUCTS[packet] :][:2]
            self._read(x, by, None)
        return out

    def _read(self, x: Tensor, by: Tensor, dim: int | None) -> None:
        """x runs into a layer: a convolution's (N, I, ...) or a product's (rows, I). by: its weight, or a view of it.

        dim: the weight's dimension that runs over I; of a product it is told by the strides. Groups of a convolution
        share its indices and are averaged.
        """
        name, weight = self._by_memory.get(by.data_ptr(), ("", by))
        if not name or weight.ndim < 2:
            return
        if dim is None:
            dim = 0 if by.stride() == weight.stride() else 1
        size, channels = weight.shape[dim], x.shape[1]
        if channels % size:  # a part of a weight
            return
        values = x.detach().transpose(0, 1).reshape(channels // size, size, -1)
        zeros, total, count = self._seen.get((name, dim), (0, 0, 0))
        zeros = zeros + (values == 0).sum((0, 2))
        total = total + values.abs().sum((0, 2), dtype=torch.float64)
        self._seen[name, dim] = zeros, total, count + values.numel() // size

    def evidence(self) -> Evidence:
        return Evidence(
            self.batches,
            {key: torch.stack(found) for key, found in self._contributions.items()},
            {key: total / self.batches for key, total in self._saliency.items()},
            {key: (zeros / count).float() for key, (zeros, _, count) in self._seen.items()},
            {key: (total / count).float() for key, (_, total, count) in self._seen.items()},
        )


_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.addmm: 1}  # the position of what is read; the weight is the next argument


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{name: weight} of all that has a gradient, frozen weights too; flags and buffers are put back outside."""
    names = tensor_names(model)
    weights: dict[str, Tensor] = {names[id(p)]: p for p in model.parameters() if p.is_floating_point()}
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield weights
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _by_index(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], of: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Dim, Tensor]]:
    """For every dimension of every weight, `of` its gradient and itself, summed over all other dimensions."""
    for name, gradient in gradients.items():
        each = of(gradient.float(), weights[name].detach().float())
        for dim in range(each.ndim):
            others = [d for d in range(each.ndim) if d != dim]
            yield (name, dim), each.sum(others) if others else each


def _gradients(weights: Mapping[str, Tensor], loss: Tensor, keep: bool) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=keep, allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def _answer(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _check_logits(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise CutError(
            f"gather: the network returns a {type(outputs).__name__}, which cross_entropy cannot read; "
            "pass loss=lambda outputs, labels: ..., and draw= for the curvature"
        )


def _loss(loss: Loss, outputs: Any, labels: Any) -> Tensor:
    value = loss(outputs, labels)
    if not isinstance(value, Tensor) or value.ndim or not value.isfinite():
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim else repr(value)
        raise CutError(f"gather: loss must be one finite number, got {shown}; take its mean, check the inputs")
    return value


def _terms(labels: Any) -> int:
    """Of how many terms a loss of these labels is the mean. It scales all channels alike."""
    return labels.numel() if isinstance(labels, Tensor) else 1


def _detached(outputs: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


def _on(device: torch.device, x: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)
