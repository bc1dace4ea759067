"""A device as a few numbers: what it computes a second by kernel family, what it moves, what a kernel costs to start.

A profile is a small TOML file. Those in `devices/` come with aerogel; "this" is the one that `aerogel cost
--calibrate` measured on this machine. A datasheet's numbers are peaks times the share of its peak that each family of
kernels reaches on the measured server CPU: an estimate, and marked as one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel.errors import AerogelError, nearest
from aerogel.files import read_toml, write_text

PROFILES = Path(__file__).parent / "devices"
THIS = "this"
# Where a profile has no number of its own for a family, it takes that of the next in the row.
FALLBACK = {"grouped": "conv", "transposed": "conv", "recurrent": "matmul", "pointwise": "conv", "matmul": "pointwise",
            "norm": "elementwise", "reduce": "elementwise", "pool": "elementwise", "move": "elementwise",
            "unknown": "elementwise"}  # fmt: skip
NEEDED = frozenset({"conv", "depthwise", "elementwise"})  # no other family stands in for them


class Device(BaseModel):
    """A device profile. Speeds are those of `threads` threads in float32."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    title: str
    kind: Literal["measured", "datasheet"]
    source: str  # the processor and the runtime it was measured with, or whose figures these are
    date: str = ""
    threads: int = Field(1, ge=1)
    simd: int = Field(ge=1)  # float32 numbers in one vector; channels that are no multiple leave lanes empty
    overhead_us: float = Field(ge=0)  # to start one kernel
    cache_bytes: int = Field(ge=0)  # what fits there moves at cache_gb_s
    cache_gb_s: float = Field(gt=0)
    memory_gb_s: float = Field(gt=0)
    # latency = kernel_scale * (sum of single kernels) + kernel_us * (their number) + run_us: see aerogel.cost.predict.
    kernel_scale: float = Field(1.0, gt=0)
    kernel_us: float = 0.0
    run_us: float = 0.0
    gmacs: dict[str, float]  # 10^9 MACs a second by family (element-wise families: operations); conv and elementwise

    def speed(self, family: str) -> float:
        """MACs (operations) a second of a family of kernels."""
        while family not in self.gmacs:
            family = FALLBACK[family]
        return self.gmacs[family] * 1e9

    def bandwidth(self, working_set: int) -> float:
        """Bytes a second at which a kernel that touches so many bytes gets them."""
        return 1e9 * (self.cache_gb_s if working_set <= self.cache_bytes else self.memory_gb_s)


def device(name: str) -> Device:
    """The profile of that name, "this" (measured here), or of a .toml file.

    Raises AerogelError for an unknown name, a machine that was not calibrated, or a file that is no profile.
    """
    if name.endswith(".toml"):
        return read(Path(name))
    if name == THIS:
        path = this_path()
        if not path.exists():
            raise AerogelError(
                "device: this machine has not been measured; run `aerogel cost --calibrate` (about a minute), "
                f"or choose one of {', '.join(profiles())}"
            )
        return read(path)
    if name not in profiles():
        raise AerogelError(f"device: no profile is called {name!r}; {nearest(name, [THIS, *profiles()])}, or FILE.toml")
    return read(PROFILES / f"{name}.toml")


def profiles() -> list[str]:
    """The names of the profiles that come with aerogel."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def this_path() -> Path:
    """Where the profile of this machine is kept: $XDG_CACHE_HOME/aerogel/this.toml, by default in ~/.cache."""
    return cache_folder() / f"{THIS}.toml"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aerogel"


def read(path: Path) -> Device:
    """Raises AerogelError naming the file and the entry at fault."""
    try:
        found = Device.model_validate(read_toml(path, "device", "give a profile in TOML"))
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"])) or "profile"
        raise AerogelError(f"device: {path}: {entry}: {first['msg']}; see the profiles in {PROFILES}") from error
    for family in found.gmacs:
        if family not in FALLBACK.keys() | NEEDED:
            known = nearest(family, FALLBACK.keys() | NEEDED)
            raise AerogelError(f"device: {path}: gmacs.{family}: no family of kernels has that name; {known}")
    bad = [family for family, speed in found.gmacs.items() if not speed > 0]
    lacking = NEEDED - found.gmacs.keys()
    if bad or lacking:
        what = f"gmacs.{bad[0]} must be above 0" if bad else f"gmacs.{sorted(lacking)[0]} is missing"
        raise AerogelError(f"device: {path}: {what}; give 10^9 operations a second")
    return found


def write(profile: Device, path: Path) -> None:
    """The profile as TOML, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, tomli_w.dumps(profile.model_dump()))
