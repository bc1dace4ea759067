"""`aerogel distill --explore-temperature`: what T does to the teachers' answers, before anything is trained.

The answers are those to the validation split: a temperature is chosen there, never on the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from aerogel.compress.job import lead, open_job
from aerogel.compress.settings import Settings
from aerogel.compress.teaching import as_one, open_teachers
from aerogel.compress.worth import heard
from aerogel.console import Console
from aerogel.distill.temperature import TEMPERATURES
from aerogel.errors import AerogelError
from aerogel.files import new_folder, read_toml, refuse_existing, write_json, write_text
from aerogel.report.temperature_page import as_text, render, temperature_report
from aerogel.train import predict

PAGE, DATA = "temperature.html", "temperature.json"
STAND_IN = "resnet20:width=0.25"  # a network for any images, which nobody asks


def explore(settings: Settings, student: bool, out: Path | None, console: Console) -> tuple[dict[str, Any], str]:
    """The report and its table; both are written to `out`, or runs/<time>-temperature: a page with a slider, and JSON.

    student: whether the settings' model is one, or stands in for none (STAND_IN). The temperature of the settings is
    asked about, too. Raises AerogelError for bad input.
    """
    if len(settings.lesson.teacher) != 1:
        raise AerogelError(
            f"--explore-temperature asks one teacher at a time, got {settings.taught_by}: the mean of several is "
            "another at every T; name one"
        )
    lead(settings, out)
    if out is not None:
        refuse_existing(out, "distill")
    job = open_job(settings, console)
    teachers, held = open_teachers(job), job.data.val
    console.say("explore", f"{settings.taught_by} is asked about {len(held):,} images of the validation split")
    with job.signals:
        answers = heard(job, as_one(job, teachers), "val")[0]
        own = predict(job.opened.model, job.data, "val") if student else None
    heats = sorted({*TEMPERATURES, settings.lesson.temperature})
    report = temperature_report(
        settings.taught_by, settings.short_model if student else None, job.data.name, job.data.classes, held.rows,
        held.labels, answers, own, heats,
    )  # fmt: skip
    folder = _unused() if out is None else out
    with new_folder(folder, "distill") as temp:
        write_json(temp / DATA, report)
        write_text(temp / PAGE, render(report))
    return {**report, "page": str(folder / PAGE)}, f"{as_text(report)}\n{folder / PAGE}"


def student_of(named: str | None, config: Path | None) -> str | None:
    """The student on the command line, or else in the --config file. Raises AerogelError as `read_toml`."""
    held = read_toml(config).get("model") if named is None and config else None
    return held if isinstance(held, str) else named


def refuse_others(given: Mapping[str, Any]) -> None:
    """Raises AerogelError for options of a training. given: {option: value}, None or False or [] where it was not."""
    if others := [name for name, value in given.items() if value not in (None, False, [])]:
        raise AerogelError(
            f"--explore-temperature trains nothing; leave out {', '.join(others)}, and train with the T that you choose"
        )


def _unused() -> Path:
    stem = f"{datetime.now():%Y-%m-%d_%H%M%S}-temperature"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())
