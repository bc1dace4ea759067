"""The sensitivity scan as a stage: accuracy on validation images against the share of each group that is gone."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from aerogel.compress.cutting import criterion_of
from aerogel.compress.job import Job
from aerogel.compress.measure import coupling_of
from aerogel.compress.run import ORIGINAL, Run
from aerogel.data import Dataset
from aerogel.prune import sensitivity
from aerogel.prune.sensitivity import SHARES
from aerogel.train import accuracy


def scan(job: Job, run: Run) -> None:
    """run["scan"]: {"criterion", "images", "shares", "whole", "groups": {name: curve}}; nothing is trained."""
    settings = job.settings
    if not settings.scan or "scan" in run:
        return
    model, data = job.load(run.path / ORIGINAL), some_of(job.data, settings.scan_images, settings.seed)

    def evaluate(masked: nn.Module) -> float:
        job.signals.check()
        return accuracy(masked, data, "val")

    total = len(SHARES) * len(coupling_of(job, model).groups)
    with job.console.progress("scan", total) as show:
        found = sensitivity(
            model, job.example, evaluate=evaluate, criterion=criterion_of(job, model), protect=settings.protect,
            progress=lambda done, _, group: show(done + 1, group),
        )  # fmt: skip
    groups = {name: dataclasses.asdict(curve) for name, curve in found.groups.items()}
    job.console.say("scan", f"{len(groups)} groups, {len(found.shares)} shares each, on {len(data.val):,} of "
                    f"{len(job.data.val):,} validation images")  # fmt: skip
    run["scan"] = {
        "criterion": settings.criterion,
        "images": len(data.val),
        "shares": list(found.shares),
        "whole": found.whole,
        "groups": groups,
    }


def some_of(data: Dataset, images: int, seed: int) -> Dataset:
    """The same with at most so many validation images, drawn at random."""
    chosen = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(seed))[:images]
    return dataclasses.replace(data, val=data.val.subset(chosen.sort().values))
