"""`fit`: drains the loop, saves, hears signals, and rolls back once what is no number any more."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.data import Dataset
from aerogel.errors import AerogelError, Interrupted
from aerogel.train.checkpoint import extras_of, set_extras, tensors_of
from aerogel.train.distributed import World, current, leading, trained_by_all, wait_for_all
from aerogel.train.interrupt import Signals
from aerogel.train.steps import NotFinite, State, Step, lay_out, steps


def fit(
    state: State,
    data: Dataset,
    *,
    on_step: Callable[[Step], None] | None = None,
    save: Callable[[State], Path] | None = None,
    every_seconds: float = 60.0,
    signals: Signals | None = None,
    until: int | None = None,
    on_trouble: Callable[[str], None] | None = None,
) -> nn.Module:
    """Drains `steps`, saving at intervals and when a signal comes. Returns the trained network, in eval mode.

    until: the step after which to pause; None trains to the end. The state goes on from there when it is fitted again.
    Where a loss, gradient or weight is not finite, the state goes back to where it last was saved (or to where this
    call began) and on with half the learning rate, once; on_trouble is told. With several processes rank 0 alone saves.
    Raises Interrupted once the state is saved, when `signals` caught one; NotFinite the second time.
    """
    last = state.total if until is None else until
    world = current()
    with trained_by_all((state, last, data.fingerprint() if leading() else "")), _on_its_device(state, world):
        _drain(state, data, last, world, on_step, save, every_seconds, signals, on_trouble)
    if state.step >= state.total:
        lay_out(state.result, torch.contiguous_format)
    return state.result.eval()


def train_along(payload: tuple[State, int, str], data: Dataset) -> None:
    """What the other processes do while rank 0 fits. Raises AerogelError when they were given other data."""
    state, last, fingerprint = payload
    world = current()
    if data.fingerprint() != fingerprint:
        raise _other_data(world)
    with _on_its_device(state, world):
        _drain(state, data, last, world, None, None, 0.0, None, None)


def _drain(
    state: State, data: Dataset, last: int, world: World, on_step: Callable[[Step], None] | None,
    save: Callable[[State], Path] | None, every_seconds: float, signals: Signals | None,
    on_trouble: Callable[[str], None] | None,
) -> None:  # fmt: skip
    good, saved_at = Snapshot.of(state), time.monotonic()
    save = save if world.rank == 0 else None

    def caught() -> bool:
        return signals is not None and signals.caught is not None

    def due() -> bool:
        return save is not None and time.monotonic() - saved_at > every_seconds

    while True:
        try:
            for step in islice(steps(state, data, stopping=caught, saving=due), max(0, last - state.step)):
                if on_step:
                    on_step(step)
                if step.number == last:
                    continue  # nothing is left to save or to stop
                stop = step.stop or (world.ranks == 1 and caught())  # several stop together, a step later
                if step.save or stop:  # every process goes back to the same step, if it must
                    if save:
                        save(state)
                    wait_for_all(world)
                    good, saved_at = Snapshot.of(state), time.monotonic()
                if stop and world.rank == 0:
                    raise Interrupted(signals.caught if signals and signals.caught else SIGTERM)
                if stop:
                    return
            return
        except NotFinite as problem:
            if state.lr_scale < 1:
                raise
            at = state.step + 1
            good.restore(state)
            state.lr_scale = 0.5
            if on_trouble:
                on_trouble(f"{str(problem).partition(';')[0].removeprefix('train: ')}: back from step {at:,} to "
                           f"{state.step:,}, on with half the learning rate")  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A state's numbers, in memory."""

    step: int
    tensors: dict[tuple[str, str], Tensor]
    optimizer: dict[str, Any]
    numbers: dict[str, Any]
    extras: dict[str, Any]

    @classmethod
    def of(cls, state: State) -> Snapshot:
        tensors = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
        memory, kept = copy.deepcopy((state.optimizer.state_dict(), extras_of(state)))
        return cls(state.step, tensors, memory, state.numbers(), kept)

    def restore(self, state: State) -> None:
        """Puts everything back, in place."""
        for name, tensor in tensors_of(state).items():
            tensor.copy_(self.tensors[name])
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        state.set_numbers(self.numbers)
        set_extras(state, copy.deepcopy(self.extras))
        state.step = self.step


@contextmanager
def _on_its_device(state: State, world: World) -> Iterator[None]:
    """On this rank's GPU inside, where it has one, and back on the CPU outside."""
    if world.device.type == "cpu":
        yield
        return
    _move(state, world.device)
    try:
        yield
    finally:
        _move(state, torch.device("cpu"))


def _move(state: State, device: torch.device) -> None:
    """In place: the optimizer goes on holding the same parameters."""
    for module in _networks(state):
        module.to(device)
    for slots in state.optimizer.state.values():
        slots |= {name: v.to(device) if isinstance(v, Tensor) and v.ndim else v for name, v in slots.items()}


def _networks(holder: Any) -> Iterator[nn.Module]:
    """The networks that a state or an objective holds, a teacher inside another objective too."""
    parts: list[Any] = list(vars(holder).values())
    if isinstance(holder, nn.Module):
        yield holder
        parts += holder.children()
    for value in parts:
        if isinstance(value, nn.Module) or type(value).__module__.startswith("aerogel."):
            yield from _networks(value)


def _other_data(world: World) -> AerogelError:
    return AerogelError(f"train: rank {world.rank} has read other data than rank 0; give every machine the same files")
