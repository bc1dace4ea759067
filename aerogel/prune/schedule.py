"""Schedules: how much of a network is left after which cut.

A schedule is a pure function `(step, total, final) -> share to keep` after cut number `step` of `total`, 1 before the
first and `final` after the last; `final` and all shares are of the original network.

one-shot   all of it at the last cut (Li et al. 2017, arXiv:1608.08710, calls it prune once and retrain).
iterative  Han et al. 2015, arXiv:1506.02626, section 3.4: train, score, cut, retrain, repeat. The paper leaves the
           rounds' sizes open; here every round takes the same share of what is left, as in Frankle and Carbin 2019,
           arXiv:1803.03635, section 2:  kept = final^(step / total)
gradual    Zhu and Gupta 2017, arXiv:1710.01878, equation 1, from sparsity 0: fast while there is plenty, slow at the
           end, within one training run.  kept = final + (1 - final) (1 - step / total)^3
linear     kept = 1 - (1 - final) step / total

Differs: the papers' sparsity is the share of zero weights; here it is of any metric that a cut can be aimed at.
"""

from __future__ import annotations

from collections.abc import Callable

from aerogel.errors import CutError

Schedule = Callable[[int, int, float], float]


def one_shot(step: int, total: int, final: float) -> float:
    """1 until the last cut, then `final`."""
    _check("one_shot", step, total, final)
    return final if step == total else 1.0


def iterative(step: int, total: int, final: float) -> float:
    """Every cut takes the same share of what is left."""
    _check("iterative", step, total, final)
    return final ** (step / total)


def gradual(step: int, total: int, final: float) -> float:
    """The cubic ramp of Zhu and Gupta."""
    _check("gradual", step, total, final)
    return final + (1 - final) * (1 - step / total) ** 3


def linear(step: int, total: int, final: float) -> float:
    """Every cut takes the same share of the original."""
    _check("linear", step, total, final)
    return 1 - (1 - final) * step / total


SCHEDULES: dict[str, Schedule] = {
    "one-shot": one_shot,
    "iterative": iterative,
    "gradual": gradual,
    "linear": linear,
}


def cut_points(steps: int, cuts: int, ramp: float = 0.5) -> tuple[int, ...]:
    """After which steps of a training of `steps` the cuts are made: evenly over its first `ramp`, the rest recovers.

    Steps count from 1. Raises CutError when there are fewer steps than cuts in the ramp.
    """
    if not 0 < ramp <= 1:
        raise CutError(f"cut_points: ramp must be a share of the training in (0, 1], got {ramp!r}; 0.5 is usual")
    if cuts < 1 or cuts > ramp * steps:
        raise CutError(
            f"cut_points: {cuts} cuts do not fit into {ramp:g} of {steps} training steps, one step or more for each; "
            "make fewer cuts or train longer"
        )
    return tuple(max(1, round(ramp * steps * k / cuts)) for k in range(1, cuts + 1))


def _check(caller: str, step: int, total: int, final: float) -> None:
    if total < 1 or not 0 <= step <= total:
        raise CutError(f"{caller}: step must be in [0, total] and total at least 1, got {step=}, {total=}")
    if not 0 < final <= 1:
        raise CutError(f"{caller}: final must be a share to keep in (0, 1], got {final!r}")
