"""The same seed on the same machine gives the same bits, every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Aerogel = Callable[..., Any]
QUICK, FULL = 5, 20
WORDS = ("train", "lenet5", "--data", "digits", "--epochs", "0.5", "--seed", "3")


def check_identical(runs: int, aerogel: Aerogel) -> str:
    """Trained `runs` times by the command line, other runs in between; the sha256 of the weights."""
    found = set()
    for number in range(runs):
        assert aerogel(*WORDS, "--out", f"net{number}").code == 0
        found.add(hashlib.sha256(Path(f"net{number}/model.safetensors").read_bytes()).hexdigest())
    (one,) = found
    assert aerogel(*WORDS[:-1], "4", "--out", "other").code == 0
    assert hashlib.sha256(Path("other/model.safetensors").read_bytes()).hexdigest() != one
    return one


def test_five_runs_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> None:
    monkeypatch.chdir(tmp_path)
    check_identical(QUICK, aerogel)


@pytest.mark.faults
def test_all_runs_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel, faults_result: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_identical(FULL, aerogel)
    faults_result.update({"runs": FULL, "identical": FULL})
