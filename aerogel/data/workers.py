"""Processes that make batches ahead of training, in order: PyTorch's DataLoader, asked for batches by their number.

A worker gets the number of a batch and nothing else, so what it makes depends on no other batch, on no worker's
random state and not on how many workers there are; a pass begins at any batch at once.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from aerogel.data.decode import reason_of
from aerogel.errors import AerogelError, DataError
from aerogel.imports import one_line

AHEAD = 2  # batches that each worker makes ahead
TOLD = (signal.SIGINT, signal.SIGTERM)  # what a terminal and a scheduler send to all processes of a group
GRACE_SECONDS = 30  # that a worker lives after SIGTERM: training saves its state within them


@dataclass(frozen=True, eq=False)
class _ByNumber(Dataset[torch.Tensor | str]):
    make: Callable[[int], torch.Tensor]

    def __getitem__(self, number: int) -> torch.Tensor | str:
        """The batch, or what is wrong: an error would arrive with the worker's whole traceback as its text."""
        try:
            return self.make(number)
        except AerogelError as error:
            return str(error)
        except Exception as error:
            return f"batches: a worker failed at batch {number} ({reason_of(error)}); use workers=0 to see where"


def by_workers(make: Callable[[int], torch.Tensor], numbers: range, workers: int) -> Iterator[torch.Tensor]:
    """make(number) for each of `numbers`, in order, made by `workers` processes.

    Raises DataError with the message of what `make` raised, or when the system has ended a worker.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # they also wait for disks
        loader = DataLoader(
            _ByNumber(make),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=AHEAD,
            worker_init_fn=_let_training_decide,
            generator=torch.Generator(),  # the loader draws from it; the global one is the caller's
        )
        with _no_alarm(), _held_back():
            made = iter(loader)
    while True:
        try:
            images = next(made)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(
                f"batches: a worker process ended ({one_line(error)}), as for lack of memory or of "
                "/dev/shm; use fewer workers or a smaller --batch-size"
            ) from error
        if isinstance(images, str):
            raise DataError(images)
        yield images


@contextmanager
def _no_alarm() -> Iterator[None]:
    """Without the loader's handler of SIGCHLD, which would raise anywhere in training, amid an optimizer's step: that a
    worker is gone shows, within seconds, where its batch is waited for."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait while workers start: one that came before a worker knows what to do with it would end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_training_decide(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; training must still get the batch it waits for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
