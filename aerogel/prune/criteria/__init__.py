"""Which channels matter: each criterion is a pure function `(group, weights) -> (n,) score`, low goes first.

One file a criterion. To add one: write the file, add one row. `criterion` sets how the slices of a coupled group become
one score, how groups are made comparable, and what was seen of the data; a function of the user's own serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Group
from aerogel.prune.criteria.activation import activation as activation
from aerogel.prune.criteria.apoz import apoz as apoz
from aerogel.prune.criteria.bn_scale import bn_scale as bn_scale
from aerogel.prune.criteria.fpgm import fpgm as fpgm
from aerogel.prune.criteria.hessian import hessian as hessian
from aerogel.prune.criteria.l1 import l1 as l1
from aerogel.prune.criteria.l2 import l2 as l2
from aerogel.prune.criteria.lamp import lamp as lamp
from aerogel.prune.criteria.random import random as random
from aerogel.prune.criteria.slices import Criterion as Criterion
from aerogel.prune.criteria.slices import Weights, check_reduce
from aerogel.prune.criteria.taylor import taylor as taylor
from aerogel.prune.evidence import Evidence, check_evidence

CRITERIA: dict[str, Callable[..., Tensor]] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "taylor": taylor,
    "hessian": hessian,
    "apoz": apoz,
    "activation": activation,
    "random": random,
}
EVIDENCE = {"taylor": "gradients", "hessian": "curvature", "apoz": "zeros", "activation": "sizes"}  # what each needs
COMPARABLE = {"lamp"}  # between groups as they are

# What a group's scores are divided by, so that layers of different scale can be ranked together.
NORMALIZE: dict[str, Callable[[Tensor], Tensor | float]] = {
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().amax(),
    "sum": lambda scores: scores.abs().sum(),
    "none": lambda scores: 1.0,
}


@dataclass(frozen=True)
class Configured:
    """A criterion with its options; called as `(group, weights) -> (n,)`. normalize: a key of NORMALIZE."""

    score: Callable[..., Tensor]
    options: Mapping[str, Any]
    normalize: str

    def __call__(self, group: Group, weights: Weights) -> Tensor:
        return self.score(group, weights, **self.options)


def criterion(
    name: str | Criterion,
    *,
    reduce: str | None = None,
    normalize: str | None = None,
    evidence: Evidence | None = None,
) -> Configured:
    """A criterion for `cut`: one of CRITERIA, or a function `(group, weights) -> (n,)` of one's own.

    reduce: sum, max or mean over the slices of a coupled group; None is the criterion's own. normalize: what a group's
    scores are divided by, their mean, max or sum; "none" compares them raw, as network slimming does; None is mean,
    or none for lamp. evidence: what `gather` saw of the data.
    Raises CutError for an unknown name or option, and for a criterion whose evidence is missing.
    """
    if not callable(name) and name not in CRITERIA:
        raise CutError(f"cut: criterion {name!r} is unknown; {nearest(str(name), CRITERIA)}")
    score = name if callable(name) else CRITERIA[name]
    options: dict[str, Any] = {}
    if reduce is not None:
        check_reduce(reduce)
        if callable(name) or name == "random":
            raise CutError(f"criterion: {_called(name)} has no slices to reduce, got reduce={reduce!r}; leave it out")
        options["reduce"] = reduce
    if not callable(name) and name in EVIDENCE:
        check_evidence(evidence, EVIDENCE[name], name)
        options["evidence"] = evidence
    elif evidence is not None:
        raise CutError(f"criterion: {_called(name)} reads no evidence; leave it out")
    own = "none" if name in COMPARABLE else "mean"
    if normalize is not None and normalize not in NORMALIZE:
        raise CutError(f"criterion: normalize {normalize!r} is unknown; {nearest(str(normalize), NORMALIZE)}")
    return Configured(score, options, normalize or own)


def _called(name: object) -> str:
    return repr(getattr(name, "__name__", name))
