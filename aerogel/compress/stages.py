"""What goes around the stages of a run: its clock, the signals between two of them, and the way on after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.run import Run
from aerogel.console import Console, unexpected
from aerogel.errors import AerogelError, Interrupted
from aerogel.files import read_json
from aerogel.report import terminal


@contextmanager
def stage(job: Job, run: Run, name: str) -> Iterator[None]:
    """Raises Interrupted when a signal came before it; what it takes is added to the run's record."""
    job.signals.check()
    with run.timed(name):
        yield


@contextmanager
def resumable(job: Job, run: Run) -> Iterator[None]:
    """Whatever stops the stages inside, the user is told how to go on."""
    again = f"`aerogel resume {quote(str(run.path))}`"
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        job.console.say("stopped", f"what was done is kept; {again} finishes it")
        raise
    except AerogelError:
        config, verb = quote(str(run.path / "config.toml")), run.settings.verb
        job.console.say("stopped", f"what was done is kept; once that is mended, {again} goes on")
        job.console.say("", f"with other options, begin again: `aerogel {verb} --config {config} --lr ...`")
        raise
    except Exception as error:
        raise AerogelError(unexpected(error, run.path / "error.txt")) from error


def finished(run: Run, console: Console) -> dict[str, Any] | None:
    """The report of a run that is finished, which is shown; None of any other."""
    if "report" not in run:
        return None
    console.say("resume", f"{run.path} is finished; nothing is left to do")
    report: dict[str, Any] = read_json(run.path / "report.json")
    console.show(terminal(report))
    return report
