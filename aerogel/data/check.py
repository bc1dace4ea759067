"""Which files of a set cannot be read, and why."""

from __future__ import annotations

from typing import Any

from aerogel.console import printable
from aerogel.data import load
from aerogel.data.listing import TooManyBad


def check(spec: str, size: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Reads every file of the set once, as training would, and lists the bad ones, however many.

    Raises what `load` raises for other reasons.
    """
    try:
        data = load(spec, size=size, lazy=True)
    except TooManyBad as error:
        return {"data": spec, "bad_files": [list(row) for row in error.bad], "usable": False, "reason": str(error)}
    images = {name: len(getattr(data, name)) for name in ("train", "val", "test")}
    return {"data": spec, "bad_files": [list(row) for row in data.bad_files], "usable": True, "images": images}


def as_text(found: dict[str, Any]) -> str:
    lines = [printable(f"{path}: {reason}") for path, reason in found["bad_files"]]  # names are not the user's own
    if found["usable"]:
        counts = ", ".join(f"{count:,} {name}" for name, count in found["images"].items())
        lines.append(f"{found['data']}: {counts}; {len(lines) or 'no'} bad file{'' if len(lines) == 1 else 's'}")
    else:
        lines.append(printable(found["reason"]))
    return "\n".join(lines)
