"""The verbs that train under torchrun, as a user starts them: rank 0 leads, a rank that dies ends the job or begins it
anew, which then goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aerogel.cli import run_command

pytestmark = pytest.mark.distributed
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TRAIN = ("-m", "aerogel", "train", "lenet_300_100", "--data", "digits", "--batch-size", "100")
PATIENCE = 60.0  # seconds for the others to end once one has died


def started(folder: Path, *words: str | Path) -> subprocess.Popen[str]:
    """torchrun in a folder of its own. Its processes are its children: they end with it."""
    command = [*TORCHRUN, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AEROGEL_DATA": ""}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """{rank: pid} of what torchrun started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"^PPid:\t(\d+)", (folder / "status").read_text(), re.M)
            if parent and int(parent[1]) == process.pid:
                words = (folder / "environ").read_bytes().split(b"\0")
                found |= {w[5:].decode(): int(folder.name) for w in words if w.startswith(b"RANK=")}
        except OSError:  # it has just ended
            continue
    return found


def until(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Returns once a file of that name is there."""
    end = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_goal_is_met_by_two_processes_and_only_one_of_them_speaks(tmp_path: Path) -> None:
    (tmp_path / "brief.toml").write_text("steps = 1\nseconds = 0.1\n")
    job = ("prune", "lenet_300_100", "--data", "digits", "--target", "macs=0.5", "--max-drop", "30", "--epochs", "5")
    process = started(tmp_path, "-m", "aerogel", *job, "--config", "brief.toml", "--out", "run")
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    assert len(re.findall(r"^PASS ", out, re.M)) == 1
    assert len(re.findall(r"^report ", out, re.M)) == 1
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["verdict"]["pass"] is True
    speeds = [stage["text"] for stage in report["stages"] if "images/s" in stage["text"]]
    assert len(speeds) == 2, "training and recovery tell how fast they were"
    held = json.loads((tmp_path / "run/state.json").read_text())["speed"]
    assert {speed["processes"] for speed in held.values()} == {2}


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_a_restart_goes_on_by_itself(tmp_path: Path) -> None:
    whole = started(tmp_path, *TRAIN, "--epochs", "4", "--out", "whole")
    out, _ = whole.communicate(timeout=280)
    assert whole.returncode == 0, out

    killed = started(tmp_path, *TRAIN, "--epochs", "3000", "--out", "killed")
    until(tmp_path, "killed.part/events.jsonl", killed)
    began = time.monotonic()
    os.kill(children(killed)["1"], signal.SIGKILL)
    out, _ = killed.communicate(timeout=280)
    assert time.monotonic() - began < PATIENCE
    assert killed.returncode == 1
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", out), out
    assert not (tmp_path / "killed").exists()

    again = started(tmp_path, "--max-restarts", "2", *TRAIN, "--epochs", "4", "--out", "again")
    until(tmp_path, "again.part/events.jsonl", again)
    os.kill(children(again)["1"], signal.SIGKILL)
    out, _ = again.communicate(timeout=280)
    assert again.returncode == 0, out
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_torchruns_sigterm_saves_and_a_second_start_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path, *TRAIN, "--epochs", "3000", "--out", "net")
    until(tmp_path, "net.part/events.jsonl", process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=280)
    assert time.monotonic() - began < 30
    assert "what was done is kept in net.part; the same command goes on" in out
    assert list((tmp_path / "net.part/checkpoints/train").glob("step_*"))


def test_a_restart_of_what_is_finished_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["train", "lenet_300_100", "--data", "digits", "--epochs", "1", "--json", "--out", str(tmp_path / "net")]
    assert run_command(job) == 0
    found = capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_command(job) == 0
    again = capsys.readouterr()
    assert again.out == found
    assert "is finished; nothing is left to do" in again.err


def test_a_job_that_may_be_restarted_needs_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert run_command(["compress", "lenet_300_100", "--data", "digits", "--target", "macs=0.5"]) == 1
    told = "error: torchrun may restart this job; give it --out RUN, by which a restart finds what was done\n"
    assert capsys.readouterr().err == told
