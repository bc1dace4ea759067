"""plan: targets met and no channel too many gone; round_to, min_channels, protect; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.cost import count
from aerogel.errors import CutError
from aerogel.graph import Graph, capture
from aerogel.prune import cut
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.plan import COARSE, FINE, check_target, is_protected, plan
from aerogel.prune.price import METRICS, measure
from aerogel.prune.ratios import fixed_counts, names_of


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
    for name, width in left(small, removed).items():
        assert width == SIZES[name] or (width % round_to == 0 and width >= min_channels)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric not in ("channels", "file_bytes")])
def test_prices_are_those_that_are_counted(small: Coupling, metric: str) -> None:
    removed = plan(small, scores_of(small), {"channels": 0.6})
    assert measure(small, metric) == getattr(count(small.graph), metric)
    assert measure(small, metric, removed) == getattr(count(small.resized(removed)), metric)


def test_file_bytes_are_those_of_the_saved_numbers(small: Coupling) -> None:
    whole = Small().state_dict()
    assert measure(small, "file_bytes") == sum(tensor.nbytes for tensor in whole.values())
    made = cut(Small(), (IMAGE,), target={"file_bytes": 0.5})
    after = couple(capture(made.model, (IMAGE,)))
    assert measure(after, "file_bytes") == sum(tensor.nbytes for tensor in made.model.state_dict().values())
    assert measure(after, "file_bytes") <= 0.5 * measure(small, "file_bytes")


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


def test_ranked_by_value_what_costs_most_for_its_score_goes_first(small: Coupling) -> None:
    """All channels alike: those of conv2 cost most MACs (180 + 24 a pixel), conv1's 135, fc1's next to none."""
    alike = [np.ones(len(group)) for group in small.groups]
    removed = plan(small, alike, {"macs": 0.75}, ranking="value")
    assert left(small, removed)["fc1"] == 30
    assert left(small, removed)["conv2"] < 12
    by_params = plan(small, alike, {"params": 0.75}, ranking="value")
    assert fraction(small, "params", by_params) <= 0.75


def test_ranked_by_value_a_latency_is_asked_for_every_group(small: Coupling) -> None:
    """A clock that knows of fc1 alone: nothing else is cut for it."""
    (fc1,) = (group for group in small.groups if group.name == "fc1")
    alike = [np.ones(len(group)) for group in small.groups]
    removed = plan(small, alike, {"latency": 0.5}, ranking="value", latency=lambda flags: 31.0 - flags[fc1.units].sum())
    assert left(small, removed)["fc1"] <= 15
    assert (left(small, removed)["conv1"], left(small, removed)["conv2"]) == (20, 12)


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


# ---------------------------------------------------------------- ratios by layer


def test_a_ratio_is_met_and_the_rest_meets_the_target(small: Coupling) -> None:
    removed = plan(small, scores_of(small), {"channels": 0.5}, ratios={"conv1": 0.2})
    assert left(small, removed)["conv1"] == 16
    assert fraction(small, "channels", removed) == 0.5
    removed = plan(small, scores_of(small), {"channels": 0.5}, ratios={"conv1": 0.0})
    assert left(small, removed)["conv1"] == 20
    assert fraction(small, "channels", removed) == 0.5


def test_ratios_alone_touch_nothing_else() -> None:
    made = cut(Small(), (IMAGE,), ratios={"conv?": 0.5, "fc1": 1 / 3})
    assert (made.model.conv1.out_channels, made.model.conv2.out_channels, made.model.fc1.out_features) == (10, 6, 20)
    made = cut(Small(), (IMAGE,), ratios={"fc1": 0.9})
    assert (made.model.conv1.out_channels, made.model.conv2.out_channels, made.model.fc1.out_features) == (20, 12, 3)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 0.99), round_to=st.integers(1, 8), min_channels=st.integers(1, 8))
def test_never_more_than_the_ratio_goes(small: Coupling, share: float, round_to: int, min_channels: int) -> None:
    removed = plan(
        small, scores_of(small), {}, ratios={"fc1": share, "conv2": share}, round_to=round_to, min_channels=min_channels
    )
    counts = left(small, removed)
    assert counts["conv1"] == 20
    for name in ("fc1", "conv2"):
        exact = (1 - share) * SIZES[name]
        assert counts[name] >= max(min_channels, exact - 1e-6)
        assert counts[name] < max(min_channels, exact) + round_to + 1e-6
        assert counts[name] % round_to == 0 or counts[name] == SIZES[name]


@pytest.mark.parametrize(
    ("pattern", "group"),
    [("conv1", "conv1"), ("norm", "conv1"), ("conv1.weight", "conv1"), ("conv3", "conv2"), ("conv[23]", "conv2")],
)
def test_a_pattern_names_what_a_layer_makes(small: Coupling, pattern: str, group: str) -> None:
    assert fixed_counts(small, {pattern: 0.5}) == {group: SIZES[group] // 2}


def test_a_transposed_convolution_makes_its_second_dimension() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up, self.b = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, bias=False), nn.Conv2d(6, 2, 1)
            self.bare = nn.Parameter(torch.randn(2, 8))
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.up(self.a(x))).mean((2, 3)) @ self.bare)

    found = couple(capture(Up(), (IMAGE,)))
    counts = {pattern: fixed_counts(found, {pattern: 0.5}) for pattern in ("a", "up", "bare")}
    assert counts == {"a": {"a": 2}, "up": {group.name: 3 for group in found.groups if len(group) == 6},
                      "bare": {group.name: 4 for group in found.groups if len(group) == 8}}  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"conv4": 0.5}, "ratios: 'conv4' names no layer; did you mean conv"),
        ({"fc2": 0.5}, r"'fc2' names no channels that can be cut: fc2.weight dim 0 stays whole \(network output\)"),
        ({"conv1": 1.0}, r"ratio of 'conv1' must be a share to remove in \[0, 1\), got 1.0"),
        ({"conv1": "half"}, "got 'half'"),
        ({"conv1": float("nan")}, "got nan"),
        (0.5, "ratios must name shares to remove, as {'features.3': 0.5}, got 0.5"),
        ({"conv2": 0.5, "conv3": 0.25}, "both 'conv2' and 'conv3' name the channels of conv2; give them one ratio"),
    ],
)
def test_ratios_that_make_no_sense(ratios: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut(Small(), (IMAGE,), ratios=ratios)


def test_a_layer_is_protected_or_has_a_ratio() -> None:
    with pytest.raises(CutError, match=r"'conv1' names no channels that can be cut: conv1 stays whole \(protected by"):
        cut(Small(), (IMAGE,), ratios={"conv1": 0.5}, protect=["conv1"])


def test_the_target_may_be_out_of_reach_of_what_has_no_ratio(small: Coupling) -> None:
    with pytest.raises(CutError, match=r"channels=0\.3 \(cutting reaches 0\.435\) is out of reach"):
        plan(small, scores_of(small), {"channels": 0.3}, ratios={"conv1": 0, "conv2": 0.5})


# ---------------------------------------------------------------- latency, priced by the caller


class Steps:
    """Milliseconds that fall in steps of eight channels of conv1, with a bump; every price is noted."""

    def __init__(self, coupling: Coupling, bump: bool = False) -> None:
        self.coupling, self.bump, self.asked = coupling, bump, []

    def __call__(self, removed: np.ndarray) -> float:
        self.asked.append(int(removed.sum()))
        counts = left(self.coupling, removed)
        ms = sum(-(-count // 8) for count in counts.values())
        return ms + 5.0 * (self.bump and self.asked[-1] > 45)


@pytest.mark.parametrize("target", [{"latency": 0.5}, {"latency_ms": 4.6}, {"latency": 0.9, "latency_ms": 4.6}])
def test_a_latency_is_met_with_few_prices(small: Coupling, target: dict[str, float]) -> None:
    price = Steps(small)
    whole = price(np.zeros(small.count, bool))
    removed = plan(small, scores_of(small), target, latency=price)
    goal = min(target.get("latency", 1) * whole, target.get("latency_ms", 99))
    assert price(removed) <= goal
    assert len(price.asked) <= COARSE + 6
    one_less = next(n for n in sorted(price.asked, reverse=True) if n < removed.sum())
    assert removed.sum() - one_less <= max(1, 62 // FINE) or one_less == 0, "it closed in on the first that meets it"


def test_a_latency_that_rises_again_is_met_before_it_does(small: Coupling) -> None:
    removed = plan(small, scores_of(small), {"latency": 0.5}, latency=Steps(small, bump=True))
    assert Steps(small, bump=True)(removed) <= 0.5 * 9
    assert removed.sum() <= 45


def test_other_targets_are_met_before_a_latency_is_looked_for(small: Coupling) -> None:
    scores, target = scores_of(small), {"macs": 0.3, "latency": 0.9}
    price = Steps(small)
    removed = plan(small, scores, target, latency=price)
    assert removed.sum() == plan(small, scores, {"macs": 0.3}).sum(), "the latency is met there already"
    assert len(price.asked) == 2


def test_a_latency_out_of_reach_says_how_far_cutting_goes(small: Coupling) -> None:
    with pytest.raises(CutError, match=r"target latency=0\.2 \(cutting reaches 0\.333\) is out of reach"):
        plan(small, scores_of(small), {"latency": 0.2}, latency=Steps(small))
    with pytest.raises(CutError, match=r"target latency_ms=2 \(cutting reaches 3\) is out of reach"):
        plan(small, scores_of(small), {"latency_ms": 2}, latency=Steps(small))


def test_a_latency_needs_somebody_to_price_it(small: Coupling) -> None:
    with pytest.raises(CutError, match="a latency target needs latency=, the milliseconds after a planned cut"):
        plan(small, scores_of(small), {"latency": 0.5})


def test_a_plan_resizes_the_network_a_few_times(small: Coupling, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bisection over 62 channels, once for all metrics, and not at all for channels alone."""
    calls: list[np.ndarray] = []
    real = Coupling.resized

    def counted(self: Coupling, removed: np.ndarray) -> Graph:
        calls.append(removed)
        return real(self, removed)

    monkeypatch.setattr(Coupling, "resized", counted)
    plan(small, scores_of(small), {"macs": 0.5, "params": 0.5, "peak_bytes": 0.95})
    assert len(calls) <= 1 + 6
    calls.clear()
    plan(small, scores_of(small), {"channels": 0.5})
    assert not calls
