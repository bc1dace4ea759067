"""Soft targets: the loss by hand and its laws; the objective leaves the teacher as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.distill import SoftTargets, soft_target_loss
from aerogel.errors import AerogelError

temperatures = st.floats(0.5, 50)
law = settings(deadline=None, max_examples=25)  # the first call of a kernel may be slow


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, float64 (n, C)."""
    n, classes = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.floats(0.1, 20))
    student, teacher = scale * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_by_hand(temperature: float) -> None:
    student, teacher = [[1.0, 0.0], [0.0, 3.0]], [[2.0, -2.0], [0.0, 0.0]]

    def softened(row: list[float]) -> list[float]:
        powers = [math.exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    rows = [
        sum(p * math.log(p / q) for p, q in zip(softened(t), softened(s), strict=True))
        for s, t in zip(student, teacher, strict=True)
    ]
    found = soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.shape == ()
    assert found.item() == pytest.approx(temperature**2 * (rows[0] + rows[1]) / 2, rel=1e-5)


def test_known_number() -> None:
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln 2 - ln(3) / 2."""
    found = soft_target_loss(torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2), 1.0)
    assert found.item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)


@law
@given(logit_pairs(), temperatures)
def test_never_negative_and_zero_for_equal_distributions(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = pair
    assert soft_target_loss(student, teacher, temperature) >= -1e-10
    assert soft_target_loss(student, student, temperature) == 0


@law
@given(logit_pairs(), temperatures, st.floats(-30, 30), st.floats(-30, 30))
def test_a_constant_added_to_logits_changes_nothing(
    pair: tuple[Tensor, Tensor], temperature: float, one: float, other: float
) -> None:
    student, teacher = pair
    shifted = soft_target_loss(student + one, teacher + other, temperature)
    torch.testing.assert_close(shifted, soft_target_loss(student, teacher, temperature), rtol=1e-6, atol=1e-8)


@law
@given(logit_pairs(), temperatures)
def test_mean_over_the_batch_and_not_over_classes(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = pair
    rows = [soft_target_loss(s[None], t[None], temperature) for s, t in zip(student, teacher, strict=True)]
    found = soft_target_loss(student, teacher, temperature)
    torch.testing.assert_close(found, torch.stack(rows).mean(), rtol=1e-6, atol=1e-10)
    twice = soft_target_loss(student.repeat(2, 1), teacher.repeat(2, 1), temperature)
    torch.testing.assert_close(twice, found, rtol=1e-6, atol=1e-10)


@law
@given(logit_pairs(), st.sampled_from([100.0, 300.0, 1000.0]))
def test_at_high_temperature_it_matches_logits(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    """Section 2.1: for zero-mean logits the gradient tends to (z - v) / N; T^2 is in the loss already."""
    z, v = (logits / logits.abs().max().clamp_min(1) for logits in pair)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_target_loss(z, v, temperature), z)
    expected = (z - v).detach() / z.shape[1] / len(z)  # the loss is the batch's mean
    assert torch.allclose(gradient, expected, rtol=0, atol=2 / temperature)


def test_the_gradient_keeps_its_size() -> None:
    """Without T^2 it would fall by 10,000 between the two."""
    sizes = []
    for temperature in (2.0, 200.0):
        z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        soft_target_loss(z, torch.tensor([[-1.0, 0.0, 1.0]]), temperature).backward()
        assert z.grad is not None
        sizes.append(z.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature_is_refused(temperature: float) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(AerogelError, match=f"^soft_target_loss: temperature must be > 0 and finite, got {temperature}"):
        soft_target_loss(logits, logits, temperature)
    with pytest.raises(AerogelError, match=f"^SoftTargets: temperature must be > 0 and finite, got {temperature}"):
        SoftTargets(nn.Identity(), temperature)


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((2, 3), (3,)), ((3,), (3,)), ((2, 3, 4), (2, 3, 4))]
)
def test_shapes_must_be_those_of_logits(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(
        AerogelError, match=r"student \(.*\) and teacher \(.*\) must give logits of one shape \(n, classes\)"
    ):
        soft_target_loss(torch.zeros(student), torch.zeros(teacher))


class Watched(nn.Module):
    """A teacher with a norm and dropout, that notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.calls = list[tuple[bool, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.body(x)


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)


def test_the_objective_by_hand(batch: Batch) -> None:
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    losses = SoftTargets(teacher, temperature=2.0, hard_weight=0.3, soft_weight=5.0)(student, batch)
    assert losses.keys() == {"hard", "soft"}
    logits = student(batch.inputs)
    torch.testing.assert_close(losses["hard"], 0.3 * F.cross_entropy(logits, batch.labels))
    torch.testing.assert_close(losses["soft"], 5.0 * soft_target_loss(logits, teacher(batch.inputs), 2.0))


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_left_alone(training: bool, batch: Batch) -> None:
    teacher, student = Watched().train(training), nn.Linear(4, 3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = SoftTargets(teacher)
    one, again = objective(student, batch), objective(student, batch)
    sum(one.values(), torch.zeros(())).backward()

    assert teacher.calls == [(False, False)] * 2  # in eval mode, and no graph is built through it
    assert one["soft"] == again["soft"]  # its dropout is off
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(module.training == training for module in teacher.modules())
    assert all(p.grad is not None for p in student.parameters())


def test_a_network_may_be_its_own_teacher(batch: Batch) -> None:
    net = Watched()
    SoftTargets(net)(net, batch)
    assert net.calls == [(False, False), (True, True)]


def test_other_classes_are_refused(batch: Batch) -> None:
    with pytest.raises(AerogelError, match=r"student \(6, 3\) and teacher \(6, 5\).*do they have the same classes"):
        SoftTargets(nn.Linear(4, 5))(nn.Linear(4, 3), batch)
