"""The temperature: laws that hold at every T, values by hand, and what is recommended."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.distill import soft_target_loss
from aerogel.distill.temperature import (
    TEMPERATURES,
    entropy,
    gradient,
    hard_gradient,
    limit,
    moved,
    negative_share,
    recommend,
    same_ranking,
    softened,
    telling,
    wrong_share,
)
from aerogel.errors import AerogelError

logits = st.builds(
    lambda seed, scale, classes: (
        scale * torch.randn(2, 6, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.1, 20),
    classes=st.integers(2, 30),
)
heats = st.floats(0.3, 60)


@settings(deadline=None, max_examples=40)
@given(pair=logits, heat=heats)
def test_the_gradient_is_that_of_the_loss(pair: Tensor, heat: float) -> None:
    student, teacher = pair[0].clone().requires_grad_(), pair[1]
    [found] = torch.autograd.grad(len(teacher) * soft_target_loss(student, teacher, heat), student)
    expected = gradient(student.detach(), teacher, heat)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(expected.sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(pair=logits)
def test_it_tends_to_matching_logits(pair: Tensor) -> None:
    student, teacher = pair
    end = limit(student, teacher)
    far = [(gradient(student, teacher, heat) - end).abs().max() for heat in (1e3, 1e4, 1e5)]
    assert far[2] <= far[0] / 50 + 1e-7  # the error falls as 1 / T
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(end, centred / teacher.shape[-1])


@settings(deadline=None, max_examples=40)
@given(pair=logits, low=heats, high=heats)
def test_entropy_rises_with_t_and_the_ranking_stays(pair: Tensor, low: float, high: float) -> None:
    low, high = sorted((low, high))
    z = pair[0]
    cold, warm = entropy(z, low), entropy(z, high)
    assert (warm >= cold - 1e-9).all()
    assert (warm <= math.log(z.shape[-1]) + 1e-9).all()
    assert same_ranking(z, low).all()
    assert same_ranking(z, high).all()
    torch.testing.assert_close(softened(z, high).sum(-1), torch.ones(6, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(pair=logits, heat=st.floats(1, 60))
def test_wrong_classes_have_half_of_the_gradient_at_least(pair: Tensor, heat: float) -> None:
    student, teacher = pair / 4  # below some size a gradient is rounding
    labels = teacher.argmax(-1)
    share = wrong_share(gradient(student, teacher, heat), labels)
    assert (share >= 0.5 - 1e-6).all()
    assert (share <= 1).all()
    torch.testing.assert_close(
        wrong_share(hard_gradient(student, labels), labels),
        torch.full((6,), 0.5, dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


def test_by_hand() -> None:
    v = torch.tensor([[math.log(6), math.log(3), 0.0]], dtype=torch.float64)  # 0.6, 0.3, 0.1 at T = 1
    torch.testing.assert_close(softened(v, 1.0)[0].tolist(), [0.6, 0.3, 0.1])
    roots = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(softened(v, 2.0)[0], roots / roots.sum())
    h = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert float(entropy(v, 1.0)) == pytest.approx(h)
    z, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    torch.testing.assert_close(gradient(z, v, 1.0)[0].tolist(), [1 / 3 - 0.6, 1 / 3 - 0.3, 1 / 3 - 0.1])
    torch.testing.assert_close(hard_gradient(z, y)[0].tolist(), [-2 / 3, 1 / 3, 1 / 3])
    assert float(wrong_share(torch.tensor([[-3.0, 1.0, 2.0]]), y)) == 0.5  # all of the wrong ones are pushed down
    assert float(wrong_share(torch.tensor([[-1.0, -2.0, 3.0]]), y)) == pytest.approx(5 / 6)
    assert float(wrong_share(torch.zeros(1, 3), y)) == 0.5
    assert float(negative_share(torch.tensor([[-3.0, 1.0, 2.0]]), torch.tensor([[5.0, 0.0, 4.0]]))) == pytest.approx(
        1 / 6
    )
    [row] = moved(v, y, (1.0,))
    assert row.right == pytest.approx(0.6)
    assert row.wrong == pytest.approx(0.4)
    assert row.second == pytest.approx(0.3)
    assert row.classes == pytest.approx(math.exp(h))
    assert row.ranked == pytest.approx((0.6, 0.3, 0.1))
    assert row.student is None
    assert row.start.wrong_share == pytest.approx((0.1 / 3 + 0.7 / 3) / (0.8 / 3 + 0.1 / 3 + 0.7 / 3))
    size = math.sqrt((0.8 / 3) ** 2 + (0.1 / 3) ** 2 + (0.7 / 3) ** 2)
    assert row.start.size == pytest.approx(size)
    assert row.start.balance == pytest.approx(size / math.sqrt(6 / 9))
    end = -(v - v.mean()) / 3
    assert row.start.aligned == pytest.approx(float((gradient(z, v, 1.0) * end).sum() / (size * end.norm())))


def test_a_student_that_has_learned_it_has_no_gradient_left() -> None:
    v = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for row in moved(v, v.argmax(-1), (1.0, 8.0), student_logits=v + 3.0):
        assert row.student is not None
        assert row.student.size == pytest.approx(0, abs=1e-6)
        assert row.student.balance == pytest.approx(0, abs=1e-6)
        assert row.same_ranking == 1


def answers(scale: float, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Of a teacher that is the surer the larger the scale is."""
    v = torch.randn(400, classes, generator=torch.Generator().manual_seed(0)) * scale
    return v, v.argmax(-1)


