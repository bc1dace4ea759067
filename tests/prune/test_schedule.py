"""Schedules: where they begin and end, the papers' formulas by hand, and where the cuts fall in a training."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import CutError
from aerogel.prune.schedule import SCHEDULES, cut_points

NAMES = sorted(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 50), final=st.floats(0.001, 1))
def test_a_schedule_falls_from_all_to_what_is_asked(name: str, total: int, final: float) -> None:
    kept = [SCHEDULES[name](step, total, final) for step in range(total + 1)]
    assert kept[0] == pytest.approx(1)
    assert kept[-1] == pytest.approx(final)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(kept))


def test_the_papers_formulas_by_hand() -> None:
    """Half way to a tenth: all; a tenth's root; 0.1 + 0.9 / 8; the middle."""
    half = {name: SCHEDULES[name](2, 4, 0.1) for name in NAMES}
    assert half["one-shot"] == 1
    assert half["iterative"] == pytest.approx(0.1**0.5)
    assert half["gradual"] == pytest.approx(0.1 + 0.9 / 8)
    assert half["linear"] == pytest.approx(0.55)


def test_iterative_rounds_take_the_same_share_of_what_is_left() -> None:
    kept = [SCHEDULES["iterative"](step, 5, 0.2) for step in range(6)]
    ratios = [after / before for before, after in itertools.pairwise(kept)]
    assert ratios == pytest.approx([ratios[0]] * 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("step", "total", "final", "message"),
    [
        (-1, 3, 0.5, r"step must be in \[0, total\] .*step=-1, total=3"),
        (4, 3, 0.5, r"step=4, total=3"),
        (0, 0, 0.5, r"total at least 1"),
        (1, 3, 0.0, r"final must be a share to keep in \(0, 1\], got 0\.0"),
        (1, 3, 1.5, r"got 1\.5"),
        (1, 3, float("nan"), r"got nan"),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, step: int, total: int, final: float, message: str) -> None:
    with pytest.raises(CutError, match=f"{SCHEDULES[name].__name__}: .*{message}"):
        SCHEDULES[name](step, total, final)


@given(st.data())
def test_cuts_fall_on_different_steps_within_the_ramp(data: st.DataObject) -> None:
    ramp = data.draw(st.floats(0.01, 1))
    steps = data.draw(st.integers(1, 2000).filter(lambda n: ramp * n >= 1))
    cuts = data.draw(st.integers(1, max(1, int(ramp * steps))))
    points = cut_points(steps, cuts, ramp)
    assert len(points) == cuts == len(set(points))
    assert list(points) == sorted(points)
    assert points[0] >= 1
    assert points[-1] == max(1, round(ramp * steps))


def test_where_the_cuts_fall_by_hand() -> None:
    assert cut_points(100, 5) == (10, 20, 30, 40, 50)
    assert cut_points(10, 3, ramp=0.9) == (3, 6, 9)


@pytest.mark.parametrize(
    ("steps", "cuts", "ramp", "message"),
    [
        (10, 6, 0.5, r"6 cuts do not fit into 0\.5 of 10 training steps.*make fewer cuts or train longer"),
        (10, 0, 0.5, r"0 cuts do not fit"),
        (10, 1, 0.0, r"ramp must be a share of the training in \(0, 1\], got 0\.0"),
        (10, 1, 1.1, r"got 1\.1"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(steps: int, cuts: int, ramp: float, message: str) -> None:
    with pytest.raises(CutError, match=f"cut_points: .*{message}"):
        cut_points(steps, cuts, ramp)
