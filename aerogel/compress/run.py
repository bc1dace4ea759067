"""A run's folder: resolved config, environment, events, checkpoints, candidates, the result, the report.

state.json holds what each finished stage found; it is what `resume` reads. Nothing in it is ever guessed: a stage
that is not there is done again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import aerogel
from aerogel.compress.settings import Settings, to_toml, validated
from aerogel.cost.device import cache_folder
from aerogel.cost.latency import cpu_name as cpu_name
from aerogel.data import Dataset
from aerogel.errors import AerogelError
from aerogel.files import new_folder, read_json, read_toml, write_json, write_text
from aerogel.nets import NETS

STATE = "state.json"
ORIGINAL, RESULT = "candidates/000", "model"  # saved folders


def is_run(path: Path) -> bool:
    return (path / STATE).is_file()


class Run:
    """`run["plan"]` is what a finished stage found; `run["plan"] = {...}` finishes it, durably."""

    def __init__(self, path: Path, settings: Settings, state: dict[str, Any]) -> None:
        self.path, self.settings, self._state = path, settings, state

    @classmethod
    def create(cls, settings: Settings, out: Path | None, state: dict[str, Any]) -> Run:
        """A new folder, whole or not at all: `out`, or runs/<time>-<name>.

        state: what is known before the first stage. Raises AerogelError when the folder exists or cannot be made.
        """
        path = _unused(settings) if out is None else out
        _note_begun(settings)
        with new_folder(path, "run") as temp:
            write_text(temp / "config.toml", to_toml(settings))
            write_json(temp / "environment.json", environment(settings))
            write_json(temp / STATE, state)
        return cls(path, settings, state)

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises AerogelError when `path` holds none, or a damaged one."""
        if not is_run(path):
            raise AerogelError(f"{path} is not a run folder (it has no {STATE}); give the folder `compress` printed")
        config = path / "config.toml"
        settings = validated(read_toml(config), f"{config}: ")
        state = read_json(path / STATE)
        if not isinstance(state, dict) or "data" not in state:
            raise AerogelError(f"{path / STATE} is not a run's; it is corrupt, so start a new run")
        return cls(path, settings, state)

    def check_code(self, trust: bool) -> None:
        """Raises AerogelError when the run names code to import, was not begun here, and is not trusted."""
        code = [text for text in self.settings.named if _is_code(text)]
        code += ["trust = true"] if self.settings.trust else []
        if code and not trust and not _mark(self.settings).exists():
            raise AerogelError(
                f"{self.path} asks for {code[0]!r}, which is code, and was not begun by you on this machine; read it, "
                "then pass --trust to import it"
            )

    @property
    def done(self) -> list[str]:
        """Names of what is finished, in order."""
        return [name for name in self._state if name not in ("data", "seconds", "speed")]

    def check_data(self, data: Dataset) -> None:
        """Raises AerogelError when the data are not those the run began with."""
        if data.fingerprint() != self["data"]:
            raise AerogelError(
                f"{data.name} has changed since {self.path} began; bring the data back or start a new run"
            )

    def __contains__(self, stage: str) -> bool:
        return stage in self._state

    def __getitem__(self, stage: str) -> Any:
        return self._state[stage]

    def __setitem__(self, stage: str, found: Any) -> None:
        self._write({**self._state, stage: found})
        self.event(stage=stage, done=True)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds spent inside to run["seconds"][stage], also when they end in an error or a signal."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self._state.get("seconds", {})
            total = spent.get(stage, 0.0) + time.monotonic() - began
            self._write({**self._state, "seconds": {**spent, stage: total}})

    @property
    def speed(self) -> dict[str, Any]:
        """How fast each stage that trained did so."""
        found: dict[str, Any] = self._state.get("speed", {})
        return found

    def note_speed(self, stage: str, speed: dict[str, Any]) -> None:
        """How fast a stage trained; run["speed"][stage]."""
        self._write({**self._state, "speed": {**self._state.get("speed", {}), stage: speed}})

    def event(self, **fields: Any) -> None:
        """One JSON line in events.jsonl."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        try:
            with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise AerogelError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def clear(self, *parts: str) -> Path:
        """The path of a part of the run, with whatever lies there removed."""
        path = self.path.joinpath(*parts)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def _write(self, state: dict[str, Any]) -> None:
        write_json(self.path / STATE, state)
        self._state = state


def _is_code(text: str) -> bool:
    """Whether a MODEL or DATA, as a run keeps it, is a factory that would be imported."""
    source, _, name = text.rpartition(":")
    kinds = ("folder", "packed", "hf", "wds")
    return bool(source) and "=" not in name and text.partition(":")[0] not in (*NETS, *kinds)


def _mark(settings: Settings) -> Path:
    """The empty file that says that this user has begun a run of these settings on this machine."""
    name = hashlib.sha256(to_toml(settings).encode()).hexdigest()
    return cache_folder() / "begun" / name


def _note_begun(settings: Settings) -> None:
    """Of runs that import code. Where it cannot be written, the run can be resumed with --trust."""
    if settings.trust or any(map(_is_code, settings.named)):
        with suppress(OSError):
            _mark(settings).parent.mkdir(parents=True, exist_ok=True)
            _mark(settings).touch()


def _unused(settings: Settings) -> Path:
    """runs/<time>-<model>-<goal>, numbered when two runs begin within a second."""
    name = "-".join([settings.short_model, *settings.target[:1]])
    stem = f"{datetime.now():%Y-%m-%d_%H%M%S}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
    numbered = (Path("runs") / f"{stem}-{number}" for number in itertools.count(2))
    return next(path for path in itertools.chain([Path("runs") / stem], numbered) if not path.exists())


def environment(settings: Settings) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    packages = {name: version(name) for name in ("torch", "onnxruntime", "onnx", "numpy")}
    return {
        "aerogel": aerogel.__version__,
        "python": platform.python_version(),
        **packages,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "training_threads": torch.get_num_threads(),
        "runtime_threads": settings.threads,
        "seed": settings.seed,
        "platform": platform.platform(terse=True),
        "command": shlex.join(["aerogel", *sys.argv[1:]]),
    }