def test_the_range_follows_the_teacher() -> None:
    """Twice the logits are what twice the temperature was: the range moves along."""
    found = [
        recommend(moved(*answers(scale), [heat * scale for heat in TEMPERATURES]), 10) for scale in (1.0, 2.0, 5.0)
    ]
    for scale, one in zip((1.0, 2.0, 5.0), found, strict=True):
        assert one.low <= one.small <= one.high
        assert (one.low, one.small, one.high) == pytest.approx(
            tuple(scale * heat for heat in (found[0].low, found[0].small, found[0].high))
        )
        assert one.reasons[-1] == "a heuristic, not a law: choose among these on the validation split"
    sure = recommend(moved(*answers(30.0), (1.0, 2.0, 40.0)), 10)
    assert sure.low > 1.0
    assert "soft targets are labels there" in sure.reasons[0]
    assert "no T asked for is near it" in recommend(moved(*answers(30.0), (1.0, 2.0)), 10).reasons[1]
    surest = recommend(moved(*answers(1000.0), (1.0, 2.0)), 10)
    assert "no T asked for lets them be heard" in surest.reasons[0]
    assert "the lowest T asked for lets them be heard" in recommend(moved(*answers(0.5)), 10).reasons[0]


def test_telling_samples() -> None:
    v, labels = answers(3.0)
    labels = labels.clone()
    labels[[3, 5, 8]] = (labels[[3, 5, 8]] + 1) % 10
    found = telling(v, labels, 6).tolist()
    assert len(set(found)) == 6
    assert sum(one in (3, 5, 8) for one in found) >= 2
    spread = entropy(v.double(), 1.0)
    right = [i for i in range(400) if i not in found[:2]]
    assert spread[found[2]] == spread[right].min()
    assert spread[found[-1]] == spread[right].max()
    assert telling(v[:2], labels[:2], 6).numel() == 2
    assert telling(v[:1], labels[:1], 6).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, y: softened(v, 0.0), "softened: temperature must be > 0 and finite, got 0"),
        (lambda v, y: entropy(v, math.inf), "entropy: temperature must be > 0 and finite, got inf"),
        (lambda v, y: gradient(v[:, :2], v, 1.0), r"gradient: student \(4, 2\) and teacher \(4, 3\)"),
        (lambda v, y: moved(v, y, (1.0, -1.0)), "temperature must be > 0 and finite, got -1"),
        (lambda v, y: moved(v, y, ()), "moved: there must be a sample and a temperature at least, got 4 and 0"),
        (lambda v, y: moved(v[:0], y[:0]), "got 0 and 14"),
        (lambda v, y: moved(v, y + 3), r"moved: labels must be in \[0, 3\), got 3 to 5"),
        (lambda v, y: moved(v * math.inf, y), "moved: the teacher's outputs must be finite"),
        (lambda v, y: moved(v, y, student_logits=v[:2]), r"moved: student \(2, 3\)"),
        (lambda v, y: recommend(moved(v, y, (2.0, 1.0)), 3), r"recommend: rows must rise with T, .*\[2.0, 1.0\]; sort"),
        (lambda v, y: recommend([], 3), "recommend: rows must rise with T, at least one"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    v = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AerogelError, match=message):
        call(v, torch.tensor([0, 1, 2, 0]))
