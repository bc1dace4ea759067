"""Shared values: weights that differ little become one of a few. Han, Mao, Dally 2016, "Deep Compression",
arXiv:1510.00149, section 3.

k-means over the weights of one tensor that are not zero, from centroids spread evenly from the least to the greatest
(the paper's "linear" start, which keeps the few large weights), here without the gap around zero that pruning leaves;
w -> the nearest centroid c_k.
Fine-tuning (their section 3.2): dL/dc_k = sum of dL/dw over the weights that share c_k; zeros stay zero.
Paper: 8 bits for convolutions, 5 for fully connected layers, index 0 the pruned weight. Here 2^bits centroids besides
zero, one number of bits or one for each tensor. Differs: centroids are float16 in the end, where none leaves its range;
vectors (biases, scales) get 8 bits, for most of them nothing but that rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aerogel.errors import AerogelError, nearest

SAMPLE = 1 << 18  # weights that k-means looks at
VECTORS = 8  # bits of a bias or a scale
MOST = 8  # a codebook of 256 values is the largest that `codec` writes


def centroids(values: NDArray[np.floating], bits: int) -> NDArray[np.float64]:
    """At most 2^bits values, rising, that stand for `values` (n,), n >= 1: k-means from an even spread."""
    from sklearn.cluster import KMeans

    values = values[:: -(-len(values) // SAMPLE)].astype(np.float64)
    different = np.unique(values)
    if len(different) <= 1 << bits:
        return different
    start = _spread(different[different < 0], different[different > 0], 1 << bits).reshape(-1, 1)
    found = KMeans(1 << bits, init=start, n_init=1, max_iter=100).fit(values.reshape(-1, 1))
    return np.unique(found.cluster_centers_)


def _spread(negative: NDArray[np.float64], positive: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """`count` values, evenly over both sides of zero, each side from its least to its greatest (rising)."""
    left, right = (side[-1] - side[0] if len(side) else -1.0 for side in (negative, positive))
    if left < 0 or right < 0:
        side = positive if left < 0 else negative
        return np.linspace(side[0], side[-1], count)
    share = min(count - 1, max(1, round(count * left / (left + right)))) if left + right else count // 2
    return np.append(
        np.linspace(negative[0], negative[-1], share), np.linspace(positive[0], positive[-1], count - share)
    )


@dataclass(frozen=True, eq=False)
class Codebooks:
    """{name of a weight: which centroid each of its elements has, int64 of its shape}, 0 for zeros.

    The weights themselves hold the values. As `state.masks` of a training it keeps them shared: the centroids learn.
    """

    index: dict[str, Tensor]

    @torch.no_grad()
    def hold_gradients(self, model: nn.Module) -> None:
        """Each gradient becomes the sum over those who share its centroid, in place; that of a zero, 0."""
        for weight, index in self._pairs(model):
            if weight.grad is not None:
                sums = _sums(weight.grad.double(), index)
                sums[0] = 0
                weight.grad.copy_(sums[index])

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """What an optimizer's rounding has parted is one value again, zeros are +0.0; called after each step."""
        for weight, index in self._pairs(model):
            self._put(weight, index, _means(weight, index))

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Centroids to float16 where none of them leaves its range, in place; once, after the training."""
        for weight, index in self._pairs(model):
            self._put(weight, index, _half(_means(weight, index)))

    def _put(self, weight: Tensor, index: Tensor, values: Tensor) -> None:
        values[0] = 0
        weight.copy_(values[index])

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        weights = dict(model.named_parameters())
        return [(weights[name], index.to(weights[name].device)) for name, index in self.index.items()]


@torch.no_grad()
def share(model: nn.Module, bits: int | Mapping[str, int], vectors: int = VECTORS) -> Codebooks:
    """Gives each floating-point parameter at most 2^bits values besides zero, in place.

    bits: 1 to 8 for parameters of two or more dimensions; vectors: for the others. Or bits as {name: bits}, and what it
    does not name stays as it is.
    Raises AerogelError for bits out of range, an unknown name, or a weight that is not finite.
    """
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, count in _bits_of(parameters, bits, vectors).items():
        weight = parameters[name]
        flat = weight.detach().double().cpu().reshape(-1).numpy()
        if not np.isfinite(flat).all():
            raise AerogelError(f"share: {name} must be finite, it has inf or nan; train it again with a smaller rate")
        if (kept := flat[flat != 0]).size:
            book = centroids(kept, count)
            nearest_one = np.searchsorted((book[1:] + book[:-1]) / 2, flat) + 1
            index = torch.from_numpy(np.where(flat != 0, nearest_one, 0)).reshape(weight.shape)
            values = _half(torch.from_numpy(np.append(0.0, book)).to(weight.dtype))
            weight.copy_(values.to(weight.device)[index.to(weight.device)])
            found[name] = index
    return Codebooks(found)


class Fewest(NamedTuple):
    """bits: what was chosen. scores: of every number of bits tried, and under 0 of the network as it was."""

    bits: int
    scores: dict[int, float]
    codebooks: Codebooks


def fewest_bits(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    max_drop: float,
    tries: Sequence[int] = range(1, MOST + 1),
    vectors: int = VECTORS,
) -> Fewest:
    """Shares the weights of `model`, in place, with the fewest bits that lose at most `max_drop` of its score.

    evaluate: a score, greater is better, of validation images: the choice is made by it, so that the test images know
    nothing of it. Raises AerogelError when no number of bits in `tries` is enough; `model` is then as it was.
    """
    scores = {0: evaluate(model)}
    for bits in sorted(tries):
        shared = copy.deepcopy(model)
        share(shared, bits, vectors)
        scores[bits] = evaluate(shared)
        if scores[bits] >= scores[0] - max_drop:
            return Fewest(bits, scores, share(model, bits, vectors))
    told = ", ".join(f"{score:g} with {bits} bits" for bits, score in scores.items() if bits)
    raise AerogelError(
        f"fewest_bits: no codebook keeps the score within {max_drop:g} of {scores[0]:g}: {told}; "
        "allow a larger drop, or save without shared values"
    )


def _bits_of(parameters: Mapping[str, Tensor], bits: int | Mapping[str, int], vectors: int) -> dict[str, int]:
    if isinstance(bits, Mapping):
        if unknown := sorted(bits.keys() - parameters.keys()):
            raise AerogelError(f"share: there is no parameter {unknown[0]!r}; {nearest(unknown[0], parameters)}")
        found = dict(bits)
    else:
        found = {name: bits if weight.ndim > 1 else vectors for name, weight in parameters.items()}
    for name, count in found.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
            raise AerogelError(f"share: bits must be whole and 1 to {MOST}, got {count!r} for {name}; the paper has 5")
    return {name: count for name, count in found.items() if parameters[name].is_floating_point()}


def _sums(values: Tensor, index: Tensor) -> Tensor:
    size = int(index.max()) + 1 if index.numel() else 1
    return values.new_zeros(size).index_add_(0, index.reshape(-1), values.reshape(-1))


def _means(weight: Tensor, index: Tensor) -> Tensor:
    values = weight.detach().double()
    return (_sums(values, index) / _sums(torch.ones_like(values), index).clamp(min=1)).to(weight.dtype)


def _half(values: Tensor) -> Tensor:
    """float16 in the type of `values`, where that keeps 10 bits of each; -0 becomes +0."""
    narrow = values.to(torch.float16).to(values.dtype)
    fits = ((narrow - values).abs() <= values.abs() * 2**-10).all()
    return (narrow if fits and values.dtype == torch.float32 else values) + 0.0
