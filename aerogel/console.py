"""What a person sees while a job runs: one line a fact. Rich progress on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0  # between two progress lines in a pipe


class Console:
    """`say(stage, text)` for facts; `progress(stage, total)` yields a function of (done, text)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._rich = RichConsole(file=self.stream, highlight=False, soft_wrap=True)

    def say(self, stage: str, text: str) -> None:
        self._rich.print(f"{stage:<10}{text}", markup=False)

    @contextmanager
    def progress(self, stage: str, total: int) -> Iterator[Progressing]:
        if not self.live:
            yield Progressing(self, stage, total)
            return
        columns = (
            TextColumn("{task.fields[stage]}"),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task("", total=total, stage=f"{stage:<9}")
            yield Progressing(
                self, stage, total, lambda done, text: bar.update(task, completed=done, description=text)
            )


class Progressing:
    """Called at every step; draws on a terminal, prints now and then in a pipe."""

    def __init__(self, console: Console, stage: str, total: int, draw: object = None) -> None:
        self._console, self._stage, self._total, self._draw = console, stage, total, draw
        self._printed = self._began = time.monotonic()

    def __call__(self, done: int, text: str) -> None:
        if callable(self._draw):
            self._draw(done, text)
            return
        now = time.monotonic()
        if now - self._printed >= QUIET_SECONDS:
            self._printed = now
            left = (now - self._began) / max(done, 1) * (self._total - done)
            self._console.say(self._stage, f"{done}/{self._total}  {text}  {duration(left)} left")


def duration(seconds: float) -> str:
    """45 s, 12 min, 1 h 50 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
