"""The main job: a network, data and a goal in; a smaller, faster network out, with proof.

check -> baseline -> (scan, slim) -> plan -> cut and recover, step by step -> ship -> report. `prune` is the same job
with the method and the schedule in the user's hand, and without a goal only its scan; with --sparsity single weights go
instead of channels (sparsify.py). Every stage leaves what it found
in the run's folder, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from aerogel.compress.baseline import baseline
from aerogel.compress.check import Checked, check
from aerogel.compress.distilling import distill as distill
from aerogel.compress.distilling import go_on
from aerogel.compress.goal import goals_of
from aerogel.compress.job import Job, lead, open_job
from aerogel.compress.plan import plan
from aerogel.compress.recover import recover
from aerogel.compress.run import Run, is_run
from aerogel.compress.scan import scan
from aerogel.compress.settings import Settings, described
from aerogel.compress.ship import ship
from aerogel.compress.slim import slim
from aerogel.compress.sparse_scan import scan_weights
from aerogel.compress.sparsify import check_weights, plan_weights, prune_weights
from aerogel.compress.stages import finished, resumable, stage
from aerogel.compress.story import tell
from aerogel.console import Console
from aerogel.errors import AerogelError
from aerogel.files import refuse_existing
from aerogel.report import terminal, write
from aerogel.train.distributed import restarted


def compress(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Runs the main job of either verb; returns the report. Nothing is written before the goal is known to be in reach.

    Raises AerogelError for bad input, Interrupted when a signal stopped it (the run can be resumed).
    """
    goals = goals_of(settings)
    lead(settings, out)
    if out is not None and restarted() and is_run(out):
        return resume(out, console, settings.trust)
    if out is not None:
        refuse_existing(out, settings.verb)
    console.say(settings.verb, f"{settings.title}  ->  {settings.goal}")
    began = time.monotonic()
    job = open_job(settings, console, goals)
    if settings.verb == "prune":
        console.say("method", described(job.settings))
    checked = check(job) if settings.sparse is None else check_weights(job)
    state = {
        "data": job.data.fingerprint(),
        "check": asdict(checked),
        "seconds": {"check": time.monotonic() - began},
    }
    run = Run.create(job.settings, out, state)
    console.say("run", f"{run.path}   (Ctrl-C is safe: `aerogel resume {quote(str(run.path))}` goes on)")
    return _finish(job, run, checked)


def resume(path: Path, console: Console, trust: bool = False) -> dict[str, Any]:
    """Finishes a stopped run; of a finished one it only returns the report.

    trust: import the code that it names, though it was not begun here. Raises AerogelError when `path` is no run, names
    such code, or the data are not those it began with.
    """
    run = Run.open(path)
    if report := finished(run, console):
        return report
    if "check" not in run:
        raise AerogelError(f"resume: {path} is a stopped `aerogel train`; the same command as before goes on")
    run.check_code(trust)
    if run.settings.verb == "distill":
        return go_on(run, console)
    lead(run.settings, path)
    console.say("resume", f"{path}: {run.settings.title}  ->  {run.settings.goal}   done so far: {', '.join(run.done)}")
    job = open_job(run.settings, console, goals_of(run.settings))
    run.check_data(job.data)
    return _finish(job, run, Checked(**run["check"]))


def _finish(job: Job, run: Run, checked: Checked) -> dict[str, Any]:
    """The stages after the check; each returns at once when an earlier attempt finished it."""
    with job.signals, resumable(job, run):
        with stage(job, run, "baseline"):
            baseline(job, run)
        if job.settings.scan:
            with stage(job, run, "scan"):
                scan(job, run) if job.settings.sparse is None else scan_weights(job, run)
        candidates = _made_smaller(job, run, checked) if job.goals else []
        report = tell(job, run, candidates)
        page, _ = write(report, run.path)
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        run["report"] = page.name
    again = f"   (again, here or elsewhere: `aerogel verify {quote(str(run.path))}`)" if job.goals else ""
    job.console.say("report", f"{page}{again}")
    job.console.show("\n" + terminal(report))
    return report


def _made_smaller(job: Job, run: Run, checked: Checked) -> list[dict[str, Any]]:
    """The stages that need a goal; every candidate, the original first."""
    if job.settings.sparse is not None:
        with stage(job, run, "plan"):
            planned = plan_weights(job, run)
        with stage(job, run, "prune and retrain"):
            candidates = prune_weights(job, run, planned)
        with stage(job, run, "ship"):
            ship(job, run, candidates)
        return candidates
    if job.settings.slimming:
        with stage(job, run, "slim"):
            slim(job, run)
    with stage(job, run, "plan"):
        planned = plan(job, run, checked)
    with stage(job, run, "cut and recover"):
        candidates = recover(job, run, planned, checked.fractions.get("latency"))
    with stage(job, run, "ship"):
        ship(job, run, candidates)
    return candidates
