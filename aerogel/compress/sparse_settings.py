"""The [sparse] table of `aerogel prune`: single weights instead of channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from aerogel.errors import AerogelError, nearest
from aerogel.prune.weights import SCORES

Share = Annotated[float, Field(ge=0, lt=1)]
TELLS = {
    "magnitude": "the smallest |w|",
    "lamp": "the smallest layer-adaptive magnitude",
    "taylor": "the smallest (g w)^2 on training images",
    "movement": "what training moves towards zero",
    "snip": "the smallest |g w| at the initial weights",
    "random": "chance",
}


class Sparsity(BaseModel):
    """sparsity: the share of the weights that goes; 0 with --scan scans alone. ratios: {layers: a share of their own}.

    pattern: "2:4" keeps 2 of every 4 inputs. rewind: epochs to whose weights the schedule of that name goes back.
    rate: of the learning rate, while retraining; 0: a tenth after single cuts, all of it in gradual and rewound
    trainings. l1: penalty on |w| in every training. keep_dead: neurons without weights stay in the network.
    scan_epochs: of training again at every point of a scan. scan_drop: with --scan, each layer's share is the largest
    at which the scan lost at most so many points; 0: the scan is told alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    sparsity: Share
    method: str = "magnitude"
    ranking: Literal["global", "local"] = "global"
    ratios: dict[str, Share] = Field(default_factory=dict)
    pattern: str = Field("", pattern=r"^$|^[1-9]\d*:[1-9]\d*$")
    rewind: float = Field(0.0, ge=0)
    rate: float = Field(0.0, ge=0)
    l1: float = Field(0.0, ge=0)
    keep_dead: bool = False
    scan_epochs: float = Field(0.0, ge=0)
    scan_drop: float = Field(0.0, ge=0, le=100)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in SCORES:
            raise ValueError(f"--method {method!r} scores no single weights; {nearest(method, SCORES)}")
        return method

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        numbers = [int(number) for number in re.findall(r"\d+", self.pattern)]
        return (numbers[0], numbers[1]) if numbers else None

    @property
    def exact(self) -> bool:
        """Whether the sparsity alone says how much goes."""
        return not (self.ratios or self.pattern or self.scan_drop)

    @property
    def text(self) -> str:
        return f"sparsity {self.sparsity:g}"


def problem(sparse: Sparsity, schedule: str, scan: bool, others: list[str]) -> str | None:
    """What does not go together, in words. others: options about channels that were given too."""
    if sparse.scan_drop and (not scan or sparse.ratios):
        return "scan_drop takes each layer's share from a scan: ask for --scan, and leave ratios out"
    if others:
        return (
            f"--sparsity prunes single weights, {', '.join(others)} channels: leave out one of them; both make two runs"
        )
    if sparse.method == "snip" and schedule != "one-shot":
        return "snip prunes once, before training; choose --schedule one-shot"
    if sparse.method == "movement" and schedule != "gradual":
        return "movement goes by what training moves; choose --schedule gradual"
    if sparse.rewind and schedule != "rewind":
        return "rewind says where --schedule rewind goes back to; choose that schedule, or leave rewind out"
    if sparse.pattern and schedule != "one-shot":
        return f"pattern {sparse.pattern} prunes once; choose --schedule one-shot"
    if sparse.n_of_m and sparse.n_of_m[0] >= sparse.n_of_m[1]:
        return f"pattern {sparse.pattern} prunes nothing: it keeps the first number of the second; 2:4 is usual"
    return None


def merged(held: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(held, given, the [sparse] table): `method` goes into it where weights are pruned.

    Raises AerogelError for a method that scores single weights alone, where they are not.
    """
    held, given = dict(held), dict(given)
    tables = [source.pop("sparse", None) for source in (held, given)]
    if all(table is None for table in tables):
        for source in (held, given):
            if source.get("method") in ("movement", "snip"):
                raise AerogelError(f"--method {source['method']} scores single weights; give --sparsity 0.9, say")
        return held, given, {}
    methods = [{"method": source.pop("method")} if "method" in source else {} for source in (held, given)]
    first, second = (table if isinstance(table, dict) else {} for table in tables)
    return held, given, {"sparse": {**first, **methods[0], **second, **methods[1]}}
