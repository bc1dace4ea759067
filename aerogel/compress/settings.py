"""Everything a run depends on: the command line and --config, resolved; written back as config.toml.

`compress` and `prune` are one job with other defaults. `method` is no setting but a name for several (METHODS).
`distill` has a table of its own beside what it shares with them; its student is `model`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aerogel.compress.distil_settings import Distillation
from aerogel.compress.sparse_settings import TELLS, Sparsity, merged, problem
from aerogel.errors import AerogelError, nearest
from aerogel.export import split_source
from aerogel.files import read_toml
from aerogel.prune import CRITERIA
from aerogel.train import Recipe

MISSING = {"model": "name a MODEL, such as lenet5", "data": "name a set with --data"}
STEPS = {"one-shot": 1, "iterative": 3, "linear": 3, "gradual": 8, "rewind": 5}  # cuts, unless the user says
EARLY_SHARE = 0.3  # epochs of an early recovery over those of the last
METHODS: dict[str, dict[str, Any]] = {
    "slimming": {"criterion": "bn_scale", "slimming": True, "schedule": "one-shot"},
    "magnitude": {"criterion": "l2", "slimming": False, "penalty": 0.0},
} | {name: {"criterion": name, "slimming": False, "penalty": 0.0} for name in CRITERIA}


CUTTING = (
    "target", "max_drop", "schedule", "steps", "criterion", "ranking", "reduce", "normalize", "allow_inexact", "heads",
    "slimming", "penalty", "slim", "scan", "scan_images", "round_to", "protect", "temperature", "hard_weight",
    "soft_weight", "recover", "sparse",
)  # fmt: skip
CHANNELS = (  # options that say nothing of single weights
    "target", "criterion", "ranking", "reduce", "normalize", "allow_inexact", "heads", "slimming", "penalty",
    "round_to",
)  # fmt: skip


class Settings(BaseModel):
    """The options of `compress`, `prune` and `distill`. `resolve` makes paths absolute, so that `resume` works from
    anywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    verb: Literal["compress", "prune", "distill"] = "compress"
    model: str
    data: str
    target: list[str] = Field(default_factory=list)
    max_drop: float | None = Field(None, ge=0, le=100)  # points of accuracy, upper 95 % bound; compress: 1
    weights: str | None = None
    input: tuple[int, int, int] | None = None
    trust: bool = False
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)  # of the measured runtime; training uses all cores
    schedule: Literal["one-shot", "iterative", "linear", "gradual", "rewind"] = "iterative"
    steps: int = Field(3, ge=1)  # cuts; each is recovered from, or all are made within one recovery (gradual)
    criterion: str = "l2"
    ranking: Literal["global", "local", "isomorphic", "value"] = "local"
    reduce: Literal["", "sum", "max", "mean"] = ""  # of a coupled channel's scores; the criterion's own where not given
    normalize: Literal["", "mean", "max", "sum", "none"] = ""  # of a group's scores; the same
    allow_inexact: bool = False  # cut what a statistic over channels couples, and tell the difference
    heads: Literal["whole", "width"] = "whole"  # of attention: whole heads, or their width
    slimming: bool = False  # network slimming: train with a penalty on batch-norm scales, cut by one threshold of them
    penalty: float = Field(0.0, ge=0)  # of slimming; 0: for the length of the training (job.py)
    slim: float = Field(1.0, gt=0)  # epochs of training with that penalty over those of the baseline
    scan: bool = False
    scan_images: int = Field(1000, ge=1)  # of the validation split, drawn at random
    round_to: int = Field(0, ge=0)  # 0: whichever of 1 and 8 is faster here
    protect: list[str] = Field(default_factory=list)
    temperature: float = Field(4.0, gt=0)
    hard_weight: float = Field(0.1, ge=0)
    soft_weight: float = Field(0.9, ge=0)
    recover: float = Field(2.0, ge=0)  # epochs of the last recovery over those of the baseline; 0: norms alone
    seconds: float = Field(4.0, gt=0)  # of the final latency comparison; none takes longer
    train: Recipe = Recipe()
    data_root: str | None = None  # $AEROGEL_DATA when the run began, or ./data
    distill: Distillation | None = None
    sparse: Sparsity | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, values: Any) -> Any:
        """Those that hang on other options."""
        if not isinstance(values, dict):
            return values
        own: dict[str, Any] = {"steps": STEPS.get(values.get("schedule", "iterative"), 1)}
        if values.get("verb", "compress") == "compress":
            own["max_drop"] = 1.0
        return own | {name: value for name, value in values.items() if name not in own or value is not None}

    @model_validator(mode="after")
    def _fitting(self) -> Settings:
        if self.distill is not None and self.verb != "distill":
            raise ValueError(f"the [distill] table is not for `aerogel {self.verb}`; leave it out, or distill")
        if self.verb == "distill" and (odd := [name for name in CUTTING if getattr(self, name) != _default(name)]):
            raise ValueError(f"distill cuts nothing: leave out {', '.join(odd)}; its own options stand under [distill]")
        if self.sparse is not None and self.verb == "prune":
            others = [name for name in CHANNELS if getattr(self, name) != _default(name)]
            if wrong := problem(self.sparse, self.schedule, self.scan, others):
                raise ValueError(wrong)
        elif self.sparse is not None:
            raise ValueError(f"the [sparse] table is not for `aerogel {self.verb}`; leave it out, or prune")
        elif self.schedule == "rewind":
            raise ValueError("rewind is a schedule of single weights; give --sparsity, or choose another schedule")
        if self.schedule == "one-shot" and self.steps != 1:
            raise ValueError("one-shot makes one cut; leave --steps out, or choose --schedule iterative")
        if self.schedule == "gradual" and not self.recover:
            raise ValueError("gradual cuts within the recovery; give recover more than 0, or choose another schedule")
        if self.slimming and (self.allow_inexact or self.normalize or self.ranking != "local" or self.heads != "whole"):
            raise ValueError(
                "slimming has one threshold on raw scales: leave out ranking, normalize, heads and allow_inexact, or "
                "choose --method bn_scale"
            )
        if self.penalty and not self.slimming:
            raise ValueError("penalty belongs to slimming; choose --method slimming, or leave it out")
        return self

    @property
    def lesson(self) -> Distillation:
        """Of a distillation. Raises AerogelError where its table is not given."""
        if self.distill is None:
            raise AerogelError("--teacher is missing; name a trained network, such as a folder `aerogel train` made")
        return self.distill

    @property
    def taught_by(self) -> str:
        return ", ".join(map(without_folders, self.lesson.teacher))

    @property
    def named(self) -> list[str]:
        """Every MODEL and DATA."""
        return [self.model, self.data, *(self.distill.teacher if self.distill else [])]

    @property
    def short_model(self) -> str:
        return without_folders(self.model)

    @property
    def title(self) -> str:
        return f"{self.short_model} on {without_folders(self.data)}"

    @property
    def goal(self) -> str:
        parts = [self.sparse.text] if self.sparse and self.sparse.sparsity else list(self.target)
        parts += [] if self.max_drop is None or not parts else [f"drop <= {self.max_drop:g} pt"]
        return ", ".join(parts) or "sensitivity scan"

    @property
    def recoveries(self) -> list[float]:
        """Epochs of each: one after every cut, short ones first; a single one for all gradual cuts."""
        last = self.recover * self.train.epochs
        if self.sparse is not None and (self.schedule == "rewind" or self.sparse.method == "snip"):
            return [self.train.epochs] * self.steps  # from the first weights, each
        return [last] if self.schedule == "gradual" else [EARLY_SHARE * last] * (self.steps - 1) + [last]

    @property
    def slim_recipe(self) -> Recipe:
        """How slimming trains with its penalty."""
        return self.train.model_copy(update={"epochs": self.slim * self.train.epochs})

    @property
    def method(self) -> str:
        """`slimming`, or what channels or single weights are chosen by."""
        if self.sparse is not None:
            return self.sparse.method
        return "slimming" if self.slimming else self.criterion


