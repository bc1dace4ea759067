"""The sensitivity scan of single weights: accuracy on validation images against the share of a layer that is gone."""

from __future__ import annotations

import dataclasses

from torch import nn

from aerogel.compress.baseline import regularised
from aerogel.compress.cutting import training_batches
from aerogel.compress.job import Job
from aerogel.compress.run import ORIGINAL, Run
from aerogel.compress.scan import some_of
from aerogel.prune.masks import Masks, prunable
from aerogel.prune.weight_sensitivity import SHARES, weight_sensitivity
from aerogel.prune.weights import NEEDS, score
from aerogel.train import HardLabels, accuracy, start, steps
from aerogel.train.distributed import ALONE


def scan_weights(job: Job, run: Run) -> None:
    """run["scan"]: {"unit", "criterion", "images", "shares", "whole", "retrained", "groups": {weight: curve}}.

    With `scan_epochs` in [sparse] every point is trained again too; run["scan NAME"] keeps a layer that is done.
    """
    settings, sparse = job.settings, job.settings.sparse
    if sparse is None or "scan" in run:
        return
    model, data = job.load(run.path / ORIGINAL), some_of(job.data, settings.scan_images, settings.seed)
    method = sparse.method if NEEDS.get(sparse.method) != "earlier" else "magnitude"
    scores = score(method, model, protect=settings.protect, batches=training_batches(job))
    recipe = settings.train.model_copy(update={"epochs": sparse.scan_epochs or 1.0, "lr": settings.train.lr / 10})

    def evaluate(network: nn.Module) -> float:
        job.signals.check()
        return accuracy(network, data, "val")

    def retrain(network: nn.Module, masks: Masks) -> nn.Module:
        state = start(network, regularised(job, HardLabels()), job.data, recipe)
        (masks & Masks.of(network, protect=settings.protect)).put_on(state)  # also what was gone before
        for _ in steps(state, job.data, world=ALONE):
            job.signals.check()
        return state.result

    weights = prunable(model, protect=settings.protect)
    groups = {}
    with job.console.progress("scan", len(weights) * len(SHARES)) as show:
        for number, name in enumerate(weights):
            if f"scan {name}" not in run:
                show(number * len(SHARES) + 1, name)
                found = weight_sensitivity(
                    model, evaluate, scores=scores, layers=[name], retrain=retrain if sparse.scan_epochs else None
                )
                curve = dataclasses.asdict(found[name])
                run[f"scan {name}"] = {"channels": curve.pop("weights")} | curve
            groups[name] = run[f"scan {name}"]
    job.console.say("scan", f"{len(groups)} layers, {len(SHARES)} shares each, on {len(data.val):,} of "
                    f"{len(job.data.val):,} validation images")  # fmt: skip
    run["scan"] = {
        "unit": "weights",
        "criterion": method,
        "images": len(data.val),
        "shares": list(SHARES),
        "whole": accuracy(model, data, "val"),
        "retrained": sparse.scan_epochs,
        "groups": groups,
    }
