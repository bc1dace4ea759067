"""Criteria, by hand on a group of two channels, and the laws that all of them keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import CRITERIA, Evidence, criterion, cut
from aerogel.prune.coupling import Group, Member, couple
from aerogel.prune.criteria import EVIDENCE, activation, apoz, bn_scale, fpgm, hessian, l1, l2, lamp, random, taylor
from aerogel.prune.proof import named_weights


class Pair(nn.Module):
    """conv (1 -> 2), norm, flatten over 2 x 1 pixels, linear (4 -> 1): one group of two channels."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 1), nn.Linear(4, 1)
        self.norm = nn.BatchNorm2d(2) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))


IMAGE = torch.zeros(1, 1, 2, 1)


def pair(norm: bool = True) -> tuple[Group, dict[str, Tensor]]:
    net = Pair(norm)
    group = couple(capture(net, (IMAGE,))).groups[0]
    weights = named_weights(net)
    weights["conv.weight"].copy_(torch.tensor([3.0, -1.0]).view(2, 1, 1, 1))
    weights["conv.bias"].fill_(100)  # no weight of two dimensions: not part of the norm
    weights["fc.weight"].copy_(torch.tensor([[4.0, 0.0, -2.0, 2.0]]))  # channel 0: the first two
    if norm:
        weights["norm.weight"].copy_(torch.tensor([-0.5, 2.0]))
    return group, weights


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("reduce", "ones", "twos"),
    [
        ("sum", [7, 5], [5, 3]),
        ("max", [4, 4], [4, 8**0.5]),
        ("mean", [3.5, 2.5], [12.5**0.5, 4.5**0.5]),
    ],
)
def test_l1_and_l2_are_over_all_that_the_channel_touches(reduce: str, ones: list[float], twos: list[float]) -> None:
    group, weights = pair()
    assert l1(group, weights, reduce).tolist() == ones
    assert l2(group, weights, reduce).tolist() == pytest.approx(twos)


def test_half_precision_weights_are_summed_in_single_and_double_ones_in_double() -> None:
    group, weights = pair()
    assert l2(group, {name: w.half() for name, w in weights.items()}).dtype == torch.float32
    assert l2(group, {name: w.double() for name, w in weights.items()}).dtype == torch.float64
    large = {name: torch.full_like(w, 3e4).half() for name, w in weights.items()}
    assert l2(group, large).isfinite().all(), "the squares overflow in half precision"


def test_bn_scale_is_the_norms_scale_without_sign() -> None:
    group, weights = pair()
    assert bn_scale(group, weights).tolist() == [0.5, 2]


def test_bn_scale_needs_a_norm() -> None:
    with pytest.raises(CutError, match="group conv passes no batch norm; use criterion='l2' or protect"):
        bn_scale(*pair(norm=False))


@pytest.mark.parametrize(("reduce", "expected"), [("sum", [11, 22]), ("max", [10, 20]), ("mean", [5.5, 11])])
def test_a_channel_through_two_norms_has_both_scales(reduce: str, expected: list[float]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    group = couple(capture(net, (IMAGE,))).groups[0]
    weights = named_weights(net)
    weights["1.weight"].copy_(torch.tensor([1.0, -2.0]))
    weights["3.weight"].copy_(torch.tensor([10.0, 20.0]))
    assert bn_scale(group, weights, reduce).tolist() == expected


def three(rows: list[list[float]]) -> tuple[Group, dict[str, Tensor]]:
    """A group of three channels that are the rows of one weight."""
    return Group("fc", np.arange(3), (Member("fc.weight", 0, np.arange(3)[:, None]),)), {
        "fc.weight": torch.tensor(rows)
    }


def test_fpgm_is_the_distance_to_all_others() -> None:
    group, weights = three([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert fpgm(group, weights).tolist() == pytest.approx([5, 10, 5])
    group, weights = three([[100.0, 0.0], [100.0, 1.0], [0.0, 0.0]])
    found = fpgm(group, weights)
    assert found.argmin() < 2, "two large ones that are alike go before a small one of its own"
    assert fpgm(*pair()).tolist() == pytest.approx([4 + 40**0.5] * 2)


def test_lamp_is_the_share_of_what_is_not_smaller() -> None:
    assert lamp(*pair()).tolist() == pytest.approx([25 / 25, 9 / 34])
    assert lamp(*three([[2.0], [-1.0], [2.0]])).tolist() == pytest.approx([4 / 8, 1 / 9, 1])
    assert lamp(*three([[0.0], [0.0], [0.0]])).tolist() == [0, 0, 0]


def seen(**kinds: dict[Any, Tensor]) -> Evidence:
    return Evidence(batches=2, **kinds)


def test_taylor_is_the_mean_square_of_a_layers_contribution() -> None:
    group, weights = pair()
    evidence = seen(
        gradients={
            ("conv.weight", 0): torch.tensor([[1.0, 2.0], [3.0, 4.0]]),  # a row for each of two batches
            ("conv.bias", 0): torch.tensor([[1.0, 0.0], [-3.0, 0.0]]),
            ("fc.weight", 1): torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -1.0]]),
        }
    )
    # conv with its bias: (2, 0) and (2, 4) by batch; fc: (2, 2) and (2, 0)
    assert taylor(group, weights, evidence).tolist() == [2 + 4, 10 + 2]
    assert taylor(group, weights, evidence, "max").tolist() == [4, 10]
    assert taylor(group, weights, evidence, "mean").tolist() == [3, 6]


