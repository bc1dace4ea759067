"""Agreement, confusion and ECE against values computed by hand, and the laws that hold for any logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aerogel.distill.agreement import agreement, calibration, calibration_error, confusion
from aerogel.errors import AerogelError


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Whose softmax are these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


TEACHER = logits((0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.3, 0.3, 0.4), (0.2, 0.5, 0.3))
STUDENT = logits((0.6, 0.3, 0.1), (0.5, 0.4, 0.1), (0.1, 0.2, 0.7), (0.1, 0.8, 0.1))


def test_agreement_is_the_share_of_equal_answers() -> None:
    assert agreement(STUDENT, TEACHER) == 3 / 4
    assert agreement(TEACHER, TEACHER) == 1


def test_the_teachers_answers_go_down_and_the_students_across() -> None:
    assert confusion(STUDENT, TEACHER).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_ece_by_hand() -> None:
    """Two bins. Confidence 0.6, 0.5 | 0.7, 0.8 with the labels below: 0.5 lies in (0, 0.5], the others in (0.5, 1].
    |1 - 0.5| / 4 + 3 / 4 * |2 / 3 - 0.7| = 0.125 + 0.025."""
    labels = torch.tensor([0, 0, 2, 0])
    found = calibration(STUDENT, labels, bins=2)
    assert found.counts.tolist() == [1, 3]
    assert found.confidence.tolist() == pytest.approx([0.5, 0.7])
    assert found.accuracy.tolist() == pytest.approx([1.0, 2 / 3])
    assert found.error == pytest.approx(0.15)
    assert calibration_error(STUDENT, labels, bins=2) == found.error


def test_bins_are_open_below_and_closed_above() -> None:
    half = torch.zeros(1, 2)  # a confidence of 1/2 exactly
    assert calibration(half, torch.tensor([0]), bins=4).counts.tolist() == [0, 1, 0, 0]
    sure = torch.tensor([[0.0, -1e4]])  # of 1 exactly
    assert calibration(sure, torch.tensor([0])).counts.tolist() == [0] * 14 + [1]
    assert calibration_error(sure, torch.tensor([0])) == 0
    assert calibration_error(sure, torch.tensor([1])) == 1


@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), classes=st.integers(2, 9), bins=st.integers(1, 20))
def test_laws(seed: int, n: int, classes: int, bins: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, n, classes, generator=draw)
    labels = torch.randint(classes, (n,), generator=draw)
    counts = confusion(student, teacher)
    assert counts.sum() == n
    assert counts.diag().sum() / n == pytest.approx(agreement(student, teacher))
    assert torch.equal(counts.T, confusion(teacher, student))
    found = calibration(student, labels, bins)
    assert found.counts.sum() == n
    assert 0 <= found.error <= 1
    right = (student.argmax(1) == labels).double().mean()
    assert (found.counts * found.accuracy).sum() / n == pytest.approx(float(right))
    # one bin: the gap of the means, which no finer division makes smaller
    whole = calibration_error(student, labels, 1)
    assert whole == pytest.approx(abs(float(right - student.double().softmax(1).amax(1).mean())), abs=1e-12)
    assert found.error >= whole - 1e-12
    assert calibration_error(student.flip(0), labels.flip(0), bins) == pytest.approx(found.error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agreement(STUDENT, TEACHER[:, :2]), r"agreement: student \(4, 3\) and teacher \(4, 2\) must give"),
        (lambda: agreement(STUDENT[:0], TEACHER[:0]), "agreement: logits must be finite and of 1 sample .* got 0"),
        (lambda: agreement(STUDENT * math.nan, TEACHER), "agreement: logits must be finite"),
        (lambda: confusion(STUDENT, TEACHER / 0), "confusion: the teacher's outputs must be finite"),
        (lambda: calibration(STUDENT, torch.arange(4)), r"calibration: labels must be in \[0, 3\), got 0 to 3"),
        (lambda: calibration(STUDENT, torch.zeros(4)), "calibration: labels must be class numbers"),
        (lambda: calibration(STUDENT, torch.zeros(4, dtype=torch.int64), 0), "calibration: bins must be >= 1, got 0"),
        (lambda: calibration_error(STUDENT * math.inf, torch.arange(4)), "calibration: logits must be finite"),
    ],
    ids=["shapes", "none", "student_nan", "teacher_inf", "label_3", "float_labels", "no_bin", "inf"],
)  # fmt: skip
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(AerogelError, match=message):
        call()
