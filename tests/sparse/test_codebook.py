"""Shared values: k-means, centroids that learn by summed gradients, and the fewest bits that a score allows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel import nets
from aerogel.data import Dataset, Split, assemble
from aerogel.errors import AerogelError
from aerogel.sparse import Codebooks, fewest_bits, iid_bits, share
from aerogel.sparse.codebook import centroids
from aerogel.sparse.codec import encode, same
from aerogel.train import HardLabels, Recipe, fit, start


def small(seed: int = 0, density: float = 0.3) -> nn.Sequential:
    """16 -> 32 -> 3, most weights zero."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        for layer in (net[1], net[3]):
            layer.weight[layer.weight.abs() < layer.weight.abs().quantile(1 - density)] = 0
    return net


def toy() -> Dataset:
    images = torch.arange(24 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).view(24, 1, 4, 4)
    return assemble("toy", Split(images, torch.arange(24) % 3), Split(images, torch.arange(24) % 3), "abc", val=6)


def different(weight: torch.Tensor) -> int:
    return int(weight[weight != 0].unique().numel())


@given(
    values=st.lists(st.floats(-10, 10, width=32).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=200),
    bits=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_centroids_rise_are_few_and_lie_among_the_values(values: list[float], bits: int) -> None:
    held = np.array(values)
    found = centroids(held, bits)
    assert 1 <= len(found) <= 1 << bits
    assert (np.diff(found) > 0).all()
    assert held.min() - 1e-9 <= found[0] <= found[-1] <= held.max() + 1e-9
    if len(np.unique(held)) <= 1 << bits:
        assert (found == np.unique(held)).all()


def test_centroids_are_means_of_what_is_nearest() -> None:
    """Lloyd's fixed point; four heaps are found."""
    rng = np.random.default_rng(0)
    heaps = np.concatenate([rng.normal(m, 0.01, 100) for m in (-2.0, -1.0, 1.5, 3.0)])
    found = centroids(heaps, 2)
    assert found == pytest.approx([-2, -1, 1.5, 3], abs=0.01)
    owner = np.abs(heaps[:, None] - found).argmin(1)
    assert found == pytest.approx([heaps[owner == k].mean() for k in range(4)])


def test_no_centroid_is_lost_in_the_gap_that_pruning_leaves() -> None:
    rng = np.random.default_rng(0)
    kept = np.append(rng.uniform(-1.1, -1, 500), rng.uniform(1, 1.1, 500))
    assert len(centroids(kept, 4)) == 16
    assert len(centroids(np.abs(kept), 4)) == len(centroids(-np.abs(kept), 4)) == 16


def test_weights_share_few_values_and_zeros_stay() -> None:
    net = small()
    before = copy.deepcopy(net)
    books = share(net, 3)
    for layer, old in ((net[1], before[1]), (net[3], before[3])):
        assert different(layer.weight) == 8
        assert ((layer.weight == 0) == (old.weight == 0)).all()
        assert (layer.weight - old.weight).abs().max() < 0.05
        assert same(layer.bias, old.bias.half().float())  # 2^8 values are enough: only rounded
    assert books.index.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_fewer_bits_a_smaller_file_and_a_larger_error() -> None:
    weight = nets.build("lenet_300_100").features.fc1.weight.detach()
    sizes, errors = [], []
    for bits in (1, 3, 5):
        net = nn.Linear(784, 300, bias=False)
        net.weight.data.copy_(weight)
        share(net, bits)
        sizes.append(len(encode(net.weight)))
        errors.append(float((net.weight.detach() - weight).square().mean()))
        assert 8 * sizes[-1] < 1.05 * iid_bits(net.weight)
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_bits_by_name() -> None:
    net = small()
    before = copy.deepcopy(net)
    share(net, {"1.weight": 2})
    assert different(net[1].weight) == 4
    assert same(net[3].weight, before[3].weight)


def test_bits_of_vectors() -> None:
    net = small()
    share(net, 4, vectors=2)
    assert [different(p) for p in net.parameters()] == [16, 4, 16, 3]  # three outputs have three biases


def test_a_tied_weight_stays_tied() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    share(net, 2)
    assert net[1].weight is net[0].weight
    assert different(net[0].weight) == 4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(kind: torch.dtype) -> None:
    net = small().to(kind)
    share(net, 3)
    assert net[1].weight.dtype == kind
    assert different(net[1].weight) <= 8


def test_summed_gradients_are_the_centroids() -> None:
    """dL/dc_k by the definition: w = c[index] as a function of c, differentiated."""
    net, x, y = small(), torch.randn(10, 16), torch.arange(10) % 3
    books = share(net, 2)
    index = books.index["1.weight"]
    values = torch.stack([net[1].weight[index == k][0].detach() for k in range(index.max() + 1)]).requires_grad_()
    hidden = F.relu(F.linear(x, values[index], net[1].bias))
    F.cross_entropy(F.linear(hidden, net[3].weight, net[3].bias), y).backward()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    books.hold_gradients(net)
    assert values.grad is not None
    expected = values.grad.clone()
    expected[0] = 0  # the zeros stay
    torch.testing.assert_close(net[1].weight.grad, expected[index])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_centroids_learn_and_stay_shared(optimizer: str) -> None:
    net = small()
    books = share(net, 2)
    before = copy.deepcopy(net)
    state = start(net, HardLabels(), toy(), Recipe(epochs=10, batch_size=6, optimizer=optimizer, lr=0.05))
    state.masks = books
    trained = fit(state, toy())
    for layer, old in ((trained[1], before[1]), (trained[3], before[3])):
        assert different(layer.weight) <= 4
        assert (layer.weight[old.weight == 0] == 0).all()
        assert not torch.equal(layer.weight, old.weight)
    books.settle(trained)
    assert same(trained[1].weight, trained[1].weight.half().float())


def test_the_fewest_bits_that_a_score_allows() -> None:
    """The score falls with the error: the choice is the first that is near enough, and the network has it."""
    net = small()
    original = copy.deepcopy(net)

    def score(one: nn.Module) -> float:
        return 100 - 1000 * float((one[1].weight - original[1].weight).detach().square().mean())  # type: ignore[index]

    found = fewest_bits(net, score, max_drop=0.05)
    assert found.scores[0] == 100
    assert all(found.scores[bits] < 99.95 for bits in range(1, found.bits))
    assert found.scores[found.bits] >= 99.95
    assert score(net) == found.scores[found.bits]
    assert different(net[1].weight) == 2**found.bits
    assert isinstance(found.codebooks, Codebooks)


def test_no_bits_are_few_enough() -> None:
    net = small()
    before, scores = copy.deepcopy(net), iter((3.0, 2.0, 1.0))
    with pytest.raises(AerogelError, match=r"^fewest_bits: no codebook keeps the score within 0 of 3: 2 with 1 bits, "):
        fewest_bits(net, lambda one: next(scores), 0, tries=(1, 2))
    assert same(net[1].weight, before[1].weight)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (0, "share: bits must be whole and 1 to 8, got 0 for 1.weight; the paper has 5"),
        (2.5, "share: bits must be whole and 1 to 8, got 2.5 for 1.weight"),
        (True, "share: bits must be whole and 1 to 8, got True"),
        ({"1.weigth": 3}, "share: there is no parameter '1.weigth'; did you mean 1.weight"),
    ],
)
def test_bad_bits(bits: object, message: str) -> None:
    with pytest.raises(AerogelError, match=f"^{message}"):
        share(small(), bits)  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite() -> None:
    net = small()
    net[1].weight.data[0, 0] = float("nan")
    with pytest.raises(AerogelError, match=r"^share: 1\.weight must be finite, it has inf or nan"):
        share(net, 3)
