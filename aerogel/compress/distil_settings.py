"""The [distill] table of a run's config.toml, and how `--loss` and `--tap` are spelled on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aerogel.distill import LOSSES
from aerogel.distill.objective import LABELLED
from aerogel.errors import AerogelError, nearest

Weight = Annotated[float, Field(ge=0)]
# What a loss weighs where the user names it without a number: the papers' weights, as docs/distill.md has them.
USUAL: dict[str, float] = dict.fromkeys(LOSSES, 1.0) | {
    "kd": 0.9, "logit_mse": 0.9, "standardised": 9.0, "at": 1000.0, "sp": 3000.0, "pkt": 30_000.0, "hint": 100.0,
    "crd": 0.8,
}  # fmt: skip
SOFT = frozenset({"kd", "logit_mse", "standardised"})  # beside which the labels weigh 0.1
BESIDE_SOFT = 0.1


class Distillation(BaseModel):
    """teacher: MODEL words. teacher_weights: of the teachers that are no saved folder, in their order, all or none.

    mean, std: by channel, that teachers which do not say so themselves were trained with; None: the data's.
    losses: names with weights. taps: {student's module: teacher's}, or such a table by loss. options: by loss.
    shares: weights of several teachers, whose mean is `combine`. alone: train the same student with labels only, too.
    cache: a folder for the teachers' answers (aerogel.distill.TeacherCache), as they are or in half precision, all of
    them or the largest. keep: the student of the last step, or that of the epoch that was best on the validation split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    teacher: list[str] = Field(default_factory=list)
    teacher_weights: list[str] = Field(default_factory=list)
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    losses: dict[str, Weight] = Field(default_factory=lambda: {"kd": 0.9, "hard": 0.1}, min_length=1)
    temperature: float = Field(4.0, gt=0)
    mixup: bool = False
    shares: list[Weight] | None = None
    combine: Literal["arithmetic", "geometric"] = "arithmetic"
    autocast: Literal["none", "bf16", "fp16"] | None = None  # the teacher's; None: as the student is trained
    alone: bool = False
    keep: Literal["last", "best"] = "last"
    cache: str | None = None
    cache_kept: Literal["exact", "fp16"] = "exact"
    cache_top: int | None = Field(None, ge=1)
    taps: dict[str, str | list[str] | dict[str, str]] = Field(default_factory=dict)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fitting(self) -> Distillation:
        for name in self.losses:
            check_loss("losses", name)
        if not self.teacher:
            raise ValueError("--teacher is missing; name a trained network, such as a folder that `aerogel train` made")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std of the teacher are given together; add the other one under [distill]")
        if self.cache is None and (self.cache_kept != "exact" or self.cache_top is not None):
            raise ValueError("cache_kept and cache_top say what a cache holds; give --cache FOLDER, or leave them out")
        return self

    @property
    def label_free(self) -> bool:
        return not self.losses.keys() & LABELLED

    @property
    def described(self) -> str:
        """`kd 0.9 + hard 0.1 at T 4`."""
        parts = " + ".join(f"{name} {weight:g}" for name, weight in self.losses.items())
        return f"{parts} at T {self.temperature:g}{', mixup' if self.mixup else ''}"


def parse_losses(texts: Sequence[str]) -> dict[str, float]:
    """`kd,dkd=2.0` (and the option given again) as names with weights; USUAL ones where none is said.

    Raises AerogelError for an unknown name, one given twice, and a weight that is no number >= 0.
    """
    found: dict[str, float | None] = {}
    for part in ",".join(texts).split(","):
        name, equals, weight = (word.strip() for word in part.partition("="))
        check_loss("--loss", name)
        if name in found:
            raise AerogelError(f"--loss: each loss is given once, got {name} again; add their weights")
        found[name] = _number(part, weight) if equals else None
    return {name: usual(name, found) if weight is None else weight for name, weight in found.items()}


def usual(name: str, beside: Iterable[str]) -> float:
    """The weight of a loss beside others: labels and soft targets share 1 between them, either alone has all of it."""
    others = set(beside) - {name}
    if name == "hard":
        return BESIDE_SOFT if others & SOFT else USUAL[name]
    return 1.0 if name in ("kd", "logit_mse") and "hard" not in others else USUAL[name]


def check_loss(caller: str, name: str) -> None:
    if name not in LOSSES:
        raise AerogelError(f"{caller}: there is no loss {name!r}; {nearest(name, LOSSES)}")


def parse_taps(texts: Sequence[str]) -> dict[str, str]:
    """`student.module=teacher.module`, each given once. Raises AerogelError for another form."""
    found: dict[str, str] = {}
    for text in texts:
        ours, _, theirs = (word.strip() for word in text.partition("="))
        if not ours or not theirs:
            raise AerogelError(
                f"--tap {text!r} must be STUDENT_MODULE=TEACHER_MODULE, names of named_modules(); such as "
                "features.3=layer2"
            )
        if ours in found:
            raise AerogelError(f"--tap: {ours!r} of the student is given twice; by loss, write [distill.taps.LOSS]")
        found[ours] = theirs
    return found


def _number(part: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise AerogelError(f"--loss {part.strip()!r}: the weight must be a number >= 0, got {text!r}; write kd=0.9")
    return weight
