"""What the temperature does to one teacher's answers. Hinton, Vinyals, Dean 2015, arXiv:1503.02531, sections 2 and 3.

p_T = softmax(v / T), q_T = softmax(z / T), v the teacher's logits, z the student's, N classes, y the label
entropy     H(p_T) = -sum p_T log p_T in nats; exp(H) classes share the probability, from 1 to N
gradient    of T^2 KL(p_T || q_T) by z: g_T = T (q_T - p_T); its sum over the classes is 0
limit       g_T -> ((z - mean z) - (v - mean v)) / N as T grows: matching logits (equations 3 and 4)
wrong       the share of |g_T| on the classes other than y. It is 1/2 or more: at 1/2 all of them are pushed the same
            way, against y, as a label does; what is above 1/2 pushes some up and others down
balance     |g_T| / |g_hard|, g_hard = q_1 - onehot(y): how loud the soft loss is beside the hard one at equal weights
negative    the share of |g_T| on classes whose teacher's logit is below the sample's mean: what a low T leaves out
The ranking of the classes is that of v at every T.

`recommend` is a heuristic. The paper says that a low T ignores the very negative logits, which may be noise or may hold
what the teacher learned; that a high T is logit matching; that with 300 units or more any T above 8 did alike, and with
30 units 2.5 to 4 did best. So, of the temperatures asked for:
low         the first at which the wrong classes together have a probability of WRONG on average: below it, soft targets
            are labels
high        the first at which the gradient at the start of training (z = 0) points where its limit does: the cosine is
            ALIGNED on average. Above it T changes the size of the gradient, a little, and next to nothing else
small       for a student that cannot learn all of it, the first at which exp(H) is NAMED of N or more, on average, no
            higher than `high`: the classes that look alike are heard, the others not yet
The three numbers were chosen so that an MLP on MNIST gives about the paper's 8 and 2.5 to 4 (it gives 10 and 3).
benchmarks/temperature.py trains students to see whether they agree: they do for 300 units, on two data sets; for 30
units `small` is too high on one of them (docs/distill.md).
Letters: n samples, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.distill.checks import check_labels, check_logits, check_temperature
from aerogel.errors import AerogelError

TEMPERATURES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 40.0)
RANKED = 10
WRONG, ALIGNED, NAMED = 0.05, 0.95, 0.25


def softened(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T): (n, N) -> (n, N). Raises AerogelError for a bad temperature."""
    check_temperature("softened", temperature)
    return (logits / temperature).softmax(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """H(p_T) in nats, in [0, log N]: (n, N) -> (n,). Raises AerogelError for a bad temperature."""
    check_temperature("entropy", temperature)
    log_p = (logits / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def gradient(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """g_T of each sample by itself: (n, N), (n, N) -> (n, N). Raises AerogelError as `soft_target_loss`."""
    check_temperature("gradient", temperature)
    check_logits("gradient", student_logits, teacher_logits)
    return temperature * (softened(student_logits, temperature) - softened(teacher_logits, temperature))


def limit(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """What `gradient` tends to as T grows: (n, N), (n, N) -> (n, N)."""
    check_logits("limit", student_logits, teacher_logits)
    apart = student_logits - teacher_logits
    return (apart - apart.mean(-1, keepdim=True)) / apart.shape[-1]


def hard_gradient(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Of the cross-entropy with the labels, at T = 1: (n, N), (n,) -> (n, N)."""
    check_labels("hard_gradient", labels, student_logits)
    return student_logits.softmax(-1) - torch.eye(student_logits.shape[-1]).to(student_logits)[labels]


def wrong_share(gradients: Tensor, labels: Tensor) -> Tensor:
    """The share of the wrong classes: (n, N), (n,) -> (n,) in [1/2, 1]; 1/2 where there is no gradient at all."""
    check_labels("wrong_share", labels, gradients)
    size = gradients.abs()
    total, right = size.sum(-1), size.gather(-1, labels[:, None])[:, 0]
    return torch.where(total > 0, 1 - right / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)


def negative_share(gradients: Tensor, teacher_logits: Tensor) -> Tensor:
    """The share of the classes that the teacher's logits put below their mean: (n, N), (n, N) -> (n,) in [0, 1]."""
    size, below = gradients.abs(), teacher_logits < teacher_logits.mean(-1, keepdim=True)
    return (size * below).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)


def same_ranking(logits: Tensor, temperature: float) -> Tensor:
    """Whether p_T ranks the classes as the logits do, equal ones apart: (n, N) -> bool (n,)."""
    ordered = softened(logits, temperature).gather(-1, logits.argsort(-1))
    return (ordered.diff(dim=-1) >= 0).all(-1)


@dataclass(frozen=True)
class Moved:
    """What is so at one T, means over the samples. start: the soft gradient for a student that knows nothing (z = 0);
    student: for the student's own logits."""

    temperature: float
    entropy: float  # nats
    classes: float  # exp(entropy), the mean
    right: float  # probability of the labelled class
    wrong: float  # of all others together
    second: float  # of the likeliest of the others
    ranked: tuple[float, ...]  # of each sample's likeliest classes, at most RANKED: the mean first, second, ...
    same_ranking: float  # share of samples
    start: Pull
    student: Pull | None


@dataclass(frozen=True)
class Pull:
    """Means over the samples. size: |g_T|; aligned: the cosine with the limit."""

    size: float
    wrong_share: float
    negative_share: float
    balance: float
    aligned: float


@dataclass(frozen=True)
class Recommended:
    """low, high, small: see the head of this file; reasons: why, in words."""

    low: float
    high: float
    small: float
    reasons: tuple[str, ...]


def moved(
    teacher_logits: Tensor, labels: Tensor, temperatures: Sequence[float] = TEMPERATURES,
    student_logits: Tensor | None = None,
) -> list[Moved]:  # fmt: skip
    """A row for each T, over all samples: (n, N), (n,), None or (n, N).

    Raises AerogelError for a bad temperature, no sample, other shapes, bad labels, and logits that are not finite.
    """
    v = teacher_logits.detach().double()
    check_logits("moved", v if student_logits is None else student_logits, v)
    check_labels("moved", labels, v)
    if not len(v) or not len(temperatures):
        raise AerogelError(
            f"moved: there must be a sample and a temperature at least, got {len(v)} and {len(temperatures)}; give some"
        )
    z = None if student_logits is None else student_logits.detach().double()
    return [_moved(v, labels, temperature, z) for temperature in temperatures]


def _moved(v: Tensor, labels: Tensor, temperature: float, z: Tensor | None) -> Moved:
    p, spread = softened(v, temperature), entropy(v, temperature)
    right = p.gather(-1, labels[:, None])[:, 0]
    second = p.scatter(-1, labels[:, None], -1.0).amax(-1)
    return Moved(
        temperature,
        entropy=float(spread.mean()),
        classes=float(spread.exp().mean()),
        right=float(right.mean()),
        wrong=float((1 - right).mean()),
        second=float(second.mean()),
        ranked=tuple(p.topk(min(RANKED, p.shape[-1])).values.mean(0).tolist()),
        same_ranking=float(same_ranking(v, temperature).double().mean()),
        start=_pull(torch.zeros_like(v), v, labels, temperature),
        student=None if z is None else _pull(z, v, labels, temperature),
    )


def _pull(z: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Pull:
    g, end, hard = gradient(z, v, temperature), limit(z, v), hard_gradient(z, labels)
    least = torch.finfo(g.dtype).tiny
    return Pull(
        size=float(g.norm(dim=-1).mean()),
        wrong_share=float(wrong_share(g, labels).mean()),
        negative_share=float(negative_share(g, v).mean()),
        balance=float(g.norm(dim=-1).mean() / hard.norm(dim=-1).mean().clamp(min=least)),
        aligned=float(F.cosine_similarity(g, end, dim=-1).mean()),
    )


def recommend(rows: Sequence[Moved], classes: int) -> Recommended:
    """The range of T to try first, and why; rows in the order of their T, as `moved` gives them.

    Raises AerogelError for rows that are none or out of order.
    """
    heats = [row.temperature for row in rows]
    if not rows or heats != sorted(heats):
        raise AerogelError(f"recommend: rows must rise with T, at least one, got T of {heats}; sort them")
    first, last = rows[0], rows[-1]
    low = next((row for row in rows if row.wrong >= WRONG), last)
    high = next((row for row in rows if row.start.aligned >= ALIGNED and row.temperature >= low.temperature), last)
    named = next((row for row in rows if row.classes >= NAMED * classes), last)
    small = min(max(named, low, key=_heat), high, key=_heat)
    reasons = [
        _of_wrong(first, low),
        f"at T = {high.temperature:g} the first gradient has a cosine of {high.start.aligned:.3f} with its limit, "
        "matching logits: "
        + ("above it T changes next to nothing" if high.start.aligned >= ALIGNED else "no T asked for is near it"),
        f"a small student, which cannot learn every logit, begins at T = {small.temperature:g}: {small.classes:.1f} "
        f"of {classes} classes share the probability, {100 * small.start.negative_share:.0f} % of the gradient is "
        f"about logits below the mean ({100 * last.start.negative_share:.0f} % at T = {last.temperature:g})",
        "a heuristic, not a law: choose among these on the validation split",
    ]
    return Recommended(low.temperature, high.temperature, small.temperature, tuple(reasons))


def _of_wrong(first: Moved, low: Moved) -> str:
    """Why the range begins where it does."""
    text = f"at T = {first.temperature:g} the wrong classes have {100 * first.wrong:.2g} % of the probability"
    if first.wrong >= WRONG:
        return f"{text}: the lowest T asked for lets them be heard"
    if low.wrong < WRONG:
        return f"{text}, at T = {low.temperature:g} {100 * low.wrong:.2g} %: no T asked for lets them be heard"
    return f"{text}, soft targets are labels there; from T = {low.temperature:g} they have {100 * low.wrong:.2g} %"


def _heat(row: Moved) -> float:
    return row.temperature


def telling(teacher_logits: Tensor, labels: Tensor, count: int = 6) -> Tensor:
    """Places of samples worth looking at: int64 (count,). The surest, the least sure, those in between at even ranks of
    their entropy at T = 1, after those that the teacher gets wrong (a third of them, the surest first)."""
    check_labels("telling", labels, teacher_logits)
    spread, wrong = entropy(teacher_logits.double(), 1.0), teacher_logits.argmax(-1) != labels
    order = spread.argsort()
    mistaken = order[wrong[order]][: count // 3]
    others = order[~torch.isin(order, mistaken)]
    left = min(count - len(mistaken), len(others))
    even = (
        torch.linspace(0, len(others) - 1, max(left, 1)).round().long() if left else torch.zeros(0, dtype=torch.int64)
    )
    return torch.cat([mistaken, others[even]])[:count]
