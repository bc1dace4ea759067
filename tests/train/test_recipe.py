"""The learning rate as a function of the step, and the values a recipe refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aerogel.train import Recipe, learning_rate


def rates(total: int, per_epoch: int = 10, **changes: Any) -> list[float]:
    recipe = Recipe(**({"lr": 1.0, "warmup": 0} | changes))
    return [learning_rate(recipe, step, total, per_epoch) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(20, warmup=0.4, schedule="constant")[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert rates(20, warmup=0.4, schedule="cosine")[4] == 1
    assert rates(20, warmup=0.25, schedule="constant")[:4] == pytest.approx([1 / 3.5, 2 / 3.5, 3 / 3.5, 1])


def test_warm_up_takes_at_most_half_the_run() -> None:
    assert rates(4, warmup=100, schedule="constant") == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(1, warmup=100) == pytest.approx([1 / 1.5])


def test_cosine_starts_at_the_peak_and_nears_zero() -> None:
    assert rates(4) == pytest.approx([1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4])
    assert rates(1000)[-1] < 1e-5
    warm = rates(12, warmup=0.4)  # 4 steps up, then the cosine of 8
    assert warm[4:] == pytest.approx(rates(8))


def test_steps_fall_at_fractions_of_the_run() -> None:
    assert rates(8, schedule="step") == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(4, schedule="step", milestones=(0.75, 0.25), gamma=0.5) == pytest.approx([1, 0.5, 0.5, 0.25])
    assert rates(4, schedule="step", milestones=()) == [1] * 4


def test_constant_stays() -> None:
    assert rates(5, schedule="constant") == [1] * 5


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "step", "constant"]),
    lr=st.floats(1e-6, 10),
    warmup=st.floats(0, 50),
    gamma=st.floats(0.01, 1),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=4),
    total=st.integers(1, 300),
    per_epoch=st.integers(1, 100),
)
def test_the_rate_lies_in_zero_to_lr_and_falls_after_the_warm_up(
    schedule: str, lr: float, warmup: float, gamma: float, milestones: list[float], total: int, per_epoch: int
) -> None:
    changes = {"schedule": schedule, "lr": lr, "warmup": warmup, "gamma": gamma, "milestones": tuple(milestones)}
    found = rates(total, per_epoch, **changes)
    assert all(0 < rate <= lr for rate in found)
    warm = sum(step < min(warmup * per_epoch, total / 2) for step in range(total))
    assert found[:warm] == sorted(found[:warm])
    assert found[warm:] == sorted(found[warm:], reverse=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", float("inf")),
        ("epochs", float("nan")),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("lr", 0),
        ("lr", -1),
        ("lr", float("inf")),
        ("schedule", "linear"),
        ("milestones", (0.5, 30)),
        ("milestones", (0,)),
        ("gamma", 0),
        ("gamma", 1.1),
        ("warmup", -0.1),
        ("optimizer", "adam"),
        ("momentum", 1),
        ("weight_decay", -1e-4),
        ("clip", 0),
        ("ema", 1),
        ("ema", 0),
        ("autocast", "fp8"),
        ("seed", -1),
        ("epoch", 3),
    ],
)
def test_a_bad_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"1 validation error for Recipe\n{name}"):
        Recipe(**{name: value})  # type: ignore[arg-type]


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().lr = 1  # type: ignore[misc]
