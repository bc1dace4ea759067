"""What a user may meet. Every message names the caller, the parameter, the rule, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 20  # names in one message


class AerogelError(ValueError):
    """A mistake in the input, told in one line that says what to do; the command line exits with 1."""


class CaptureError(AerogelError):
    """A model that cannot be read as a graph; names the module, the source line and the remedy."""


class DataError(AerogelError):
    """A data set that is absent, corrupt, or not what it should be."""


class CutError(AerogelError):
    """A cut that cannot be made, or that did not pass its proof."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM reached a safe point; what was done is on disk. `signal` is the number received."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `did you mean ...?`, or the known ones when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED]) or 'none'}{more}"
