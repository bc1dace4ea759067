"""benchmarks/training_speed.py: its plain loop reads the same images, and its page says what its results do."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from test_steps import toy

from aerogel.data import batches


@pytest.fixture(scope="module")
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("training_speed")


def test_one_by_one_is_the_same_image_moved(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy("shift")
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([2]))  # the offset that moves nothing
    whole = torch.cat([batch.inputs for batch in batches(data, "train", 8)])
    plain = script.OneByOne(data)
    assert len(plain) == len(whole)
    torch.testing.assert_close(torch.stack([plain[i][0] for i in range(len(plain))]), whole)
    assert [plain[i][1] for i in range(len(plain))] == data.train.labels.tolist()


def test_the_page_says_what_the_results_say(script: ModuleType) -> None:
    held = json.loads(script.RESULTS.read_text())
    assert script.table(held) in script.PAGE.read_text()
    assert held["loops"].keys() == script.JOBS.keys()
