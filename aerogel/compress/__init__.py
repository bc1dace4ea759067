"""The main job: a network, data and a goal in; a smaller, faster network out, with proof.

check -> baseline -> plan -> cut and recover, step by step -> ship -> report. Every stage leaves what it found in the
run's folder, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from aerogel.compress.baseline import baseline
from aerogel.compress.check import Checked, check
from aerogel.compress.goal import parse_goals
from aerogel.compress.job import Job, open_job
from aerogel.compress.plan import plan
from aerogel.compress.recover import recover
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import ship
from aerogel.compress.story import tell
from aerogel.console import Console
from aerogel.errors import AerogelError, Interrupted
from aerogel.files import refuse_existing
from aerogel.report import terminal, write

T = TypeVar("T")


def compress(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Runs the main job; returns the report. Nothing is written before the goal is known to be in reach.

    Raises AerogelError for bad input, Interrupted when a signal stopped it (the run can be resumed).
    """
    settings.data_root = os.environ.get("AEROGEL_DATA")
    console.say(
        "compress",
        f"{settings.model} on {settings.data}  ->  {', '.join(settings.target)}, drop <= {settings.max_drop:g} pt",
    )
    if out is not None:
        refuse_existing(out, "compress")
    job = open_job(settings, console, parse_goals(settings.target))
    checked = check(job)
    run = Run.create(settings, out, f"{settings.model}-{settings.target[0]}")
    run["data"] = job.data.fingerprint()
    run["check"] = {"fractions": checked.fractions, "frozen": checked.frozen, "text": checked.text}
    console.say("run", f"{run.path}   (Ctrl-C is safe: `aerogel resume {run.path}` goes on)")
    return _finish(job, run, checked)


def resume(path: Path, console: Console) -> dict[str, Any]:
    """Finishes a stopped run. Raises AerogelError when the data are not those it began with."""
    run = Run.open(path)
    if run.settings.data_root and "AEROGEL_DATA" not in os.environ:
        os.environ["AEROGEL_DATA"] = run.settings.data_root
    console.say("resume", f"{path}: {run.settings.model} on {run.settings.data}")
    job = open_job(run.settings, console, parse_goals(run.settings.target))
    if run["data"] != job.data.fingerprint():
        raise AerogelError(f"resume: {run.settings.data} has changed since {path} began; start a new run")
    held = run["check"]
    return _finish(job, run, Checked(held["fractions"], held["frozen"], held["text"]))


def _finish(job: Job, run: Run, checked: Checked) -> dict[str, Any]:
    stages: list[dict[str, Any]] = run["stages"] if "stages" in run else []

    def timed(name: str, work: Callable[[], T]) -> T:
        job.signals.check()
        began = time.monotonic()
        found = work()
        stages.append({"name": name, "seconds": round(time.monotonic() - began, 1), "text": ""})
        return found

    candidates: list[dict[str, Any]] | None = None
    with job.signals:
        try:
            timed("baseline", lambda: baseline(job, run))
            original = job.load(run.path / "candidates/000")
            planned = timed("plan", lambda: plan(job, run, checked, original))
            candidates = timed(
                "recover", lambda: recover(job, run, planned, checked.fractions.get("latency"))
            )
            shipped = timed("ship", lambda: ship(job, run, candidates or []))
            run["stages"] = stages
        except (Interrupted, KeyboardInterrupt):
            job.console.say("stopped", f"what was done is kept; `aerogel resume {run.path}` finishes it")
            raise
        report = tell(job, run, candidates)
        page, _ = write(report, run.path)
    job.console.say("result", shipped["verdict"]["text"])
    for near in shipped["verdict"]["nearest"]:
        job.console.say("nearest", near["text"])
    for line in terminal(report).splitlines():
        job.console.say("", line)
    job.console.say("proof", f"{page}   again: aerogel verify {run.path}")
    return report
