"""Each example runs as a reader would run it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_light_ideas_shows_less_work_in_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "light_ideas.py"))["main"](seconds=0.5)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        numbers = [float(word) for word in line[47:].replace("->", " ").split()[:4]]
        macs_before, macs_after, access_before, access_after = numbers
        assert macs_after < macs_before or access_after < access_before, line


@pytest.mark.slow
def test_prune_recovers_what_a_cut_alone_loses() -> None:
    found = runpy.run_path(str(EXAMPLES / "prune.py"))["main"](epochs=8)
    assert found["cut"] < 60
    assert found["cut, norms measured again"] > found["cut"] - 5
    assert found["cut, recovered"] > found["uncut"] - 5
    assert found["cut while training"] > found["uncut"] - 8
