"""The console: plain lines in a pipe, a bar on a terminal, and nothing in a text that can control either."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.console import Console, duration, printable, unexpected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def pipe() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The console's time, in one cell."""
    now = [0.0]
    monkeypatch.setattr("aerogel.console.time.monotonic", lambda: now[0])
    return now


def test_one_fact_is_one_line_with_its_stage_in_front(pipe: io.StringIO) -> None:
    console = Console(pipe)
    console.say("plan", "3 cuts")
    console.say("", "and why")
    assert pipe.getvalue() == "plan      3 cuts\n          and why\n"


@pytest.mark.parametrize(
    "text",
    ["[bold]not markup[/bold]", "a :smile: b", "x" * 500, "[link=file:///x]y", "https://a.b/c 12.5 None 'quoted'"],
)
def test_a_text_is_printed_as_it_is(text: str, pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    Console(pipe).say("check", text)
    assert pipe.getvalue() == f"check     {text}\n"


def test_a_text_cannot_control_the_terminal(pipe: io.StringIO) -> None:
    Console(pipe).say("check", "layer\x1b[2J\rPASS\nnext\u202e\x07")
    assert pipe.getvalue() == "check     layer\\x1b[2J\\rPASS\\nnext\\u202e\\x07\n"


def test_lines_that_are_made_up_already_are_shown_as_they_are(pipe: io.StringIO) -> None:
    Console(pipe).show("\na  b\n\n  c\x1b\n")
    assert pipe.getvalue() == "\na  b\n\n  c\\x1b\n"


def test_in_a_pipe_progress_is_a_line_now_and_then(pipe: io.StringIO, clock: list[float]) -> None:
    with Console(pipe).progress("baseline", 2000) as show:
        for step in range(1, 1001):
            clock[0] = step * 0.025
            show(step, f"loss {step}")
    assert pipe.getvalue().splitlines() == [
        "baseline  400/2,000  loss 400  40 s left",
        "baseline  800/2,000  loss 800  30 s left",
    ]


def test_a_resumed_stage_does_not_count_what_was_done_before_as_its_own_speed(
    pipe: io.StringIO, clock: list[float]
) -> None:
    with Console(pipe).progress("baseline", 2000) as show:
        for step in range(1601, 1701):
            clock[0] = (step - 1600) * 0.1
            show(step, "")
    assert pipe.getvalue() == "baseline  1,700/2,000    30 s left\n"


def test_a_short_stage_prints_no_progress_in_a_pipe(pipe: io.StringIO) -> None:
    with Console(pipe).progress("baseline", 3) as show:
        for step in (1, 2, 3):
            show(step, "loss")
    assert pipe.getvalue() == ""


def test_on_a_terminal_progress_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    console = Console(terminal)
    with console.progress("baseline", 10) as show:
        show(4, "epoch 0.4  [red]  hard 1.2345")
        console.say("warning", "a line in between")
    text = terminal.getvalue()
    assert "baseline" in text
    assert "epoch 0.4  [red]  hard 1.2345" in text
    assert "━" in text
    assert "a line in between" in text
    assert text.endswith("\x1b[2K")  # the bar's line is erased


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (45 * 60, "45 min"), (59.6 * 60, "1 h 0 min"),
     (110 * 60, "1 h 50 min"), (26 * 3600, "26 h 0 min")],
)  # fmt: skip
def test_durations_as_a_person_reads_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.text())
def test_what_is_printable_is_one_line_and_stays_itself(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()


def test_an_unexpected_error_is_one_line_and_a_file(tmp_path: Path) -> None:
    try:
        {}["net\nwork"]
    except KeyError as error:
        line = unexpected(error, tmp_path / "error.txt")
    assert line == rf"unexpected KeyError: 'net\nwork' (its traceback is in {tmp_path}/error.txt)"
    held = (tmp_path / "error.txt").read_text()
    assert held.startswith("Traceback")
    assert "test_console.py" in held


def test_an_unexpected_error_of_many_lines_is_told_by_its_first_even_if_no_file_can_be_written(tmp_path: Path) -> None:
    line = unexpected(RuntimeError("first\nsecond"), tmp_path / "none/error.txt")
    assert line.startswith("unexpected RuntimeError: first (its traceback cannot be written to ")
    assert line.endswith("none/error.txt: No such file or directory)")
