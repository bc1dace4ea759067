"""Criteria, by hand on a group of two channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import CRITERIA, cut
from aerogel.prune.coupling import Group, couple
from aerogel.prune.criteria import bn_scale, l1, l2, random
from aerogel.prune.proof import named_weights
from aerogel.prune.rank import scores


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


def test_l1_and_l2_are_over_all_that_the_channel_touches() -> None:
    group, weights = pair()
    assert l1(group, weights).tolist() == [7, 5]
    assert l2(group, weights).tolist() == pytest.approx([5, 3])


def test_half_precision_weights_are_summed_in_single() -> None:
    group, weights = pair()
    assert l2(group, {name: w.half() for name, w in weights.items()}).dtype == torch.float32


def test_bn_scale_is_the_norms_scale_without_sign() -> None:
    group, weights = pair()
    assert bn_scale(group, weights).tolist() == [0.5, 2]


def test_bn_scale_needs_a_norm() -> None:
    with pytest.raises(CutError, match="group conv passes no batch norm; use criterion='l2' or protect"):
        bn_scale(*pair(norm=False))


def test_a_channel_through_two_norms_has_both_scales() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    group = couple(capture(net, (IMAGE,))).groups[0]
    weights = named_weights(net)
    weights["1.weight"].copy_(torch.tensor([1.0, -2.0]))
    weights["3.weight"].copy_(torch.tensor([10.0, 20.0]))
    assert bn_scale(group, weights).tolist() == [11, 22]


def test_random_follows_the_seed() -> None:
    group, weights = pair()
    torch.manual_seed(3)
    first = random(group, weights)
    assert not torch.equal(first, random(group, weights))
    torch.manual_seed(3)
    assert torch.equal(first, random(group, weights))
    assert ((first >= 0) & (first < 1)).all()


def test_the_table_names_every_criterion() -> None:
    names = ["l1", "l2", "bn_scale", "fpgm", "lamp", "taylor", "hessian", "apoz", "activation", "random"]
    assert [*CRITERIA] == names
    assert [score.__name__ for score in CRITERIA.values()] == names


def test_scores_are_over_their_mean_size() -> None:
    net = Pair()
    coupling = couple(capture(net, (IMAGE,)))
    weights = named_weights(net)
    assert scores(coupling, weights, lambda group, w: torch.tensor([1.0, 3.0]))[0].tolist() == [0.5, 1.5]
    assert scores(coupling, weights, lambda group, w: torch.tensor([-1.0, 3.0]))[0].tolist() == [-0.5, 1.5]
    assert scores(coupling, weights, lambda group, w: torch.zeros(2))[0].tolist() == [0, 0]
    ours: Any = lambda group, w: np.array([1, 3])  # noqa: E731  what NumPy gives will do as well
    assert scores(coupling, weights, ours)[0].tolist() == [0.5, 1.5]


@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("shift", [0, -10])
def test_a_criterion_of_ones_own_decides(lowest: int, shift: float) -> None:
    seen = []

    def mine(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        seen.append((group.name, len(group), sorted(weights)))
        score = weights["fc.weight"][0, :2] * 0 + 1.0 + shift
        score[lowest] -= 0.5
        return score.requires_grad_()

    net = Pair()
    made = cut(net, (IMAGE,), target={"channels": 0.5}, criterion=mine)
    assert made.kept["conv.weight"][0].tolist() == [1 - lowest]
    assert torch.equal(made.model.conv.weight, net.conv.weight[[1 - lowest]])
    assert seen[0] == ("conv", 2, sorted(net.state_dict()))


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
