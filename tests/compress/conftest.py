"""A current folder of its own for every test, and one finished run for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import BRIEF, JOB, Finished


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "brief.toml"
    path.write_text(BRIEF)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, brief: Path, aerogel: Callable[..., Any]) -> Finished:
    """A whole run that met its goal. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    outcome = aerogel("compress", *JOB, "--config", brief, "--out", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return Finished(path, outcome.out, json.loads((path / "report.json").read_text()))