def test_hessian_adds_up_the_saliency_of_all_weights() -> None:
    group, weights = pair()
    evidence = seen(
        curvature={("conv.weight", 0): torch.tensor([1.0, 2.0]), ("fc.weight", 1): torch.tensor([1.0, 2.0, 3.0, 4.0])}
    )
    assert hessian(group, weights, evidence).tolist() == [4, 9]
    assert hessian(group, weights, evidence, "max").tolist() == [3, 7]


def test_apoz_and_activation_are_means_over_what_reads_the_channel() -> None:
    group, weights = pair()
    evidence = seen(
        zeros={("fc.weight", 1): torch.tensor([0.5, 1.0, 0.0, 0.0])},
        sizes={("fc.weight", 1): torch.tensor([1.0, 3.0, 0.5, 0.5])},
    )
    assert apoz(group, weights, evidence).tolist() == [0.25, 1]
    assert activation(group, weights, evidence).tolist() == [2, 0.5]


def test_random_follows_the_seed() -> None:
    group, weights = pair()
    torch.manual_seed(3)
    first = random(group, weights)
    assert not torch.equal(first, random(group, weights))
    torch.manual_seed(3)
    assert torch.equal(first, random(group, weights))
    assert ((first >= 0) & (first < 1)).all()


# ---------------------------------------------------------------- laws


Drawn = tuple[Group, dict[str, Tensor], Evidence]


