"""Scores of single weights against hand-computed values and their laws; how scores become masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.prune.weights import (
    SCORES,
    below_threshold,
    lamp,
    lowest,
    magnitude,
    mean_gradients,
    movement,
    n_of_m,
    per_layer,
    quality_of,
    score,
    snip,
    taylor,
)

W = torch.tensor([[3.0, -1.0], [0.0, 2.0]])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_by_hand() -> None:
    g = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert magnitude(W).tolist() == [[3, 1], [0, 2]]
    assert taylor(W, g).tolist() == [[9, 4], [0, 64]]
    assert snip(W, g).tolist() == [[3, 2], [0, 8]]
    assert movement(W, torch.ones(2, 2)).tolist() == [[4, 0], [-0.5, 1.5]]
    assert lamp(W).flatten().tolist() == pytest.approx([1, 1 / 14, 0, 4 / 13])


@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_lamp_does_not_see_a_layers_scale_and_orders_as_magnitude(seed: int, scale: float) -> None:
    weight = draw(seed, 7, 5)
    assert torch.allclose(lamp(weight), lamp(scale * weight), rtol=1e-4)
    assert torch.equal(lamp(weight).flatten().argsort(), weight.abs().flatten().argsort())
    assert lamp(weight).max() == 1


def test_lamp_by_its_definition() -> None:
    weight = draw(3, 30)
    squares = weight.double() ** 2
    expected = torch.stack([u / squares[squares >= u].sum() for u in squares])
    assert torch.allclose(lamp(weight), expected)


@given(seed=st.integers(0, 99), sparsity=st.floats(0.05, 0.95))
@example(seed=0, sparsity=0.95)  # of the ten that are left none stays
def test_a_threshold_in_units_of_std_prunes_the_share_it_was_set_for(seed: int, sparsity: float) -> None:
    weight = draw(seed, 20, 10)
    mask = below_threshold(weight, quality_of(weight, sparsity))
    assert int((~mask).sum()) == round(sparsity * 200)
    again = below_threshold(weight * mask, quality_of(weight * mask, sparsity))  # of what is left
    assert int(again.sum()) == int(mask.sum()) - round(sparsity * int(mask.sum()))


def test_a_threshold_by_hand() -> None:
    weight = torch.tensor([1.0, -1.0, 3.0, -3.0, 0.0])
    assert quality_of(torch.zeros(4), 0.5) == 0
    assert below_threshold(weight, 1.0).tolist() == [False, False, True, True, False]  # std = sqrt(5)
    assert below_threshold(weight, 0.1).tolist() == [True, True, True, True, False]
    for quality in (-1.0, math.inf):
        with pytest.raises(AerogelError, match="quality must be >= 0 and finite"):
            below_threshold(weight, quality)


def test_gaussian_weights_lose_what_the_error_function_says() -> None:
    kept = below_threshold(draw(0, 300, 300), 1.0).float().mean()
    assert kept == pytest.approx(1 - math.erf(1 / math.sqrt(2)), abs=0.005)


def test_gradients_are_the_mean_over_batches_and_leave_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    held = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [(draw(seed, 8, 4), torch.arange(8) % 3) for seed in range(3)]
    found = mean_gradients(net, iter(batches))
    assert net.training
    assert all(torch.equal(tensor, held[name]) for name, tensor in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    net.eval()
    loss = torch.stack([F.cross_entropy(net(x), y) for x, y in batches]).mean()
    loss.backward()
    for name, weight in net.named_parameters():
        assert torch.allclose(found[name], weight.grad, atol=1e-6)  # type: ignore[arg-type]


def test_taylor_tells_the_change_of_the_loss_when_one_weight_goes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = draw(1, 50, 4).double(), torch.arange(50) % 3
    with torch.no_grad():
        net[0].weight *= 1e-3  # so that first order is enough
    found = score("taylor", net, batches=[(x, y)])["0.weight"].sqrt()
    whole = F.cross_entropy(net(x), y)
    for i in range(3):
        for j in range(4):
            held = net[0].weight[i, j].item()
            with torch.no_grad():
                net[0].weight[i, j] = 0
                change = F.cross_entropy(net(x), y) - whole
                net[0].weight[i, j] = held
            assert change.abs().item() == pytest.approx(found[i, j].item(), rel=0.05)


@given(seed=st.integers(0, 50), n=st.integers(1, 4), inner=st.sampled_from([(), (3,), (3, 2)]))
def test_of_every_m_inputs_the_n_largest_survive(seed: int, n: int, inner: tuple[int, ...]) -> None:
    weight = draw(seed, 5, 8, *inner)
    mask = n_of_m(weight.abs(), n, 4)
    assert mask.shape == weight.shape
    groups = mask.movedim(1, -1).reshape(-1, 4)
    assert (groups.sum(1) == n).all()
    sizes = weight.abs().movedim(1, -1).reshape(-1, 4)
    least_kept = sizes.masked_fill(~groups, math.inf).amin(1)
    most_gone = sizes.masked_fill(groups, -math.inf).amax(1)
    assert (least_kept > most_gone).all()


def test_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AerogelError, match=r"inputs \(dimension 1\) must be a multiple of 4, got shape \(3, 6\)"):
        n_of_m(torch.ones(3, 6))
    for n in (0, 5):
        with pytest.raises(AerogelError, match=r"n must be in \[1, m\]"):
            n_of_m(torch.ones(3, 8), n)


def test_global_ranking_goes_where_weights_are_small_and_local_takes_the_same_share() -> None:
    scores = {"a.weight": torch.arange(10.0), "b.weight": torch.arange(100.0, 110.0)}
    assert {name: kept for name, (kept, _) in lowest(scores, 0.4).counts().items()} == {"a.weight": 2, "b.weight": 10}
    assert lowest(scores, 0.4).kept["a.weight"].tolist() == [False] * 8 + [True] * 2
    local = lowest(scores, 0.4, ranking="local")
    assert [kept for kept, _ in local.counts().values()] == [6, 6]
    own = lowest(scores, 0.5, ratios={"b": 0.9})
    assert [kept for kept, _ in own.counts().values()] == [5, 1]


def test_every_layer_keeps_something_and_ties_go_in_order() -> None:
    scores = {"a": torch.zeros(10), "b": torch.ones(10)}
    deep = lowest(scores, 0.95)
    assert [kept for kept, _ in deep.counts().values()] == [1, 1]  # 18 go: one stays of each
    assert [kept for kept, _ in lowest(scores, 0.9, least=2).counts().values()] == [2, 2]
    assert lowest({"a": torch.zeros(4)}, 0.5).kept["a"].tolist() == [True, False, False, True]


def test_per_layer_shares_come_from_a_scan() -> None:
    values = {"first": [98.9, 98.0, 99.0], "last": [99.0, 98.8, 98.7], "none": [50.0, 99.0, 99.0]}
    assert per_layer((0.5, 0.8, 0.9), values, whole=99.0, drop=0.25) == {"first": 0.5, "last": 0.8, "none": 0.0}


def test_bad_choices_are_told() -> None:
    scores = {"a.weight": torch.ones(2, 2)}
    for sparsity in (-0.1, 1.0, 1.5):
        with pytest.raises(AerogelError, match=r"sparsity must be a share to remove in \[0, 1\), got "):
            lowest(scores, sparsity)
    with pytest.raises(AerogelError, match="ranking 'globl' is unknown; did you mean global"):
        lowest(scores, 0.5, ranking="globl")
    with pytest.raises(AerogelError, match=r"ratios: 'b' names no layer; .*a"):
        lowest(scores, 0.5, ratios={"b": 0.5})
    with pytest.raises(AerogelError, match=r"ratios: 'a': sparsity must be a share"):
        lowest(scores, 0.5, ratios={"a": 2.0})
    with pytest.raises(AerogelError, match=r"two patterns name a\.weight with 0\.5 and 0\.6"):
        lowest(scores, 0.5, ratios={"a": 0.5, "a*": 0.6})
    with pytest.raises(AerogelError, match=r"mask of a\.weight must have its shape \(2, 2\), got \(4,\)"):
        lowest(scores, 0.5, before={"a.weight": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(AerogelError, match=r"scores of a\.weight hold nan"):
        lowest({"a.weight": torch.tensor([math.nan])}, 0.5)
    with pytest.raises(AerogelError, match="at least one weight, got none"):
        lowest({}, 0.5)
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(AerogelError, match="'magnitud' is unknown; did you mean magnitude"):
        score("magnitud", net)
    with pytest.raises(AerogelError, match="'snip' must see data; pass batches"):
        score("snip", net)
    with pytest.raises(AerogelError, match="'movement' compares weights with those before a training; pass earlier"):
        score("movement", net)
    with pytest.raises(AerogelError, match=r"there is no earlier of 0\.weight"):
        score("movement", net, earlier={})
    with pytest.raises(AerogelError, match="batches must hold at least one, got none"):
        score("taylor", net, batches=[])
    with pytest.raises(AerogelError, match="the loss must be finite, got nan"):
        score("taylor", net, batches=[(torch.full((2, 4), math.nan), torch.zeros(2, dtype=torch.long))])


def test_every_score_has_the_weights_shape() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    batches = [(draw(0, 5, 2, 4, 4), torch.arange(5) % 3)]
    earlier = {name: weight.detach() / 2 for name, weight in net.named_parameters()}
    for name in SCORES:
        found = score(name, net, batches=batches, earlier=earlier)
        assert {n: s.shape for n, s in found.items()} == {
            n: net.get_parameter(n).shape for n in ("0.weight", "2.weight")
        }
