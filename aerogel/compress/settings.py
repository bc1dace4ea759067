"""Everything a compress run depends on: the command line and --config, resolved; written back as config.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel.errors import AerogelError, nearest
from aerogel.train import Recipe


class Settings(BaseModel):
    """The options of `compress`. Paths are absolute, so that `resume` works from anywhere."""

    model_config = ConfigDict(extra="forbid")
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
    round_to: int = Field(0, ge=0)  # 0: whichever of 1 and 8 is faster here
    protect: list[str] = Field(default_factory=list)
    temperature: float = Field(4.0, gt=0)
    hard_weight: float = Field(0.1, ge=0)
    soft_weight: float = Field(0.9, ge=0)
    recover: float = Field(1.0, gt=0)  # epochs of the last recovery over those of the baseline
    seconds: float = Field(4.0, gt=0)  # of each final latency comparison
    train: Recipe = Recipe()
    data_root: str | None = None  # $AEROGEL_DATA when the run began


def resolve(options: dict[str, Any], config: Path | None) -> Settings:
    """Command line over the --config file over the defaults. Raises AerogelError naming the option at fault."""
    merged = read_toml(config) if config else {}
    recipe = {**merged.get("train", {}), **options.pop("train", {})}
    merged |= {key: value for key, value in options.items() if value is not None}
    merged["train"] = recipe
    return validated(merged)


def validated(values: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise AerogelError(f"{where} is missing; give it on the command line or in --config") from error
        if first["type"] == "extra_forbidden":
            known = Recipe.model_fields if where.startswith("train.") else Settings.model_fields
            raise AerogelError(
                f"config: option {where!r} is unknown; {nearest(where.split('.')[-1], known)}"
            ) from error
        raise AerogelError(f"config: {where}: {first['msg']}, got {first.get('input')!r}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Raises AerogelError when the file is absent or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AerogelError(f"--config {path}: {error.strerror}; name an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AerogelError(f"--config {path} is not TOML: {error}") from error


def to_toml(settings: Settings) -> str:
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
