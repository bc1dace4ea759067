"""What a person sees while a job runs: one line a fact. Rich progress on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0  # between two progress lines in a pipe


class Console:
    """`say(stage, text)` for facts; `progress(stage, total)` yields a function of (done, text)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._rich = RichConsole(file=self.stream, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def say(self, stage: str, text: str) -> None:
        """One line, whatever is in the text."""
        self._rich.print(printable(f"{stage:<10}{text}"))

    def show(self, text: str) -> None:
        """Lines that are made up already."""
        for line in text.rstrip("\n").split("\n"):
            self._rich.print(printable(line))

    @contextmanager
    def progress(self, stage: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A function of (steps done, text): draws on a terminal, prints now and then in a pipe."""
        if not self.live:
            yield _Lines(self, stage, total)
            return
        columns = (
            TextColumn("{task.fields[stage]}"),
            BarColumn(24),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task("", total=total, stage=f"{stage:<9}")
            yield lambda done, text: bar.update(task, completed=done, description=text)


class _Lines:
    """Progress in a pipe: a line every QUIET_SECONDS."""

    def __init__(self, console: Console, stage: str, total: int) -> None:
        self._console, self._stage, self._total = console, stage, total
        self._printed = self._began = time.monotonic()
        self._first: int | None = None  # steps done at the first call: a resumed stage has some before

    def __call__(self, done: int, text: str) -> None:
        if self._first is None:
            self._first = done - 1
        now = time.monotonic()
        if now - self._printed >= QUIET_SECONDS:
            self._printed = now
            left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
            self._console.say(self._stage, f"{done:,}/{self._total:,}  {text}  {duration(left)} left")


def duration(seconds: float) -> str:
    """45 s, 12 min, 1 h 50 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def printable(text: str) -> str:
    """One line that is safe on a terminal: what controls it, as in a hostile file name, becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unexpected(error: Exception, file: Path) -> str:
    """One line about an error that nobody foresaw; its traceback goes to `file`."""
    text = f"unexpected {traceback.format_exception_only(error)[-1].splitlines()[0]}"
    try:
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as problem:
        return f"{text} (its traceback cannot be written to {file}: {problem.strerror})"
    return f"{text} (its traceback is in {file})"
