"""A run's folder: resolved config, environment, events, checkpoints, candidates, the result, the report.

state.json holds what each finished stage found; it is what `resume` reads. Nothing in it is ever guessed: a stage
that is not there is done again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from aerogel.compress.settings import Settings, read_toml, to_toml, validated
from aerogel.errors import AerogelError
from aerogel.files import read_json, refuse_existing, write_json, write_text


class Run:
    """`run["plan"]` is what a finished stage found; `run["plan"] = {...}` finishes it, durably."""

    def __init__(self, path: Path, settings: Settings, state: dict[str, Any]) -> None:
        self.path, self.settings, self._state = path, settings, state

    @classmethod
    def create(cls, settings: Settings, out: Path | None, name: str) -> Run:
        """A new folder: `out`, or runs/<time>-<name>. Raises AerogelError when it exists or cannot be made."""
        if out is None:
            stamp = datetime.now().strftime("%Y-%m-%d_%H%M%S")
            stem = Path("runs") / f"{stamp}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
            out = next(p for i in range(1000) if not (p := Path(f"{stem}{f'-{i}' if i else ''}")).exists())
        refuse_existing(out, "compress")
        try:
            out.mkdir(parents=True)
        except OSError as error:
            raise AerogelError(
                f"compress: cannot make {out}: {error.strerror}; name another --out"
            ) from error
        run = cls(out, settings, {})
        write_text(out / "config.toml", to_toml(settings))
        write_json(out / "environment.json", environment(settings))
        write_json(out / "state.json", {})
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises AerogelError when `path` holds none."""
        if not (path / "state.json").exists():
            raise AerogelError(
                f"resume: {path} is not a run folder (no state.json); give the folder `compress` printed"
            )
        settings = validated(read_toml(path / "config.toml"))
        return cls(path, settings, read_json(path / "state.json"))

    def __contains__(self, stage: str) -> bool:
        return stage in self._state

    def __getitem__(self, stage: str) -> Any:
        return self._state[stage]

    def __setitem__(self, stage: str, found: Any) -> None:
        self._state[stage] = found
        write_json(self.path / "state.json", self._state)
        self.event(stage=stage, done=True)

    def event(self, **fields: Any) -> None:
        """One JSON line in events.jsonl."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        try:
            with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise AerogelError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def clear(self, *parts: str) -> Path:
        """The path of a part of the run, with what an unfinished attempt left there removed."""
        path = self.path.joinpath(*parts)
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def environment(settings: Settings) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    packages = ("aerogel", "torch", "onnxruntime", "onnx", "numpy", "python")
    versions = {name: platform.python_version() if name == "python" else version(name) for name in packages}
    return versions | {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "training_threads": torch.get_num_threads(),
        "runtime_threads": settings.threads,
        "seed": settings.seed,
        "platform": platform.platform(terse=True),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
