"""Losses on features: by hand with NumPy loops, their laws, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.distill import (
    Contrast,
    Exit,
    Projector,
    Review,
    Variational,
    angle_loss,
    attention_loss,
    contrastive_loss,
    distance_loss,
    hierarchical_loss,
    hint_loss,
    pkt_loss,
    relational_loss,
    similarity_loss,
    vid_loss,
)
from aerogel.errors import AerogelError

law = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 10**6)
Loss = Callable[..., Tensor]
RELATIONAL: list[Any] = [similarity_loss, relational_loss, pkt_loss]
ALL: list[Any] = [attention_loss, hint_loss, hierarchical_loss, *RELATIONAL]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed: int = 0, channels: tuple[int, int] = (3, 5)) -> tuple[Tensor, Tensor]:
    return draw(seed, 4, channels[0], 4, 4), draw(seed + 1, 4, channels[1], 4, 4)


def test_attention_by_hand() -> None:
    student, teacher = maps()

    def attention(feature: np.ndarray) -> np.ndarray:
        places = (np.abs(feature) ** 2).mean(0).ravel()
        return places / np.sqrt((places**2).sum())

    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    expected = np.mean([(attention(s) - attention(t)) ** 2 for s, t in pairs])
    assert attention_loss(student, teacher).item() == pytest.approx(expected)


def test_attention_of_maps_of_two_sizes_is_that_of_the_averaged() -> None:
    student, teacher = draw(0, 2, 3, 8, 8), draw(1, 2, 5, 4, 4)
    averaged = student.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(attention_loss(student, teacher), attention_loss(averaged, teacher))
    torch.testing.assert_close(attention_loss(teacher, student), attention_loss(teacher, averaged))


@pytest.mark.parametrize("loss", [attention_loss, hint_loss])
def test_a_token_is_a_place(loss: Loss) -> None:
    student, teacher = maps(channels=(3, 3))
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    for one, other in ((tokens[0], tokens[1]), (student, tokens[1]), (tokens[0], teacher)):
        torch.testing.assert_close(loss(one, other), loss(student, teacher))


def test_hints_by_hand() -> None:
    student, teacher = maps(channels=(2, 3))
    head = Projector(student, teacher).double()
    weight, bias = head.map.weight.detach().numpy(), head.map.bias.detach().numpy()
    total = 0.0
    for n in range(4):
        for y in range(4):
            for x in range(4):
                mapped = weight @ student[n, :, y, x].numpy() + bias
                total += ((mapped - teacher[n, :, y, x].numpy()) ** 2).sum()
    assert hint_loss(head(student), teacher).item() == pytest.approx(total / teacher.numel())


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((4, 3, 6, 6), (4, 5, 3, 3)), ((4, 7, 3), (4, 7, 5))])
@pytest.mark.parametrize("make", [Projector, Variational])
def test_heads_give_the_teachers_channels(make: type[nn.Module], shapes: tuple[tuple[int, ...], ...]) -> None:
    student, teacher = (torch.zeros(shape) for shape in shapes)
    given = make(student, teacher)(student)
    mean = given[0] if isinstance(given, tuple) else given
    expected = list(student.shape)
    expected[2 if student.ndim == 3 else 1] = 5
    assert list(mean.shape) == expected
    assert hint_loss(mean, teacher).shape == ()


def test_similarity_by_hand() -> None:
    student, teacher = maps()

    def rows(feature: Tensor) -> np.ndarray:
        flat = feature.numpy().reshape(4, -1)
        gram = flat @ flat.T
        return gram / np.sqrt((gram**2).sum(1, keepdims=True))

    expected = ((rows(student) - rows(teacher)) ** 2).sum() / 16
    assert similarity_loss(student, teacher).item() == pytest.approx(expected)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_distances_by_hand() -> None:
    student, teacher = draw(0, 4, 3), 3 * draw(1, 4, 5)

    def normal(feature: Tensor) -> np.ndarray:
        x = feature.numpy()
        found = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        return found / found[found > 0].mean()

    pairs = zip(normal(student).ravel(), normal(teacher).ravel(), strict=True)
    expected = np.mean([huber(s - t) for s, t in pairs])
    assert distance_loss(student, teacher).item() == pytest.approx(expected)


def test_angles_by_hand() -> None:
    student, teacher = draw(0, 4, 3), draw(1, 4, 5)

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        one, other = x[i] - x[j], x[k] - x[j]
        sizes = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / sizes) if sizes else 0.0

    total = 0.0
    for i in range(4):
        for j in range(4):
            for k in range(4):
                total += huber(cosine(student.numpy(), i, j, k) - cosine(teacher.numpy(), i, j, k))
    assert angle_loss(student, teacher).item() == pytest.approx(total / 64)
    both = 25 * distance_loss(student, teacher) + 50 * angle_loss(student, teacher)
    torch.testing.assert_close(relational_loss(student, teacher), both)


def test_pkt_by_hand() -> None:
    student, teacher = draw(0, 4, 3), draw(1, 4, 5)

    def affinity(feature: Tensor) -> np.ndarray:
        x = feature.numpy()
        kernel = np.array([[(a @ b / np.linalg.norm(a) / np.linalg.norm(b) + 1) / 2 for b in x] for a in x])
        return kernel / kernel.sum(1, keepdims=True)

    p, q = affinity(teacher), affinity(student)
    assert pkt_loss(student, teacher).item() == pytest.approx((p * np.log(p / q)).mean(), rel=1e-4)


def test_vid_by_hand() -> None:
    mean, teacher = maps(channels=(2, 2))
    variance = torch.tensor([0.5, 2.0]).double()
    expected = np.mean(
        [
            (float(teacher[n, c, y, x] - mean[n, c, y, x]) ** 2 / v + math.log(v)) / 2
            for n in range(4) for c, v in enumerate((0.5, 2.0)) for y in range(4) for x in range(4)
        ]
    )  # fmt: skip
    assert vid_loss(mean, variance, teacher).item() == pytest.approx(expected)


def test_vid_starts_from_the_papers_variance_and_learns_it() -> None:
    student, teacher = draw(0, 64, 3).float(), draw(1, 64, 2).float() * torch.tensor([0.5, 2.0])
    torch.manual_seed(0)
    head = Variational(student, teacher)
    assert head(student)[1].tolist() == pytest.approx([5.0, 5.0])
    optimizer = torch.optim.Adam([head.scale], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        mean, variance = head(student)
        vid_loss(mean.detach(), variance, teacher).backward()
        optimizer.step()
    apart = (head(student)[0] - teacher).square().mean(0)
    torch.testing.assert_close(head(student)[1].detach(), apart.detach(), rtol=0.02, atol=0.01)


def test_hierarchy_by_hand() -> None:
    student, teacher = draw(0, 2, 3, 8, 8), draw(1, 2, 3, 8, 8)
    total = 0.0
    for size, weight in ((8, 1.0), (4, 0.5), (2, 0.25), (1, 0.125)):
        pooled = [x.numpy().reshape(2, 3, size, 8 // size, size, 8 // size).mean((3, 5)) for x in (student, teacher)]
        total += weight * ((pooled[0] - pooled[1]) ** 2).mean()
    assert hierarchical_loss(student, teacher).item() == pytest.approx(total / 1.875)


def test_review_is_of_all_stages_and_trains_every_weight() -> None:
    students = [draw(0, 2, 4, 8, 8), draw(1, 2, 6, 4, 4), draw(2, 2, 8, 2, 2)]
    teachers = [draw(3, 2, 5, 8, 8), draw(4, 2, 7, 4, 4), draw(5, 2, 9, 2, 2)]
    students = [x.float().requires_grad_() for x in students]
    teachers = [x.float() for x in teachers]
    torch.manual_seed(0)
    review = Review(students, teachers)
    found = review(students, teachers)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in review.parameters())
    assert all(x.grad is not None for x in students)
    deepest, x = review.stages[2](students[2], None, torch.Size((2, 2)))
    alone = hierarchical_loss(deepest, teachers[2])
    out, x = review.stages[1](students[1], x, torch.Size((4, 4)))
    out_0, _ = review.stages[0](students[0], x, torch.Size((8, 8)))
    rest = hierarchical_loss(out, teachers[1]) + hierarchical_loss(out_0, teachers[0])
    torch.testing.assert_close(found, alone + rest)
    with pytest.raises(AerogelError, match=r"Review: features must be maps .*\[\(2, 3\)\]"):
        Review([torch.zeros(2, 3)], [torch.zeros(2, 3, 4, 4)])


def test_contrast_by_hand() -> None:
    scores = torch.tensor([[2.0, 3.0, 0.5], [1.0, 4.0, 0.25]])
    positive = torch.tensor([[True, False, False], [False, True, False]])
    negative = torch.tensor([[False, True, True], [True, False, False]])
    z, expected = 0.7, 0.0
    for anchor in range(2):
        noise = negative[anchor].sum().item() * z
        for k in range(3):
            h = scores[anchor, k].item() / (scores[anchor, k].item() + noise)
            if positive[anchor, k]:
                expected -= math.log(h)
            if negative[anchor, k]:
                expected -= math.log(1 - h)
    found = contrastive_loss(scores, positive, negative, torch.tensor(z))
    assert found.item() == pytest.approx(expected / 2, rel=1e-5)


def contrast(size: int = 6) -> tuple[Contrast, Tensor, Tensor, Tensor]:
    student, teacher = draw(0, 4, 3).float(), draw(1, 4, 5).float()
    torch.manual_seed(0)
    return Contrast(student, teacher, dim=8, size=size), student, teacher, torch.tensor([0, 1, 0, 2])


def test_the_queue_keeps_the_last_embeddings_and_their_labels() -> None:
    head, student, teacher, labels = contrast()
    head(student, teacher, labels)
    assert head.queue_labels.tolist() == [0, 1, 0, 2, -1, -1]
    torch.testing.assert_close(head.queue[0, :4], F.normalize(head.student(student), dim=1))
    torch.testing.assert_close(head.queue[1, :4], F.normalize(head.teacher(teacher), dim=1))
    scale = head.mean_score.clone()
    head(student, teacher, labels + 3)
    assert head.queue_labels.tolist() == [3, 5, 0, 2, 3, 4]
    assert head.mean_score == scale  # fixed at the start
    before = head.queue.clone()
    with torch.no_grad():
        head(student, teacher, labels)
    assert torch.equal(head.queue, before)


def test_negatives_are_of_other_classes_alone() -> None:
    """The loss of each anchor, with loops over the batch and the queue."""
    head, student, teacher, labels = contrast()
    head(student, teacher, labels)
    queue, queued = head.queue.clone(), head.queue_labels.tolist()
    ours = F.normalize(head.student(student), dim=1).detach()
    theirs = F.normalize(head.teacher(teacher), dim=1).detach()
    expected, z = 0.0, head.mean_score.item()
    for anchors, batch, held in ((ours, theirs, queue[1]), (theirs, ours, queue[0])):
        for a in range(4):
            others = [batch[b] for b in range(4) if labels[b] != labels[a]]
            others += [row for row, label in zip(held, queued, strict=True) if label not in (-1, int(labels[a]))]
            e = math.exp(float(anchors[a] @ batch[a]) / 0.07)
            expected -= math.log(e / (e + len(others) * z))
            for row in others:
                e = math.exp(float(anchors[a] @ row) / 0.07)
                expected -= math.log(1 - e / (e + len(others) * z))
    assert head(student, teacher, labels).item() == pytest.approx(expected / 4, rel=1e-3)


def test_an_exit_reads_the_mean_over_places() -> None:
    feature = draw(0, 2, 3, 4, 4).float()
    head = Exit(feature, classes=5)
    torch.testing.assert_close(head(feature), head.head(feature.mean((2, 3))))
    assert Exit(torch.zeros(2, 7, 3), 5)(torch.zeros(2, 7, 3)).shape == (2, 5)


@pytest.mark.parametrize("loss", ALL)
def test_zero_when_equal_and_never_negative(loss: Loss) -> None:
    student, teacher = maps(channels=(3, 3))
    assert abs(loss(student, student).item()) < 1e-12
    assert loss(student, teacher).item() > 0


@pytest.mark.parametrize("loss", [attention_loss, hint_loss, hierarchical_loss, similarity_loss, relational_loss])
def test_symmetric(loss: Loss) -> None:
    one, other = maps(channels=(3, 3))
    torch.testing.assert_close(loss(one, other), loss(other, one))


@law
@given(seeds, st.floats(0.05, 50))
@pytest.mark.parametrize("loss", [attention_loss, *RELATIONAL])
def test_scale_does_not_matter(loss: Loss, seed: int, scale: float) -> None:
    student, teacher = maps(seed)
    torch.testing.assert_close(loss(scale * student, teacher), loss(student, teacher), rtol=1e-5, atol=1e-9)


@law
@given(seeds)
@pytest.mark.parametrize("loss", [attention_loss, *RELATIONAL])
def test_the_order_of_samples_does_not_matter(loss: Loss, seed: int) -> None:
    student, teacher = maps(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@law
@given(seeds)
@pytest.mark.parametrize("loss", RELATIONAL)
def test_a_rotation_does_not_matter(loss: Loss, seed: int) -> None:
    student, teacher = draw(seed, 5, 6), draw(seed + 1, 5, 6)
    rotation = torch.linalg.qr(draw(seed + 2, 6, 6))[0]
    torch.testing.assert_close(loss(student @ rotation, teacher), loss(student, teacher), rtol=1e-6, atol=1e-9)


@law
@given(seeds, st.floats(-5, 5))
def test_relations_see_no_shift(seed: int, shift: float) -> None:
    student, teacher = draw(seed, 5, 6), draw(seed + 1, 5, 4)
    torch.testing.assert_close(relational_loss(student + shift, teacher), relational_loss(student, teacher))


@pytest.mark.parametrize("loss", ALL)
def test_the_gradient_reaches_the_student_also_from_equal_samples(loss: Loss) -> None:
    teacher = maps(channels=(3, 3))[1]
    for student in (maps(channels=(3, 3))[0], torch.ones(4, 3, 4, 4).double(), torch.zeros(4, 3, 4, 4).double()):
        student = student.clone().requires_grad_()
        loss(student, teacher).backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    moved = maps(channels=(3, 3))[0].requires_grad_()
    loss(moved, teacher).backward()
    assert moved.grad is not None
    assert moved.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ALL)
def test_what_is_no_pair_of_features_is_refused(loss: Loss) -> None:
    good = torch.zeros(2, 3, 4, 4)
    with pytest.raises(AerogelError, match="student and teacher must see the same samples, got 2 and 3"):
        loss(good, torch.zeros(3, 3, 4, 4))
    with pytest.raises(AerogelError, match=r"the student's feature must be .*got torch.int64 \(2, 3, 4, 4\)"):
        loss(good.long(), good)
    with pytest.raises(AerogelError, match=r"the teacher's feature must be .*\(2, 3, 4, 4, 1\)"):
        loss(good, good[..., None])
    with pytest.raises(AerogelError, match="the teacher's features must be finite, got 96 of 96"):
        loss(good, good / 0)


def test_what_each_refuses() -> None:
    feature = torch.zeros(2, 3, 4, 4)
    with pytest.raises(AerogelError, match=r"attention_loss: features must have places.*\(2, 3\).*before the pooling"):
        attention_loss(torch.zeros(2, 3), feature)
    with pytest.raises(AerogelError, match="power must be > 0, got 0"):
        attention_loss(feature, feature, power=0)
    with pytest.raises(AerogelError, match="16 places of the student and 9 of the teacher do not match"):
        attention_loss(feature, torch.zeros(2, 9, 3))
    with pytest.raises(AerogelError, match="equally many channels, got 3 and 5; put a Projector"):
        hint_loss(feature, torch.zeros(2, 5, 4, 4))
    with pytest.raises(AerogelError, match="hierarchical_loss: features must be maps of one shape"):
        hierarchical_loss(feature, torch.zeros(2, 3, 2, 2))
    with pytest.raises(AerogelError, match=r"vid_loss: .*got 3, 3 and \(2,\)"):
        vid_loss(feature, torch.ones(2), feature)
    with pytest.raises(AerogelError, match="angle_weight must be >= 0 and finite, got -1"):
        relational_loss(feature, feature, angle_weight=-1)
    with pytest.raises(AerogelError, match=r"dim, size and tau must be > 0, got 128, 0 and 0\.07"):
        Contrast(feature, feature, size=0)
