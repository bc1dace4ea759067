"""Network slimming's own stage: the original trained on with the penalty on its batch-norm scales, ready to be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.run import ORIGINAL, RESULT, Run
from aerogel.prune.slimming import Slimming, histograms
from aerogel.train import HardLabels, Objective, accuracy

SLIMMED = "checkpoints/slimmed"  # a saved folder
BINS = 40


def slim(job: Job, run: Run) -> None:
    """run["slim"]: {"val_accuracy"}; the network itself is in SLIMMED."""
    settings = job.settings
    if not settings.slimming or "slim" in run:
        return
    recipe = settings.slim_recipe
    epochs = recipe.epochs
    job.console.say("slim", f"{epochs:g} epochs with a penalty of {settings.penalty:g} on batch-norm scales")
    objective = Slimming(HardLabels(), settings.penalty)
    model = job.train(job.load(run.path / ORIGINAL), objective, recipe, run, "slim")
    found = accuracy(model, job.data, "val")
    job.save(model, run.clear(SLIMMED), onnx=False)
    lost = run["baseline"]["val_accuracy"] - found
    job.console.say("slim", f"validation {found:.2f} % ({-lost:+.2f}) before anything is cut")
    run["slim"] = {"val_accuracy": found}
    run.clear("checkpoints", "slim")


def uncut(run: Run) -> Path:
    """Where the network is from which cutting starts: the slimmed one if there is one, else the original."""
    return run.path / (SLIMMED if "slim" in run else ORIGINAL)


def still_slimming(job: Job, objective: Objective, cuts: int) -> Objective:
    """The objective of recovering from cut number `cuts`: penalised as long as another cut follows (multi-pass)."""
    settings = job.settings
    return Slimming(objective, settings.penalty) if settings.slimming and cuts < settings.steps else objective


def scales(job: Job, run: Run) -> dict[str, Any]:
    """Histograms of |gamma|: {"edges": [..], "counts": {network: [..]}}, for the report."""
    parts = {"original": ORIGINAL, "slimmed": SLIMMED, "result": RESULT}
    counts, edges = histograms(*(job.load(run.path / part) for part in parts.values()), bins=BINS)
    return {"edges": edges.tolist(), "counts": dict(zip(parts, counts.tolist(), strict=True))}
