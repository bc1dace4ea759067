"""Masks: which single weights survive. A small object that the training loop holds weights to; no parametrisation.

Han, Pool, Tran, Dally 2015, "Learning both weights and connections for efficient neural networks", arXiv:1506.02626,
section 3: prune connections, then retrain the ones that are left.

A parametrisation (w = mask * w_0) would change the names of the weights, what is saved, what `capture` reads and what
an optimizer decays. Held from outside the network stays an ordinary one, compiled, under AMP, shared between processes:
1. the gradient of a pruned weight is set to 0 before it is clipped, and its memory in the optimizer is 0 from the
   start, so that neither momentum nor weight decay moves it;
2. after every optimizer step it is set to 0 all the same: what an optimizer does is not ours to know.
A pruned weight is +0.0 exactly. Made permanent it needs no mask: the zeros say which they are (`Masks.of`), so that
pruning a pruned network again, or one read back from a file, is cumulative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError, nearest
from aerogel.train import State


def prunable(model: nn.Module, layers: Sequence[str] = ("*",), protect: Sequence[str] = ()) -> dict[str, Tensor]:
    """{name: weight} of what can be pruned: parameters of two or more dimensions (no biases, no norms), tied ones once.

    layers, protect: patterns of weights or of modules they stand in: "features.fc1", "*.weight", "classifier".
    Raises AerogelError for a pattern that names none, and when nothing is left.
    """
    known = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1 and weight.numel()}
    chosen = {name for pattern in layers for name in _named(pattern, known)}
    chosen -= {name for pattern in protect for name in _named(pattern, known)}
    if not chosen:
        raise AerogelError(
            f"prune: {type(model).__name__} has no weights of two dimensions left to prune; name fewer in protect"
        )
    return {name: weight for name, weight in known.items() if name in chosen}


def _named(pattern: str, known: Mapping[str, Tensor]) -> list[str]:
    found = [name for name in known if any(fnmatchcase(part, pattern) for part in _parts(name))]
    if not found and pattern != "*":
        parts = {part for name in known for part in _parts(name)}
        raise AerogelError(f"prune: {pattern!r} names no weights that can be pruned; {nearest(pattern, parts)}")
    return found


def _parts(name: str) -> list[str]:
    """a.b.weight, a.b, a: the weight, and the modules that it stands in."""
    pieces = name.split(".")
    return [".".join(pieces[:n]) for n in range(len(pieces), 0, -1)]


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """{name of a weight: bool tensor of its shape}, True for what survives. Weights that are not named are whole."""

    kept: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, mask in self.kept.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
                raise AerogelError(f"Masks: the mask of {name} must be a bool tensor, got {kind}; compare, as w != 0")

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[str] = ("*",), protect: Sequence[str] = ()) -> Masks:
        """What a network's zeros say: the masks that made it, once they were made permanent."""
        return cls({name: weight.detach() != 0 for name, weight in prunable(model, layers, protect).items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __and__(self, other: Masks) -> Masks:
        """What survives both. Raises AerogelError where two masks of a weight differ in shape."""
        both = dict(self.kept)
        for name, mask in other.items():
            if name in both and both[name].shape != mask.shape:
                raise AerogelError(
                    f"Masks: both must have one shape for {name}, got {tuple(both[name].shape)} and "
                    f"{tuple(mask.shape)}; they are of different networks"
                )
            both[name] = both[name] & mask if name in both else mask
        return Masks(both)

    @property
    def survivors(self) -> int:
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def weights(self) -> int:
        """Of the masked tensors, pruned ones included."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def sparsity(self) -> float:
        """The share of them that is gone."""
        return 1 - self.survivors / max(1, self.weights)

    def counts(self) -> dict[str, tuple[int, int]]:
        """{name: (survivors, weights)}."""
        return {name: (int(mask.sum()), mask.numel()) for name, mask in self.kept.items()}

    def check(self, model: nn.Module) -> None:
        """Raises AerogelError unless every mask is of a weight of `model` and has its shape."""
        known = dict(model.named_parameters())
        for name, mask in self.kept.items():
            if name not in known:
                raise AerogelError(f"Masks: {type(model).__name__} has no weight {name!r}; {nearest(name, known)}")
            if known[name].shape != mask.shape:
                raise AerogelError(
                    f"Masks: the mask of {name} must have its shape {tuple(known[name].shape)}, got "
                    f"{tuple(mask.shape)}; it is of another network"
                )

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """Pruned weights to +0.0, in place; called after each optimizer step."""
        for weight, mask in self._pairs(model):
            weight.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def hold_gradients(self, model: nn.Module) -> None:
        """The gradients of pruned weights to 0, in place; called before they are clipped."""
        for weight, mask in self._pairs(model):
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def put_on(self, state: State) -> None:
        """From here on the training `state` is held to these masks: its weights, their average, and what its optimizer
        remembers of them.

        Raises AerogelError as `check` does; the state is then as it was.
        """
        self.check(state.model)
        for network in (state.model, state.average):
            if network is not None:
                self.hold(network)
        for weight, mask in self._pairs(state.model):
            for value in state.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.masked_fill_(~mask, 0.0)
        state.masks = self

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        weights = dict(model.named_parameters())
        for name, mask in self.kept.items():
            weight = weights[name]
            if mask.device != weight.device:
                self.kept[name] = mask = mask.to(weight.device)
            yield weight, mask
