"""A real disk that fills, and one that turns read-only: the checkpoint before stays, one line says what is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("small_disk.py")
OWN_MOUNTS = ["unshare", "--mount", "--map-root-user"]


def may_mount() -> bool:
    words = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_a_disk_that_fills_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("this system lets nobody mount a disk of their own")
    done = subprocess.run(
        [*OWN_MOUNTS, sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["room for two"] == ""
    assert "No space left on device" in found["full"]
    assert found["full"].endswith("step_0000001, is intact")
    assert found["left when full"] == ["step_0000001"]
    assert found["first when full"] is None
    assert "MiB" in found["room when full"]
    assert "free" in found["room when full"]
    for moment in ("read-only", "room when read-only"):
        assert "Read-only file system" in found[moment], found[moment]
    assert found["damage"] == []
    assert found["same after"] is True
    assert found["left at the end"] == ["step_0000001", "step_0000002"]
    assert list(tmp_path.iterdir()) == [], "what was mounted is gone with its process"
