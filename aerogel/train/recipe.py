"""How a network is trained: one small record, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """Defaults suit small images on a CPU.

    epochs may be a fraction. lr is the peak, reached after `warmup` epochs or at half the run. schedule: cosine to 0,
    or step (times `gamma` at each of `milestones`, as fractions of the run), or constant. weight_decay spares
    one-dimensional weights (biases, norms). clip: largest gradient norm (networks without batch norm need it).
    ema: decay of the averaged weights that are returned. autocast: the number type of the forward pass. accumulate:
    parts of a batch, made one after the other. compile: the network through torch.compile. sync_norms: with several
    processes, batch norms take the statistics of the whole batch, as one process would. workers: processes that decode
    images ahead of training; None: as many as cores for each trainer, and none where the images are in memory. What is
    trained does not depend on them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    epochs: float = Field(10, gt=0)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(0.05, gt=0)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    gamma: float = Field(0.1, gt=0, le=1)
    warmup: float = Field(0.5, ge=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    clip: float | None = Field(1.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    autocast: Literal["none", "bf16", "fp16"] = "none"
    accumulate: int = Field(1, ge=1)
    compile: bool = False
    sync_norms: bool = True
    workers: int | None = Field(None, ge=0)
    augment: str | None = None  # None: the data set's own
    seed: int = Field(0, ge=0)


def learning_rate(recipe: Recipe, step: int, total: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0) out of `total`: linear warm-up, then the schedule; in (0, lr]."""
    warm = min(recipe.warmup * steps_per_epoch, total / 2)
    if step < warm:
        return recipe.lr * (step + 1) / (warm + 1)
    done = (step - warm) / (total - warm)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "step":
        return recipe.lr * recipe.gamma ** sum(step / total >= m for m in recipe.milestones)
    return recipe.lr
