"""plan: targets met and no channel too many gone; round_to, min_channels, protect; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import cut
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.plan import METRICS, check_target, is_protected, measure, names_of, plan


class Small(nn.Module):
    """Three convolutions and a linear layer; conv2 and conv3 meet in a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.conv2, self.conv3 = nn.Conv2d(20, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.fc1, self.fc2 = nn.Linear(12, 30), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu())
        x = x + self.conv3(x)
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


IMAGE = torch.zeros(1, 3, 8, 8)
SIZES = {"conv1": 20, "conv2": 12, "fc1": 30}


@pytest.fixture(scope="module")
def small() -> Coupling:
    return couple(capture(Small(), (IMAGE,)))


def scores_of(coupling: Coupling, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.permutation(len(group)) + generator.random() for group in coupling.groups]


def left(coupling: Coupling, removed: np.ndarray) -> dict[str, int]:
    return {group.name: int((~removed[group.units]).sum()) for group in coupling.groups}


def fraction(coupling: Coupling, metric: str, removed: np.ndarray) -> float:
    return measure(coupling, metric, removed) / measure(coupling, metric)


def test_the_groups_are_the_coupled_layers(small: Coupling) -> None:
    assert {group.name: len(group) for group in small.groups} == SIZES
    assert measure(small, "channels") == 62


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.85, 0.5])
def test_a_target_is_met_and_one_channel_less_misses_it(small: Coupling, metric: str, share: float) -> None:
    scores = scores_of(small)
    removed = plan(small, scores, {metric: share})
    assert fraction(small, metric, removed) <= share
    for group, score in zip(small.groups, scores, strict=True):
        gone = removed[group.units]
        assert gone.all() or not gone.any() or score[gone].max() < score[~gone].min(), "the lowest go"
    marks = np.full(small.count, -np.inf)
    for group, score in zip(small.groups, scores, strict=True):
        marks[group.units] = score
    last = np.argmax(np.where(removed, marks, -np.inf))
    less = removed.copy()
    less[last] = False
    assert fraction(small, metric, less) > share


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    share=st.floats(0.3, 1),
    round_to=st.integers(1, 9),
    min_channels=st.integers(1, 9),
    metric=st.sampled_from(METRICS),
)
def test_whatever_is_asked_the_counts_hold(
    small: Coupling, seed: int, share: float, round_to: int, min_channels: int, metric: str
) -> None:
    counts = {"round_to": round_to, "min_channels": min_channels}
    deepest = np.zeros(small.count, bool)
    for group in small.groups:
        deepest[group.units[-(-min_channels // round_to) * round_to :]] = True
    if fraction(small, metric, deepest) > share:
        with pytest.raises(CutError, match="is out of reach"):
            plan(small, scores_of(small, seed), {metric: share}, **counts)
        return
    removed = plan(small, scores_of(small, seed), {metric: share}, **counts)
    assert fraction(small, metric, removed) <= share
    for name, count in left(small, removed).items():
        assert count == SIZES[name] or (count % round_to == 0 and count >= min_channels)


def test_several_targets_are_met_at_once(small: Coupling) -> None:
    scores, target = scores_of(small), {"macs": 0.6, "params": 0.4, "peak_bytes": 0.9, "access_bytes": 0.95}
    removed = plan(small, scores, target)
    assert all(fraction(small, metric, removed) <= share for metric, share in target.items())
    alone = [plan(small, scores, {metric: share}).sum() for metric, share in target.items()]
    assert removed.sum() == max(alone), "the hardest one decides"


def test_nothing_goes_when_all_may_stay(small: Coupling) -> None:
    assert not plan(small, scores_of(small), {"macs": 1}).any()


def test_equal_scores_are_spread_over_the_groups(small: Coupling) -> None:
    removed = plan(small, [np.ones(len(group)) for group in small.groups], {"channels": 0.5})
    assert left(small, removed) == {"conv1": 10, "conv2": 6, "fc1": 15}


def test_a_low_group_is_cut_first_but_never_to_nothing(small: Coupling) -> None:
    low = [np.arange(20.0), np.arange(12.0) + 100, np.arange(30.0) + 200]
    assert left(small, plan(small, low, {"channels": 43 / 62})) == {"conv1": 1, "conv2": 12, "fc1": 30}
    assert left(small, plan(small, low, {"channels": 42 / 62})) == {"conv1": 1, "conv2": 11, "fc1": 30}
    assert left(small, plan(small, low, {"channels": 46 / 62}, min_channels=4)) == {"conv1": 4, "conv2": 12, "fc1": 30}


def test_ranked_locally_every_group_loses_the_same_share(small: Coupling) -> None:
    scores = [score * 10.0**place for place, score in enumerate(scores_of(small))]  # scales that global would follow
    removed = plan(small, scores, {"channels": 0.5}, ranking="local")
    shares = [float(removed[group.units].mean()) for group in small.groups]
    assert max(shares) - min(shares) <= 1 / min(len(group) for group in small.groups)
    for group, score in zip(small.groups, scores, strict=True):
        gone = removed[group.units]
        assert score[gone].max() <= score[~gone].min()


def test_an_unknown_ranking_is_named(small: Coupling) -> None:
    with pytest.raises(CutError, match="ranking 'isomorph' is unknown; did you mean isomorphic"):
        plan(small, scores_of(small), {"channels": 0.5}, ranking="isomorph")


def test_an_unreachable_target_says_how_far_cutting_goes(small: Coupling) -> None:
    with pytest.raises(CutError, match=r"target channels=0\.01 \(cutting reaches 0\.0484\) is out of reach; ask for"):
        plan(small, scores_of(small), {"channels": 0.01, "macs": 0.9})
    with pytest.raises(CutError, match=r"macs=0\.1 \(cutting reaches 0\.37\) is out of reach"):
        plan(small, scores_of(small), {"macs": 0.1}, min_channels=9)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "target must name fractions to keep, as {'macs': 0.5}, got {}"),
        (0.5, "target must name fractions to keep, as {'macs': 0.5}, got 0.5"),
        ({"macs": 0}, r"target macs must be a fraction to keep in \(0, 1\], got 0"),
        ({"macs": -0.5}, r"must be a fraction to keep in \(0, 1\], got -0.5"),
        ({"macs": 1.01}, r"must be a fraction to keep in \(0, 1\], got 1.01"),
        ({"macs": float("nan")}, "got nan"),
        ({"macs": "half"}, "got 'half'"),
        ({"mac": 0.5}, "target 'mac' is unknown; did you mean macs"),
        ({"latency": 1.5}, r"target latency must be a fraction to keep in \(0, 1\], got 1.5"),
        ({"latency_ms": 0}, "target latency_ms must be milliseconds above 0, got 0"),
    ],
)
def test_a_target_that_makes_no_sense(target: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        check_target(target)
    with pytest.raises(CutError, match=message):
        cut(Small(), (IMAGE,), target=target)


@pytest.mark.parametrize("name", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_counts_that_make_no_sense(small: Coupling, name: str, value: Any) -> None:
    with pytest.raises(CutError, match=f"{name} must be an integer of at least 1, got {value!r}"):
        plan(small, scores_of(small), {"macs": 0.5}, **{name: value})


def test_names_that_protect(small: Coupling) -> None:
    assert names_of("a.b.weight") == {"a.b.weight", "a.b", "a"}
    conv2 = next(group for group in small.groups if group.name == "conv2")
    assert is_protected(conv2, ["x", "conv?"]) == "conv?"
    assert is_protected(conv2, ["conv3.bias"]) == "conv3.bias"
    assert is_protected(conv2, ["fc2", "conv"]) is None
