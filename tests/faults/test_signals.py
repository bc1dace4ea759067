"""SIGTERM and Ctrl-C at random moments of `aerogel train`: it saves, ends within seconds, and goes on exactly."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aerogel.compress.job import _Log
from aerogel.train.checkpoint import damage

Aerogel = Callable[..., Any]
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
WORDS = ("train", "lenet_300_100", "--data", "digits", "--epochs", "8", "--out")
LIMIT = 30.0  # seconds from the signal to the end
QUICK, FULL = 2, 25


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder. A signal that nothing hears must not end the test run."""

    def unheard(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was not heard")

    monkeypatch.chdir(tmp_path)
    before = {number: signal.signal(number, unheard) for number in CODES}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


class Stopped(NamedTuple):
    code: int
    seconds: float  # from the signal to the end
    err: str


def stopped(aerogel: Aerogel, out: str, number: int, delay: float) -> Stopped:
    """Trains; the signal is sent `delay` seconds after training began."""
    sent: list[float] = []

    def send() -> None:
        while not Path(f"{out}.part").exists():
            time.sleep(0.001)
        time.sleep(delay)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    thread.start()
    outcome = aerogel(*WORDS, out)
    ended = time.monotonic()
    signal.signal(signal.SIGINT, before)
    thread.join()
    return Stopped(outcome.code, ended - sent[0], outcome.err)


def saved(out: str) -> list[Path]:
    found = sorted(Path(f"{out}.part").glob("checkpoints/train/step_*"))
    assert [damage(path) for path in found] == [None] * len(found)
    return found


def weights(folder: str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def check_stops(number: int, runs: int, aerogel: Aerogel) -> float:
    """Each of `runs` trainings is stopped at a random moment and ends as the unbroken one; the longest wait."""
    assert aerogel(*WORDS, "whole").code == 0
    dice, longest = random.Random(number), 0.0
    for run in range(runs):
        found = stopped(aerogel, f"net{run}", number, dice.random() * 0.2)
        assert found[::2] == (CODES[signal.Signals(number)], ""), (run, found)
        assert found.seconds < LIMIT
        longest = max(longest, found.seconds)
        assert len(saved(f"net{run}")) <= 1  # none before the first step
        assert aerogel(*WORDS, f"net{run}").code == 0
        assert weights(f"net{run}") == weights("whole")
    return longest


@pytest.mark.parametrize("number", CODES)
def test_a_signal_at_any_moment(number: int, aerogel: Aerogel) -> None:
    check_stops(number, QUICK, aerogel)


@pytest.mark.faults
@pytest.mark.parametrize("number", CODES)
def test_signals_at_many_moments(number: int, aerogel: Aerogel, faults_result: dict[str, object]) -> None:
    longest = check_stops(number, FULL, aerogel)
    faults_result.update({"runs": FULL, "went on exactly": FULL, "longest wait in seconds": round(longest, 2)})


def test_a_second_ctrl_c_inside_a_save_stops_at_once(monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> None:
    """The save that it interrupts leaves nothing, and the training goes on from what was there before."""
    assert aerogel(*WORDS, "whole").code == 0
    logged, write_bytes = _Log.__call__, Path.write_bytes
    stop_at, sent = [10], []

    def log_and_interrupt(log: _Log, step: Any) -> None:
        logged(log, step)
        if step.number in stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def again() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def slow(self: Path, content: bytes) -> int:
        write_bytes(self, content[: len(content) // 2])
        if not sent:
            threading.Timer(0.2, again).start()
        time.sleep(20.0)
        return write_bytes(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(_Log, "__call__", log_and_interrupt)
        assert aerogel(*WORDS, "net").code == 130
        before = saved("net")
        assert [path.name for path in before] == ["step_0000010"]
        stop_at[0] = 20
        patched.setattr(Path, "write_bytes", slow)
        outcome = aerogel(*WORDS, "net")
    assert (outcome.code, outcome.err) == (130, "")
    assert time.monotonic() - sent[0] < 10.0  # it waits for no save
    assert saved("net") == before
    assert sorted(path.name for path in before[0].parent.iterdir()) == ["step_0000010"]  # nothing half-written
    assert aerogel(*WORDS, "net").code == 0
    assert weights("net") == weights("whole")