def _default(name: str) -> Any:
    return Settings.model_fields[name].get_default(call_default_factory=True)


TABLES: dict[str, type[BaseModel]] = {"train": Recipe, "distill": Distillation, "sparse": Sparsity}


def resolve(options: Mapping[str, Any], config: Path | None) -> Settings:
    """Command line over the --config file over the defaults. Raises AerogelError naming the option at fault.

    options: {option: value}, None where nothing was given; "train" and "distill" hold dicts of those tables' options.
    A seed given for the whole is the recipe's too, unless the file names another one there.
    """
    given = {name: value for name, value in options.items() if value is not None}
    held, given, sparse = merged(read_toml(config) if config else {}, given)
    held = _spelled(held)
    given = _spelled(given, held)
    if given.get("schedule", held.get("schedule")) != held.get("schedule"):
        held.pop("steps", None)  # of another schedule
    recipe = held.get("train", {})
    if isinstance(recipe, dict):
        seeds = [{"seed": source["seed"]} if "seed" in source else {} for source in (held, given)]
        recipe = {**seeds[0], **recipe, **seeds[1], **given.get("train", {})}
    tables = {"train": recipe, **sparse}
    if "distill" in given and isinstance(held.get("distill", {}), dict):
        tables["distill"] = held.get("distill", {}) | given["distill"]
    return _located(validated({**held, **given, **tables}))


