"""How every stage cuts: by the settings' method; and what a network is worth before it has recovered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import nn

from aerogel.compress.job import Job
from aerogel.data import Batch, batch_count, batches
from aerogel.prune import Cut, criterion, cut, cut_points, gather
from aerogel.prune.criteria import EVIDENCE, Criterion
from aerogel.prune.evidence import KINDS
from aerogel.prune.slimming import slim
from aerogel.train import Recipe

RAMP = 0.5  # the share of a gradual recovery that its cuts are spread over
SEEN = 32  # training batches that a criterion or a norm sees


def cut_by_method(job: Job, model: nn.Module, target: Mapping[str, float], round_to: int) -> Cut:
    """Raises CutError when the target is out of reach, or when the method does not suit the network."""
    settings = job.settings
    if settings.slimming:
        return slim(model, job.example, target=target, reduce=settings.reduce or "max", protect=settings.protect,
                    round_to=round_to)  # fmt: skip
    torch.manual_seed(settings.seed)  # for the random criterion
    return cut(model, job.example, target=target, criterion=criterion_of(job, model), ranking=settings.ranking,
               round_to=round_to, protect=settings.protect, allow_inexact=settings.allow_inexact,
               heads=settings.heads)  # fmt: skip


def criterion_of(job: Job, model: nn.Module) -> Criterion:
    """The settings' criterion, with what it must see of the training images. Raises CutError for an unknown one."""
    name, evidence = job.settings.criterion, None
    if name in EVIDENCE:
        kinds = [kind for kind in KINDS if kind == EVIDENCE[name]] or ["activations"]
        evidence = gather(model, training_batches(job), kinds=kinds)
    reduce, normalize = job.settings.reduce or None, job.settings.normalize or None
    return criterion(name, reduce=reduce, normalize=normalize, evidence=evidence)


def recovery(job: Job) -> Recipe:
    """How the network is trained after its last cut, and while it is cut gradually."""
    return job.settings.train.model_copy(update={"epochs": job.settings.recoveries[-1]})


def points(job: Job) -> tuple[int, ...]:
    """The steps of the recovery after which gradual cuts are made. Raises CutError when it is too short for them."""
    recipe = recovery(job)
    per_epoch = batch_count(len(job.data.train), recipe.batch_size)
    return cut_points(max(1, round(recipe.epochs * per_epoch)), job.settings.steps, RAMP)


def training_batches(job: Job) -> Iterator[Batch]:
    """SEEN batches of training images, as they are trained on; the same ones at every call."""
    recipe = job.settings.train
    augment = job.data.augment if recipe.augment is None else recipe.augment
    seed = job.settings.seed
    every = batches(job.data, "train", recipe.batch_size, seed=seed, shuffle=True, augment=augment)
    return islice(every, SEEN)
