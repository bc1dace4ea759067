"""Stage 4, gradual: all cuts within one recovery, between its training steps (`aerogel.prune.schedule`).

Between two cuts the network's shape is fixed: a leg. Every leg, of a first attempt as of a resumed one, begins from
files: the network as it was cut, and a checkpoint of that very step, whose optimizer was cut along.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from aerogel.compress.cutting import points, recovery
from aerogel.compress.job import Job
from aerogel.compress.run import Run
from aerogel.compress.slim import still_slimming, uncut
from aerogel.compress.subgoal import cut_number, told
from aerogel.train import Objective, State, save_checkpoint, start


def gradually(
    job: Job, run: Run, plan: dict[str, Any], objective: Objective, latency: float | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network after all cuts and the whole recovery, and the last cut's record."""
    recipe, cuts = recovery(job), points(job)
    done = max((k for k in range(1, len(cuts) + 1) if f"cut {k:03d}" in run), default=0)
    for k in range(done, len(cuts) + 1):
        folder = run.path / f"checkpoints/cut {k:03d}" if k else uncut(run)
        state = start(job.load(folder), still_slimming(job, objective, k), job.data, recipe)
        if job.continued(state, run, f"leg {k:03d}") and k == done:
            job.console.say("recover", f"goes on at step {state.step:,} of {state.total:,}")
        model = job.fit(state, run, "gradual", f"leg {k:03d}", until=cuts[k] if k < len(cuts) else None)
        if k < len(cuts):
            _cut(job, run, plan, k + 1, state, latency)
    return model, run[f"cut {len(cuts):03d}"]


def _cut(job: Job, run: Run, plan: dict[str, Any], k: int, state: State, latency: float | None) -> None:
    """Cut number `k`, the optimizer and the averaged weights along with the network; run["cut k"] is what it did."""
    key, leg = f"cut {k:03d}", f"leg {k:03d}"
    found = cut_number(job, run, plan, k, state.model, latency)
    found.apply_to(state.optimizer, *([] if state.average is None else [state.average]))
    state.model = found.model
    job.save(state.model, run.clear("checkpoints", key), onnx=False)
    save_checkpoint(run.clear("checkpoints", leg), state)
    run[key] = told(job, run, k, found)
    run.clear("checkpoints", f"cut {k - 1:03d}")
    run.clear("checkpoints", f"leg {k - 1:03d}")
