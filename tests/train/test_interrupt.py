"""Ctrl-C and SIGTERM, sent for real to this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from aerogel.data import Dataset, Split, assemble
from aerogel.errors import Interrupted
from aerogel.train import (
    HardLabels,
    Recipe,
    Signals,
    State,
    Step,
    fit,
    load_checkpoint,
    save_checkpoint,
    start,
)

TOTAL = 6
BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def safety_net() -> Iterator[None]:
    """A signal that nothing catches must not end the test run: it is an error instead, and handlers are put back."""

    def uncaught(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was not caught")

    before = {number: signal.signal(number, uncaught) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def toy() -> Dataset:
    images = torch.arange(36, dtype=torch.uint8).view(9, 1, 2, 2)
    return assemble("toy", Split(images, torch.arange(9) % 3), Split(images, torch.arange(9) % 3), "abc", val=3)


def begin() -> State:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return start(net, HardLabels(), toy(), Recipe(epochs=2, batch_size=2))


def sends(number: int, at: int, times: int = 1) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.number == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_saves_and_stops_and_the_run_goes_on_exactly(number: int, tmp_path: Path) -> None:
    whole = fit(begin(), toy())
    state = begin()
    with Signals() as signals, pytest.raises(Interrupted, match=f"stopped by signal {number:d}") as caught:
        fit(state, toy(), on_step=sends(number, at=3), save=lambda s: save_checkpoint(tmp_path, s), signals=signals)
    assert caught.value.signal == number
    assert state.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]

    again = begin()
    assert load_checkpoint(tmp_path, again) == []
    assert again.step == 3
    for ours, theirs in zip(fit(again, toy()).parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_place_to_save_it_stops_all_the_same() -> None:
    state = begin()
    with Signals() as signals, pytest.raises(Interrupted, match="stopped by signal 2"):
        fit(state, toy(), on_step=sends(signal.SIGINT, at=1), signals=signals)
    assert state.step == 1


def test_at_the_last_step_nothing_is_left_to_stop(tmp_path: Path) -> None:
    state = begin()
    with Signals() as signals:
        net = fit(state, toy(), on_step=sends(signal.SIGINT, at=TOTAL), save=lambda s: tmp_path, signals=signals)
        assert net is state.model
        with pytest.raises(Interrupted, match="stopped by signal 2"):
            signals.check()


def test_a_second_ctrl_c_stops_at_once() -> None:
    state = begin()
    with Signals() as signals, pytest.raises(KeyboardInterrupt):
        fit(state, toy(), on_step=sends(signal.SIGINT, at=2, times=2), signals=signals)


def test_ctrl_c_after_a_sigterm_stops_at_once_and_a_second_sigterm_does_not() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_handlers_are_put_back(error: type[BaseException] | None) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    signals = Signals()
    try:
        with signals:
            assert [signal.getsignal(number) for number in BOTH] != before
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert [signal.getsignal(number) for number in BOTH] == before


def test_check_is_silent_until_a_signal_comes() -> None:
    with Signals() as signals:
        signals.check()
        assert signals.caught is None


@pytest.mark.parametrize(("every_seconds", "saved"), [(-1.0, [1, 2, 3, 4, 5]), (1e9, [])])
def test_it_saves_at_intervals_but_not_at_the_end(every_seconds: float, saved: list[int], tmp_path: Path) -> None:
    found: list[int] = []

    def save(state: State) -> Path:
        found.append(state.step)
        return tmp_path

    fit(begin(), toy(), save=save, every_seconds=every_seconds)
    assert found == saved