def described(settings: Settings) -> str:
    """How channels or weights are chosen and when they go, in one line."""
    if settings.sparse is not None:
        when = f"{settings.schedule}, {settings.steps} cuts" if settings.steps > 1 else settings.schedule
        return f"{settings.method}: {TELLS[settings.method]} of single weights, {settings.sparse.ranking}; {when}"
    scores = {
        "slimming": f"training with {settings.penalty:.2g} x |gamma|, then the smallest batch-norm scales of all",
        "l2": "smallest l2 norm of the weights (magnitude)",
        "l1": "smallest l1 norm of the weights",
    }
    chosen = scores.get(settings.method, f"lowest {settings.criterion} score")
    if not settings.target:
        return chosen
    when = f"{settings.schedule}, {settings.steps} cuts" if settings.steps > 1 else settings.schedule
    return f"{settings.method}: {chosen}; {when}"


def _spelled(options: Mapping[str, Any], below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """With the options that `method` stands for in its place; those given beside it win.

    Of slimming, the schedule of the file `below` wins too.
    """
    given = dict(options)
    method = given.pop("method", None)
    if method is None:
        return given
    if method not in METHODS:
        raise AerogelError(f"--method {method!r} is unknown; {nearest(str(method), METHODS)}")
    meant = METHODS[method]
    if method == "slimming" and below:
        meant = {**meant, "schedule": below.get("schedule", meant["schedule"])}
    return meant | given


def validated(values: Mapping[str, Any], source: str = "") -> Settings:
    """Raises AerogelError naming the option at fault, after `source`."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing" and where in MISSING:
            if where == "model" and values.get("verb") == "distill":
                raise AerogelError(
                    f"{source}--student is missing; name the network to train, such as lenet5"
                ) from error
            raise AerogelError(f"{source}{where} is missing; {MISSING[where]}, or give it in --config") from error
        if first["type"] == "extra_forbidden":
            known = TABLES.get(where.partition(".")[0], Settings).model_fields
            hint = nearest(where.rpartition(".")[2], known)
            raise AerogelError(f"{source}option {where!r} is unknown; {hint}") from error
        if not where or (where == "distill" and first["type"] == "value_error"):  # options that do not go together
            raise AerogelError(f"{source}{first['msg'].removeprefix('Value error, ')}") from error
        raise AerogelError(f"{source}option {where}: {first['msg']}, got {first.get('input')!r}") from error


def to_toml(settings: Settings) -> str:
    """What `read_toml` and `validated` read as these settings again.

    Raises AerogelError when they cannot: TOML has no null, so what is None is left out and read as the default.
    """
    others = set(CUTTING) if settings.verb == "distill" else set()
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True, exclude=others))
    if validated(tomllib.loads(text)) != settings:
        raise AerogelError(
            "config.toml cannot hold train.clip = None; give a norm that is never reached, as clip = 1e9"
        )
    return text


def _located(settings: Settings) -> Settings:
    """The same with every path made absolute, seen from the current folder."""
    root = os.environ.get("AEROGEL_DATA") or settings.data_root or ("data" if Path("data").is_dir() else None)
    changes: dict[str, Any] = {
        "model": _located_model(settings.model),
        "data": _located_factory(settings.data),
        "weights": settings.weights and _located_weights(settings.weights),
        "data_root": root and _absolute(root),
    }
    if settings.distill is not None:
        lesson, own = settings.distill, dict[str, Any]()
        own["teacher"] = [_located_model(text) for text in lesson.teacher]
        own["teacher_weights"] = [_located_weights(text) for text in lesson.teacher_weights]
        own["cache"] = lesson.cache and _absolute(lesson.cache)
        changes["distill"] = lesson.model_copy(update=own)
    return settings.model_copy(update=changes)


def _located_model(text: str) -> str:
    """A folder, `file.py:name` and `hf:PATH` with an absolute path; any other text as it is."""
    kind, _, path = text.partition(":")
    if kind == "hf" and path and Path(path).exists():
        return f"hf:{_absolute(path)}"
    return _absolute(text) if Path(text).is_dir() else _located_factory(text)


def _located_factory(text: str) -> str:
    """`folder:PATH` and `file.py:name` with an absolute path; any other text as it is."""
    kind, _, path = text.partition(":")
    if kind == "folder" and path:
        return f"folder:{_absolute(path)}"
    source, _, name = text.rpartition(":")
    return f"{_absolute(source)}:{name}" if source.endswith(".py") else text


def _located_weights(text: str) -> str:
    """`timm:PATH` and PATH with an absolute path."""
    source, path = split_source(text)
    return f"{source}:{_absolute(path)}" if source else _absolute(path)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def without_folders(text: str) -> str:
    """`folder:/home/me/pets` as `folder:pets`."""
    return re.sub(r"[^:]*/", "", text)
