"""Result files: a list of rows, one number a seed, each with the command, the hardware and the date."""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from aerogel.files import read_json, write_json


def rows(path: Path) -> list[dict[str, Any]]:
    return read_json(path) if path.exists() else []


def held_seeds(path: Path, row: str) -> list[int]:
    """The seeds that a row already has a number for."""
    return next((one["seeds"] for one in rows(path) if one["row"] == row), [])


def add(
    path: Path, row: str, seed: int, value: float, *, unit: str, command: str, hardware: str, seconds: float,
    paper: float | None = None, more: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Puts one seed's number into a row and computes its mean and standard deviation anew.

    more: what else is known of that seed, as {"ratio": 12.2}; the row has the mean under that name, and the numbers.

    A number that the seed has there already is replaced: a run that was stopped between two rows starts over.
    Several processes may add to one file: they wait for each other.
    """
    with _locked(path.parent):
        held = rows(path)
        one = next((r for r in held if r["row"] == row), None)
        if one is None:
            one = {"row": row, "paper": paper, "ours": [], "seeds": [], "seconds": []}
            held.append(one)
        if seed in one["seeds"]:
            old = one["seeds"].index(seed)
            for column in ("ours", "seeds", "seconds"):
                del one[column][old]
        one["ours"].append(value)
        one["seeds"].append(seed)
        one["seconds"].append(round(seconds, 1))
        one |= {"unit": unit, "mean": statistics.fmean(one["ours"]), "command": command, "hardware": hardware}
        one["sd"] = statistics.stdev(one["ours"]) if len(one["ours"]) > 1 else None
        one["date"] = date.today().isoformat()
        for name, number in (more or {}).items():
            known = one.setdefault("more", {}).setdefault(name, {})
            known[str(seed)] = number
            one[name] = statistics.fmean(known.values())
        write_json(path, held)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, is this process's alone inside."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
