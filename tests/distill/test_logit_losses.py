"""Losses on logits: by hand with plain numbers, their laws, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.distill import (
    confidence_weighted_loss,
    deep_supervision_loss,
    dist_loss,
    dkd_loss,
    ensemble_logits,
    logit_mse_loss,
    mixed,
    nkd_loss,
    soft_target_loss,
    standardised,
    standardised_loss,
)
from aerogel.distill.dist import pearson
from aerogel.distill.dkd import decoupled
from aerogel.errors import AerogelError

law = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 10**6)
Loss = Callable[..., Tensor]
PLAIN: list[Any] = [logit_mse_loss, standardised_loss, dist_loss]
LABELLED: list[Any] = [dkd_loss, nkd_loss, confidence_weighted_loss]
STUDENT = [[1.0, 0.0, -2.0], [0.5, 3.0, 1.0]]
TEACHER = [[2.0, -1.0, 0.5], [0.0, 1.0, 4.0]]
LABELS = [0, 2]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def without(row: list[float], label: int) -> list[float]:
    return [z for i, z in enumerate(row) if i != label]


def rows() -> list[tuple[list[float], list[float], int]]:
    return list(zip(STUDENT, TEACHER, LABELS, strict=True))


def on_rows(loss: Loss, *labels: Tensor, **options: float) -> float:
    return loss(torch.tensor(STUDENT).double(), torch.tensor(TEACHER).double(), *labels, **options).item()


def test_logit_mse_by_hand() -> None:
    expected = []
    for s, t, _ in rows():
        z, v = [x - sum(s) / 3 for x in s], [x - sum(t) / 3 for x in t]
        expected.append(sum((a - b) ** 2 for a, b in zip(z, v, strict=True)) / (2 * 3))
    assert on_rows(logit_mse_loss) == pytest.approx(sum(expected) / 2)


@law
@given(seeds)
def test_logit_mse_is_what_soft_targets_become(seed: int) -> None:
    """Hinton et al., section 2.1; without T^2, or with a mean over classes too, they would not meet."""
    student, teacher = draw(seed, 2, 4, 5)
    student.requires_grad_()
    grads = [
        torch.autograd.grad(loss, student)[0]
        for loss in (logit_mse_loss(student, teacher), soft_target_loss(student, teacher, 2000.0))
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=2e-3)
    z, v = (x.detach() - x.detach().mean(1, keepdim=True) for x in (student, teacher))
    torch.testing.assert_close(grads[0], (z - v) / 5 / 4)


def test_standardised_by_hand() -> None:
    def scaled(row: list[float]) -> list[float]:
        return ((np.array(row) - np.mean(row)) / np.std(row)).tolist()

    expected = [9 * kl(softmax(scaled(t), 3), softmax(scaled(s), 3)) for s, t, _ in rows()]
    assert on_rows(standardised_loss, temperature=3.0) == pytest.approx(sum(expected) / 2, rel=1e-5)


@law
@given(seeds, st.floats(0.1, 30), st.floats(-9, 9))
def test_standardised_sees_neither_scale_nor_shift(seed: int, scale: float, shift: float) -> None:
    student, teacher = draw(seed, 2, 4, 5)
    found = standardised_loss(scale * student + shift, teacher)
    torch.testing.assert_close(found, standardised_loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_equal_logits_standardised_are_zeros_with_a_gradient() -> None:
    logits = torch.full((2, 4), 3.0, requires_grad=True)
    found = standardised(logits)
    assert found.tolist() == [[0.0] * 4] * 2
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_by_hand(temperature: float) -> None:
    expected = 0.0
    for s, t, label in rows():
        q, p = softmax(s, temperature), softmax(t, temperature)
        target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        rest = kl(softmax(without(t, label), temperature), softmax(without(s, label), temperature))
        expected += temperature**2 * (0.5 * target + 3 * rest) / 2
    found = on_rows(dkd_loss, torch.tensor(LABELS), temperature=temperature, alpha=0.5, beta=3.0)
    assert found == pytest.approx(expected)


@law
@given(seeds, st.floats(0.5, 20))
def test_soft_targets_are_the_two_parts_of_dkd(seed: int, temperature: float) -> None:
    """Eq. 6 of the paper: KD = TCKD + (1 - p_t) NCKD."""
    student, teacher = 3 * draw(seed, 2, 6, 4)
    labels = torch.arange(6) % 4
    target, rest = decoupled(student / temperature, teacher / temperature, labels)
    sure = (teacher / temperature).softmax(1)[torch.arange(6), labels]
    found = temperature**2 * (target + (1 - sure) * rest).mean()
    torch.testing.assert_close(found, soft_target_loss(student, teacher, temperature))


def test_dkd_of_a_teacher_that_is_sure_stays_finite() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    loss = dkd_loss(student, torch.tensor([[400.0, 0.0, -400.0]]), torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_nkd_by_hand() -> None:
    expected = 0.0
    for s, t, label in rows():
        rest_t, rest_s = softmax(without(t, label), 2), softmax(without(s, label), 2)
        rest = -sum(a * math.log(b) for a, b in zip(rest_t, rest_s, strict=True))
        expected += (-softmax(t)[label] * math.log(softmax(s)[label]) + 1.5 * 4 * rest) / 2
    assert on_rows(nkd_loss, torch.tensor(LABELS), temperature=2.0) == pytest.approx(expected)


def test_nkd_asks_nothing_of_the_others_once_they_agree() -> None:
    logits = draw(0, 1, 4).requires_grad_()
    both = [nkd_loss(logits, logits.detach(), torch.tensor([1]), gamma=gamma) for gamma in (0.0, 5.0)]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in both]
    torch.testing.assert_close(grads[0], grads[1])


def test_dist_by_hand() -> None:
    q, p = (np.array([softmax(row, 4) for row in logits]) for logits in (STUDENT, TEACHER))
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    assert on_rows(dist_loss, inter_weight=2.0, intra_weight=3.0) == pytest.approx(2 * inter + 3 * intra)


@law
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_correlation_sees_neither_scale_nor_shift(seed: int, scale: float, shift: float) -> None:
    one, other = draw(seed, 2, 3, 6)
    torch.testing.assert_close(pearson(scale * one + shift, other), pearson(one, other))
    assert (pearson(one, other).abs() <= 1 + 1e-9).all()


def test_a_column_without_spread_has_a_gradient() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    dist_loss(student, torch.tensor([[1.0, 2.0, 3.0]])).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_confidence_weighted_by_hand() -> None:
    weights = [max(softmax(t)) for t in TEACHER]
    losses = [-math.log(softmax(s)[label]) for s, _, label in rows()]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert on_rows(confidence_weighted_loss, torch.tensor(LABELS)) == pytest.approx(expected)


def test_deep_supervision_by_hand() -> None:
    deepest, labels = torch.tensor(TEACHER, requires_grad=True), torch.tensor(LABELS)
    shallow = torch.tensor(STUDENT, requires_grad=True)
    found = deep_supervision_loss([shallow, shallow], deepest, labels, temperature=2.0, alpha=0.25)
    hard = sum(-math.log(softmax(s)[label]) for s, _, label in rows()) / 2
    soft = sum(4 * kl(softmax(t, 2), softmax(s, 2)) for s, t, _ in rows()) / 2
    assert found.item() == pytest.approx(2 * (0.75 * hard + 0.25 * soft), rel=1e-5)
    found.backward()
    assert deepest.grad is None
    assert shallow.grad is not None


@law
@given(seeds)
@pytest.mark.parametrize("loss", [*PLAIN, dkd_loss])
def test_zero_when_equal_and_never_negative(loss: Loss, seed: int) -> None:
    student, teacher = 2 * draw(seed, 2, 5, 4)
    labels = [torch.arange(5) % 4] if loss is dkd_loss else []
    assert abs(loss(student, student, *labels).item()) < 1e-9
    assert loss(student, teacher, *labels).item() > 0


@pytest.mark.parametrize("loss", [logit_mse_loss, dist_loss])
def test_symmetric(loss: Loss) -> None:
    one, other = draw(1, 2, 5, 4)
    torch.testing.assert_close(loss(one, other), loss(other, one))


@pytest.mark.parametrize("loss", [soft_target_loss, logit_mse_loss, standardised_loss, *LABELLED])
def test_the_mean_over_the_batch(loss: Loss) -> None:
    """Twice the batch is the same loss: none is summed over samples, and none is divided by classes by mistake."""
    student, teacher = draw(2, 2, 5, 4)
    labels = [torch.arange(5) % 4] if loss in LABELLED else []
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1), *(x.repeat(2) for x in labels))
    torch.testing.assert_close(twice, loss(student, teacher, *labels))


@pytest.mark.parametrize("loss", [soft_target_loss, standardised_loss, dkd_loss, nkd_loss])
def test_the_gradient_keeps_its_size_with_the_temperature(loss: Loss) -> None:
    """Without T^2 it would fall by 100 from T = 20 to T = 200."""
    teacher, sizes = draw(3, 5, 4), []
    labels = [torch.arange(5) % 4] if loss in LABELLED else []
    for temperature in (20.0, 200.0):
        student = draw(4, 5, 4).requires_grad_()
        loss(student, teacher, *labels, temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


@pytest.mark.parametrize("loss", [*PLAIN, *LABELLED])
def test_other_classes_and_numbers_that_are_none_are_refused(loss: Loss) -> None:
    labels = [torch.zeros(2, dtype=torch.int64)] if loss in LABELLED else []
    name = f"^{loss.__name__}"
    with pytest.raises(AerogelError, match=rf"{name}: student \(2, 3\) and teacher \(2, 4\).*same classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), *labels)
    bad = torch.tensor([[0.0, math.nan, 1.0], [0.0, math.inf, 1.0]])
    with pytest.raises(AerogelError, match=rf"{name}: the teacher's outputs must be finite, got 2 of 6"):
        loss(torch.zeros(2, 3), bad, *labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("loss", [standardised_loss, dist_loss, dkd_loss, nkd_loss])
def test_a_bad_temperature_is_refused(loss: Loss, temperature: float) -> None:
    labels = [torch.zeros(2, dtype=torch.int64)] if loss in LABELLED else []
    with pytest.raises(AerogelError, match=rf"^{loss.__name__}: temperature must be > 0 and finite, got {temperature}"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), *labels, temperature=temperature)


@pytest.mark.parametrize("loss", LABELLED)
def test_bad_labels_are_refused(loss: Loss) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(AerogelError, match=r"labels must be in \[0, 3\), got 1 to 3; count classes from 0"):
        loss(logits, logits, torch.tensor([1, 3]))
    with pytest.raises(AerogelError, match=r"labels must be class numbers, int64 \(2,\), got torch.float32 \(2, 3\)"):
        loss(logits, logits, torch.zeros(2, 3))
    with pytest.raises(AerogelError, match="there must be at least 2 classes, got 1"):
        loss(logits[:, :1], logits[:, :1], torch.tensor([0, 0]))


def test_negative_parts_are_refused() -> None:
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AerogelError, match="dkd_loss: beta must be >= 0 and finite, got -1"):
        dkd_loss(logits, logits, labels, beta=-1)
    with pytest.raises(AerogelError, match="nkd_loss: gamma must be >= 0"):
        nkd_loss(logits, logits, labels, gamma=math.nan)
    with pytest.raises(AerogelError, match="dist_loss: intra_weight must be >= 0"):
        dist_loss(logits, logits, intra_weight=-1)
    with pytest.raises(AerogelError, match=r"alpha must be in \[0, 1\] and exits not empty, got 2 and 1"):
        deep_supervision_loss([logits], logits, labels, alpha=2)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_ensembles_by_hand(temperature: float) -> None:
    members = torch.tensor([STUDENT, TEACHER])
    weights = [1.0, 3.0]
    for number in range(2):
        one, two = (softmax(m[number], temperature) for m in (STUDENT, TEACHER))
        mean = [0.25 * a + 0.75 * b for a, b in zip(one, two, strict=True)]
        product = [a**0.25 * b**0.75 for a, b in zip(one, two, strict=True)]
        expected = {"arithmetic": mean, "geometric": [x / sum(product) for x in product]}
        for combine, p in expected.items():
            found = (ensemble_logits(members, weights, combine, temperature) / temperature).softmax(1)[number]
            assert found.tolist() == pytest.approx(p, rel=1e-5)


@law
@given(seeds, st.sampled_from(["arithmetic", "geometric"]))
def test_an_ensemble_of_equals_is_one(seed: int, combine: str) -> None:
    logits = draw(seed, 3, 4)
    found = ensemble_logits(torch.stack([logits] * 3), [0.2, 0, 5], combine, 2.0)
    torch.testing.assert_close(found.softmax(1), logits.softmax(1))


def test_bad_ensembles_are_refused() -> None:
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(AerogelError, match="combine must be arithmetic or geometric, got 'mean'"):
        ensemble_logits(logits, combine="mean")
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(AerogelError, match="weights must be 2 numbers >= 0 with a positive sum"):
            ensemble_logits(logits, weights)
    with pytest.raises(AerogelError, match=r"logits must be \(teachers, n, classes\)"):
        ensemble_logits(logits[0])


def test_mixing_is_one_share_of_neighbours() -> None:
    inputs = draw(5, 4, 2, 3)
    found = mixed(inputs, torch.Generator().manual_seed(7))
    share = torch.rand((), generator=torch.Generator().manual_seed(7)).item()
    for i in range(4):
        torch.testing.assert_close(found[i], share * inputs[i] + (1 - share) * inputs[i - 1])
    torch.testing.assert_close(found.mean(0), inputs.mean(0))
