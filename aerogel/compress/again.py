"""Recovery in one line: a network that was cut, trained again with the uncut one as its teacher."""

from __future__ import annotations

from torch import nn

from aerogel import data as datasets
from aerogel.data import Dataset
from aerogel.distill import SoftTargets
from aerogel.errors import AerogelError
from aerogel.train import Recipe, fit, start


def recover(
    model: nn.Module,
    *,
    teacher: nn.Module,
    data: Dataset | str,
    recipe: Recipe | None = None,
    temperature: float = 4.0,
    hard_weight: float = 0.1,
    soft_weight: float = 0.9,
) -> nn.Module:
    """Trains `model` in place by soft targets (`aerogel.distill`); returns it (or its average) in eval mode.

    teacher: the network before the cut; it only answers. data: a Dataset, or what `data.load` takes. Both networks must
    read its images and give logits (n, classes). Raises AerogelError where they do not, or for a bad setting.
    """
    if model is teacher:
        raise AerogelError("recover: model and teacher are one network; pass cut(net, ...).model and net")
    held = data if isinstance(data, Dataset) else datasets.load(data)
    objective = SoftTargets(teacher, temperature, hard_weight, soft_weight)
    return fit(start(model, objective, held, recipe or Recipe()), held)
