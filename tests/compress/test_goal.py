"""Goals: what a user may type, what is refused and how, and that a suggested goal can be typed back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.compress.goal import UNITS, Goal, parse_goal, parse_goals, typed
from aerogel.errors import AerogelError
from aerogel.prune.plan import METRICS


def test_the_metrics_are_those_of_cutting_and_the_latency() -> None:
    assert set(UNITS) == {*METRICS, "latency"}


@pytest.mark.parametrize(
    ("text", "metric", "limit", "absolute"),
    [
        ("latency=0.5", "latency", 0.5, False),
        ("latency=1", "latency", 1.0, False),
        ("latency = .25", "latency", 0.25, False),
        ("channels=1e-1", "channels", 0.1, False),
        ("latency=2.5ms", "latency", 2.5, True),
        ("latency=2.5 ms", "latency", 2.5, True),
        ("latency=800us", "latency", 0.8, True),
        ("latency=1s", "latency", 1000.0, True),
        ("macs=150M", "macs", 150e6, True),
        ("params=1M", "params", 1e6, True),
        ("params=0.5K", "params", 500.0, True),
        ("peak_bytes=2MiB", "peak_bytes", 2 * 2**20, True),
        ("access_bytes=1.5KB", "access_bytes", 1500.0, True),
    ],
)
def test_what_a_user_types(text: str, metric: str, limit: float, absolute: bool) -> None:
    goal = parse_goal(text)
    assert (goal.metric, goal.absolute, goal.text) == (metric, absolute, text)
    assert goal.limit == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", r"'macs' must be METRIC=VALUE"),
        ("latensy=0.5", r"did you mean latency\?"),
        ("MACS=0.5", r"must be METRIC=VALUE; .*macs"),
        ("=0.5", r"must be METRIC=VALUE"),
        ("macs=", r"'' is not a number with a unit; write macs=0.5"),
        ("macs=half", r"'half' is not a number"),
        ("macs=nan", r"'nan' is not a number"),
        ("macs=1.2.3", r"'1.2.3' is not a number"),
        (
            "macs=1.5",
            r"a fraction to keep must be in \(0, 1\], an absolute value .* \(macs=3K or macs=3M or .*got 1.5$",
        ),
        ("macs=150000000", r"an absolute value is positive and has a unit"),
        ("macs=0", r"must be in \(0, 1\]"),
        ("macs=-1", r"must be in \(0, 1\].*got -1$"),
        ("macs=-1M", r"an absolute value is positive"),
        ("latency=0ms", r"an absolute value is positive"),
        ("latency=5parsecs", r"latency=3us or latency=3ms or latency=3s.*got 5parsecs$"),
        ("latency=5MS", r"got 5MS$"),
        ("channels=3K", r"a fraction to keep must be in \(0, 1\], got 3K$"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        parse_goal(text)


def test_no_goal_and_one_metric_twice_are_refused() -> None:
    with pytest.raises(AerogelError, match=r"--target is missing; .*latency=0\.5"):
        parse_goals([])
    with pytest.raises(AerogelError, match=r"each metric is given once, got macs, params, macs"):
        parse_goals(["macs=0.5", "params=0.5", "macs=1M"])
    assert [goal.metric for goal in parse_goals(["macs=0.5", "latency=0.5"])] == ["macs", "latency"]


def test_the_share_that_an_absolute_goal_leaves() -> None:
    assert parse_goal("macs=150M").fraction(600e6) == 0.25
    assert parse_goal("macs=0.3").fraction(600e6) == 0.3


@pytest.mark.parametrize("before", [1.0, 999.0, 1000.0])
def test_an_absolute_goal_that_is_met_already_is_refused_with_what_is(before: float) -> None:
    with pytest.raises(AerogelError, match=r"--target latency=1s: .* already within it \(latency=.*ms\); ask for less"):
        parse_goal("latency=1s").fraction(before)


@pytest.mark.parametrize(
    ("metric", "value", "absolute", "text"),
    [
        ("macs", 0.30401, False, "macs=0.305"),
        ("macs", 0.3, False, "macs=0.3"),
        ("latency", 0.02951, True, "latency=0.0296ms"),
        ("latency", 1234.0, True, "latency=1240ms"),
        ("macs", 150_000, True, "macs=150K"),
        ("macs", 1_000_001, True, "macs=1.01M"),
        ("params", 12, True, "params=0.012K"),
        ("peak_bytes", 2**20, True, "peak_bytes=1MiB"),
        ("peak_bytes", 12, True, "peak_bytes=12B"),
    ],
)
def test_a_goal_as_a_user_would_type_it(metric: str, value: float, absolute: bool, text: str) -> None:
    assert typed(metric, value, absolute) == text


@given(metric=st.sampled_from([m for m in UNITS if m != "channels"]), value=st.floats(1e-6, 1e15))
def test_a_suggested_absolute_goal_parses_and_is_met_by_what_suggested_it(metric: str, value: float) -> None:
    goal = parse_goal(typed(metric, value, absolute=True))
    assert goal.absolute
    assert value * (1 - 1e-12) <= goal.limit <= value * 1.01 * (1 + 1e-12)


@given(metric=st.sampled_from(sorted(UNITS)), share=st.floats(1e-6, 1))
def test_a_suggested_fraction_parses_and_is_met_by_what_suggested_it(metric: str, share: float) -> None:
    goal = parse_goal(typed(metric, share, absolute=False))
    assert not goal.absolute
    assert share <= goal.limit <= share * 1.01


@given(limit=st.floats(1e-3, 1e6), before=st.floats(1e-3, 1e6))
def test_a_fraction_is_always_one_that_may_be_kept(limit: float, before: float) -> None:
    goal = Goal("latency", limit, True, f"latency={limit}ms")
    if limit >= before:
        with pytest.raises(AerogelError, match="already within it"):
            goal.fraction(before)
    else:
        assert 0 < goal.fraction(before) <= 1
