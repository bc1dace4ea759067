"""`aerogel prune --sparsity` under torchrun: two processes prune and retrain, one speaks, the zeros are exact."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_two_processes_prune_single_weights(schedule: str, tmp_path: Path) -> None:
    (tmp_path / "brief.toml").write_text("seconds = 0.1\nrecover = 0.5\n")
    job = ("prune", "lenet_300_100", "--data", "digits", "--sparsity", "0.9", "--steps", "2", "--epochs", "4")
    words = (*TORCHRUN, "-m", "aerogel", *job, "--schedule", schedule, "--config", "brief.toml", "--out", "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AEROGEL_DATA": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^PASS ", done.stdout, re.M)) == 1
    report = json.loads((tmp_path / "run/report.json").read_text())
    kept = sum(layer["kept"] for layer in report["pruned"]["layers"])
    assert kept <= round(0.1 * sum(layer["weights"] for layer in report["pruned"]["layers"]))
    held = load_file(tmp_path / "run/model/model.safetensors")
    assert sum(int((w != 0).sum()) for w in held.values() if w.ndim > 1) == kept
    speeds = json.loads((tmp_path / "run/state.json").read_text())["speed"]
    assert {speed["processes"] for speed in speeds.values()} == {2}