def drawn(seed: int, n: int, k: int) -> Drawn:
    """A group of n channels through a convolution with bias and norm, and a layer that reads k indices of each."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"a.weight": some(n, 3, 2), "a.bias": some(n), "n.weight": some(n), "n.running_mean": some(n)}
    weights["b.weight"] = some(4, n * k)
    one = torch.randperm(n, generator=generator).numpy()[:, None]
    many = torch.randperm(n * k, generator=generator).numpy().reshape(n, k)
    members = [Member(target, 0, one) for target in ("a.weight", "a.bias", "n.weight", "n.running_mean")]
    group = Group("a", np.arange(n), (*members, Member("b.weight", 1, many)))
    known = {(m.target, m.dim): m.index.size for m in group.members if m.target != "n.running_mean"}
    read = {("b.weight", 1): n * k}
    evidence = Evidence(
        2,
        {key: some(2, size) for key, size in known.items()},
        {key: some(size).abs() for key, size in known.items()},
        {key: some(size).sigmoid() for key, size in read.items()},
        {key: some(size).abs() for key, size in read.items()},
    )
    return group, weights, evidence


SCORED = [name for name in CRITERIA if name != "random"]
groups = st.builds(drawn, seed=st.integers(0, 999), n=st.integers(1, 9), k=st.integers(1, 3))


def called(name: str, given: Drawn, reduce: str | None = None) -> Tensor:
    group, weights, evidence = given
    return criterion(name, reduce=reduce, evidence=evidence if name in EVIDENCE else None)(group, weights)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", SCORED)
@given(given=groups, seed=st.integers(0, 99))
def test_channels_in_another_order_have_the_same_scores(name: str, given: Drawn, seed: int) -> None:
    group, weights, evidence = given
    order = np.random.default_rng(seed).permutation(len(group))
    members = tuple(Member(m.target, m.dim, m.index[order]) for m in group.members)
    moved = called(name, (Group("a", group.units[order], members), weights, evidence))
    assert torch.allclose(moved, called(name, given)[order], rtol=1e-5)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale", "fpgm", "lamp"])
@given(given=groups, scale=st.floats(0.1, 10))
def test_the_sign_does_not_matter_and_scale_is_scale(name: str, given: Drawn, scale: float) -> None:
    group, weights, evidence = given
    scores = called(name, given)
    negative = called(name, (group, {target: -w for target, w in weights.items()}, evidence))
    assert torch.allclose(negative, scores)
    larger = called(name, (group, {target: scale * w for target, w in weights.items()}, evidence))
    assert torch.allclose(larger, scores if name == "lamp" else scale * scores, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", [name for name in SCORED if name != "lamp"])
@given(given=groups)
def test_the_mean_of_slices_is_at_most_their_maximum_and_that_their_sum(name: str, given: Drawn) -> None:
    mean, most, total = (called(name, given, reduce) for reduce in ("mean", "max", "sum"))
    assert (mean >= 0).all()
    assert (mean <= most * (1 + 1e-5)).all()
    assert (most <= total * (1 + 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(given=groups)
def test_lamps_largest_has_one_and_order_is_that_of_l2(given: Drawn) -> None:
    scores, sizes = called("lamp", given), called("l2", given)
    assert scores.max() == pytest.approx(1)
    assert scores.argsort().tolist() == sizes.argsort().tolist()


# ---------------------------------------------------------------- the call


def test_the_table_names_every_criterion() -> None:
    names = ["l1", "l2", "bn_scale", "fpgm", "lamp", "taylor", "hessian", "apoz", "activation", "random"]
    assert [*CRITERIA] == names
    assert [score.__name__ for score in CRITERIA.values()] == names


@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("shift", [0, -10])
def test_a_criterion_of_ones_own_decides(lowest: int, shift: float) -> None:
    calls = []

    def mine(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        calls.append((group.name, len(group), sorted(weights)))
        score = weights["fc.weight"][0, :2] * 0 + 1.0 + shift
        score[lowest] -= 0.5
        return score.requires_grad_()

    net = Pair()
    for own in (mine, criterion(mine, normalize="none")):
        made = cut(net, (IMAGE,), target={"channels": 0.5}, criterion=own)
        assert made.kept["conv.weight"][0].tolist() == [1 - lowest]
        assert torch.equal(made.model.conv.weight, net.conv.weight[[1 - lowest]])
        assert calls[0] == ("conv", 2, sorted(net.state_dict()))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.tensor([1.0, float("nan")]), r"each of the 2 channels of conv, got shape \(2,\) with 1 not finite"),
        (torch.tensor([float("inf"), 1.0]), "with 1 not finite"),
        (torch.ones(3), r"one finite score for each of the 2 channels of conv, got shape \(3,\)"),
        (torch.ones(2, 1), r"got shape \(2, 1\)"),
    ],
)
def test_scores_that_are_refused(score: Tensor, message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut(Pair(), (IMAGE,), target={"channels": 0.5}, criterion=lambda group, weights: score)


@pytest.mark.parametrize(("name", "message"), [("l3", "did you mean l2 or l1"), (None, "criterion None is unknown")])
def test_an_unknown_criterion(name: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut(Pair(), (IMAGE,), target={"channels": 0.5}, criterion=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "l2", "reduce": "maximum"}, "reduce 'maximum' is unknown; did you mean max"),
        ({"name": "l2", "normalize": "means"}, "normalize 'means' is unknown; did you mean mean"),
        ({"name": "random", "reduce": "sum"}, "'random' has no slices to reduce, got reduce='sum'; leave it out"),
        ({"name": l2, "reduce": "sum"}, "'l2' has no slices to reduce"),
        ({"name": "l2", "evidence": Evidence()}, "'l2' reads no evidence; leave it out"),
        ({"name": "taylor"}, r"criterion 'taylor' needs to see data; pass criterion\('taylor', evidence=gather"),
        (
            {"name": "taylor", "evidence": Evidence(1)},
            r"'taylor' needs gradients, .*name them in gather\(kinds=\.\.\.\)",
        ),
        ({"name": "hessian", "evidence": Evidence(1)}, "needs curvature, .* with a loss of your own pass draw="),
        ({"name": "apoz", "evidence": Evidence(1)}, "'apoz' needs activations, which were not gathered"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        criterion(**options)


@pytest.mark.parametrize("name", EVIDENCE)
def test_a_name_that_needs_evidence_says_so_before_anything_is_read(name: str) -> None:
    with pytest.raises(CutError, match=f"criterion '{name}' needs to see data"):
        cut(nn.Identity(), (), target={"channels": 0.5}, criterion=name)


def test_evidence_of_another_network_is_refused() -> None:
    group, weights = pair()
    with pytest.raises(
        CutError, match=r"evidence of conv\.weight is of 3 channels, the network has 2; gather it again"
    ):
        hessian(group, weights, seen(curvature={("conv.weight", 0): torch.ones(3)}))
    with pytest.raises(CutError, match="group conv: no convolution or linear layer reads its activations"):
        apoz(group, weights, seen(zeros={("other.weight", 1): torch.ones(3)}))
