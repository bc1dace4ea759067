"""Everything a compress run depends on: the command line and --config, resolved; written back as config.toml."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel.errors import AerogelError, nearest
from aerogel.export import split_source
from aerogel.train import Recipe

MISSING = {"model": "name a MODEL, such as lenet5", "data": "name a set with --data"}


class Settings(BaseModel):
    """The options of `compress`. `resolve` makes paths absolute, so that `resume` works from anywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    model: str
    data: str
    target: list[str] = Field(default_factory=list)
    max_drop: float = Field(1.0, ge=0, le=100)  # percentage points of accuracy, upper 95 % bound
    weights: str | None = None
    input: tuple[int, int, int] | None = None
    trust: bool = False
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)  # of the measured runtime; training uses all cores
    steps: int = Field(3, ge=1)  # cut and recover this many times
    criterion: str = "l2"
    ranking: Literal["global", "local"] = "global"
    round_to: int = Field(0, ge=0)  # 0: whichever of 1 and 8 is faster here
    protect: list[str] = Field(default_factory=list)
    temperature: float = Field(4.0, gt=0)
    hard_weight: float = Field(0.1, ge=0)
    soft_weight: float = Field(0.9, ge=0)
    recover: float = Field(2.0, gt=0)  # epochs of the last recovery over those of the baseline
    seconds: float = Field(4.0, gt=0)  # of the final latency comparison; none takes longer
    train: Recipe = Recipe()
    data_root: str | None = None  # $AEROGEL_DATA when the run began, or ./data

    @property
    def short_model(self) -> str:
        return _without_folders(self.model)

    @property
    def title(self) -> str:
        return f"{self.short_model} on {_without_folders(self.data)}"

    @property
    def goal(self) -> str:
        return f"{', '.join(self.target)}, drop <= {self.max_drop:g} pt"


def resolve(options: Mapping[str, Any], config: Path | None) -> Settings:
    """Command line over the --config file over the defaults. Raises AerogelError naming the option at fault.

    options: {option: value}, None where nothing was given; "train" holds a dict of recipe options.
    A seed given for the whole is the recipe's too, unless the file names another one there.
    """
    held = read_toml(config) if config else {}
    given = {name: value for name, value in options.items() if value is not None}
    recipe = held.get("train", {})
    if isinstance(recipe, dict):
        seeds = [{"seed": source["seed"]} if "seed" in source else {} for source in (held, given)]
        recipe = {**seeds[0], **recipe, **seeds[1], **given.get("train", {})}
    return _located(validated({**held, **given, "train": recipe}))


def validated(values: Mapping[str, Any], source: str = "") -> Settings:
    """Raises AerogelError naming the option at fault, after `source`."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing" and where in MISSING:
            raise AerogelError(f"{source}{where} is missing; {MISSING[where]}, or give it in --config") from error
        if first["type"] == "extra_forbidden":
            known = Recipe.model_fields if where.startswith("train.") else Settings.model_fields
            hint = nearest(where.rpartition(".")[2], known)
            raise AerogelError(f"{source}option {where!r} is unknown; {hint}") from error
        raise AerogelError(f"{source}option {where}: {first['msg']}, got {first.get('input')!r}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Raises AerogelError when the file is absent or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AerogelError(f"cannot read {path}: {error.strerror}; name an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AerogelError(f"{path} is not TOML: {error}") from error


def to_toml(settings: Settings) -> str:
    """What `read_toml` and `validated` read as these settings again.

    Raises AerogelError when they cannot: TOML has no null, so what is None is left out and read as the default.
    """
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
    if validated(tomllib.loads(text)) != settings:
        raise AerogelError(
            "config.toml cannot hold train.clip = None; give a norm that is never reached, as clip = 1e9"
        )
    return text


def _located(settings: Settings) -> Settings:
    """The same with every path made absolute, seen from the current folder."""
    root = os.environ.get("AEROGEL_DATA") or settings.data_root or ("data" if Path("data").is_dir() else None)
    changes = {
        "model": _absolute(settings.model) if Path(settings.model).is_dir() else _located_factory(settings.model),
        "data": _located_factory(settings.data),
        "weights": settings.weights and _located_weights(settings.weights),
        "data_root": root and _absolute(root),
    }
    return settings.model_copy(update=changes)


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


def _without_folders(text: str) -> str:
    """`folder:/home/me/pets` as `folder:pets`."""
    return re.sub(r"[^:]*/", "", text)
