"""What the criteria say of every group, made comparable."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from aerogel.errors import CutError, nearest
from aerogel.prune.coupling import Coupling
from aerogel.prune.criteria import CRITERIA, Criterion


def find_criterion(criterion: str | Criterion) -> Criterion:
    """The function behind a name, or the function itself. Raises CutError for an unknown name."""
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise CutError(f"cut: criterion {criterion!r} is unknown; {nearest(str(criterion), CRITERIA)}")
    return CRITERIA[criterion]


def scores(coupling: Coupling, weights: Mapping[str, Tensor], score: Criterion) -> list[np.ndarray]:
    """Each group's scores over their mean size, so that layers of different scale can be ranked together.

    Raises CutError unless the criterion gives one finite number a channel.
    """
    found = []
    for group in coupling.groups:
        raw = torch.as_tensor(score(group, weights)).detach().double().cpu()
        bad = int((~torch.isfinite(raw)).sum())
        if raw.shape != (len(group),) or bad:
            raise CutError(
                f"cut: the criterion must give one finite score for each of the {len(group)} channels of "
                f"{group.name}, got shape {tuple(raw.shape)} with {bad} not finite"
            )
        found.append((raw / raw.abs().mean().clamp_min(1e-30)).numpy())
    return found
