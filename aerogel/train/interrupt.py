"""Ctrl-C and SIGTERM, heard at safe points: the first is noted, a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from aerogel.errors import Interrupted


class Signals:
    """`with Signals() as signals:` notes SIGINT and SIGTERM in `signals.caught`; `check` raises Interrupted."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def check(self) -> None:
        """Raises Interrupted when a signal came."""
        if self.caught is not None:
            raise Interrupted(self.caught)
