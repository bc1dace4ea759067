"""What was stopped goes on: after Ctrl-C, SIGTERM, kill -9, a full disk and errors, to the very same weights."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import JOB, Finished, digest, right, weights

from aerogel.compress.job import _Log

Aerogel = Callable[..., Any]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: Path, aerogel: Aerogel) -> Path:
    """A run that an error nobody foresaw stopped after its check."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of a kind")

    with monkeypatch.context() as patched:
        patched.setattr("aerogel.compress.baseline", fail)
        outcome = aerogel("compress", *JOB, "--config", brief, "--out", tmp_path / "stopped")
    file = tmp_path / "stopped/error.txt"
    assert outcome.code == 1
    assert outcome.err == f"error: unexpected ZeroDivisionError: of a kind (its traceback is in {file})\n"
    assert "Traceback" in file.read_text()
    return tmp_path / "stopped"


def test_to_resume_a_finished_run_changes_nothing(finished: Finished, aerogel: Aerogel) -> None:
    before = digest(finished.path)
    outcome = aerogel("resume", finished.path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "is finished; nothing is left to do" in outcome.out
    assert "\nPASS   macs x0." in outcome.out
    assert json.loads(aerogel("resume", finished.path, "--json").out) == finished.report
    assert digest(finished.path) == before


def test_an_unfinished_run_is_named_as_such_and_other_data_are_refused(stopped: Path, aerogel: Aerogel) -> None:
    outcome = aerogel("verify", stopped)
    assert outcome.code == 1
    assert outcome.err == f"error: verify: {stopped} has no result yet; finish it with `aerogel resume {stopped}`\n"
    outcome = aerogel("report", stopped)
    assert outcome.code == 1
    assert f"finish the run with `aerogel resume {stopped}`" in outcome.err

    state = json.loads((stopped / "state.json").read_text())
    (stopped / "state.json").write_text(json.dumps({**state, "data": "0" * 64}))
    before = digest(stopped)
    outcome = aerogel("resume", stopped)
    assert outcome.code == 1
    assert outcome.err == f"error: digits has changed since {stopped} began; bring the data back or start a new run\n"
    assert digest(stopped) == before


def test_a_signal_that_came_between_two_stages_is_heard(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    monkeypatch.setattr("aerogel.compress.baseline", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    outcome = aerogel("resume", stopped, "--json")
    assert (outcome.code, outcome.out) == (75, "")
    assert f"resume    {stopped}: lenet_300_100 on digits  ->  macs=0.3" in outcome.err
    assert "done so far: check" in outcome.err
    assert f"stopped   what was done is kept; `aerogel resume {stopped}` finishes it" in outcome.err


def test_a_stopped_training_goes_on_with_the_same_command_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    words = ["train", "lenet_300_100", "--data", "digits", "--epochs", "2", "--out"]
    whole = json.loads(aerogel(*words, "whole", "--json").out)
    assert whole["accuracy"]["value"] == pytest.approx(100 * right(tmp_path / "whole", "test").mean())
    assert json.loads((tmp_path / "whole/config.json").read_text())["metrics"]["accuracy"] == whole["accuracy"]
    logged = _Log.__call__

    def log_and_interrupt(log: _Log, step: Any) -> None:
        logged(log, step)
        if step.number == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(_Log, "__call__", log_and_interrupt)
        outcome = aerogel(*words, "net")
    assert (outcome.code, outcome.err) == (130, "")
    assert "what was done is kept in net.part; the same command goes on" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.part", "whole"]
    refused = aerogel("resume", "net.part")
    assert refused.err == "error: resume: net.part is a stopped `aerogel train`; the same command as before goes on\n"

    outcome = aerogel(*words, "net", "--lr", "0.01")
    assert outcome.code == 1
    assert re.search(r"net\.part holds a stopped training with other options or data; .*remove it", outcome.err)
    outcome = aerogel(*words, "net")
    assert outcome.code == 0
    assert "goes on at step 5 of 18" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "whole"]
    assert weights(tmp_path / "net") == weights(tmp_path / "whole")


def test_a_training_that_blows_up_says_how_to_go_on(tmp_path: Path, brief: Path, aerogel: Aerogel) -> None:
    outcome = aerogel("compress", *JOB, "--config", brief, "--lr", "1e12", "--out", "run")
    assert outcome.code == 1
    assert re.fullmatch(r"error: train: .* is not finite at step \d+ .*; lower --lr \(now 1e\+12\).*\n", outcome.err)
    assert "stopped   what was done is kept; once that is mended, `aerogel resume run` goes on" in outcome.out
    assert "begin again: `aerogel compress --config run/config.toml --lr ...`" in outcome.out
    assert aerogel("train", *JOB[:3], "--lr", "1e12", "--out", "net").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no net.part: nothing in it was worth keeping


def test_a_run_survives_ctrl_c_a_full_disk_sigterm_and_kill(
    finished: Finished, brief: Path, tmp_path: Path, aerogel: Aerogel
) -> None:
    """One run stopped in every way there is, each time in a process of its own, ends in the very same weights."""
    run = tmp_path / "run"
    done = interrupted(run, "baseline", signal.SIGINT, "compress", *JOB, "--config", brief, "--out", run)
    assert (done.code, done.err) == (130, "")
    assert f"stopped   what was done is kept; `aerogel resume {run}` finishes it" in done.out
    assert (run / "checkpoints/baseline").is_dir()

    done = command("resume", run, file_bytes=500_000)  # the original's weights are a megabyte
    assert done.code == 1
    assert re.fullmatch(r"error: cannot write \S+: .*File too large.* make room or write elsewhere\n", done.err)
    assert "goes on at step " in done.out
    assert not (run / "candidates/000").exists()
    assert not (run / "model").exists()

    done = interrupted(run, "step 001", signal.SIGTERM, "resume", run)
    assert (done.code, done.err) == (75, "")
    assert weights(run / "candidates/000") == weights(finished.path / "candidates/000")
    assert interrupted(run, "step 001", signal.SIGKILL, "resume", run).code == -signal.SIGKILL

    last = aerogel("resume", run)
    assert last.code == 0, last
    assert "done so far: check, baseline, plan, cut 001\n" in last.out
    assert re.search(r"^step 001  goes on at step \d+ of 720$", last.out, re.MULTILINE)
    assert weights(run / "model") == weights(finished.path / "model")
    assert set(digest(run)) == set(digest(finished.path))
    report = json.loads((run / "report.json").read_text())
    assert report["verdict"]["goals"] == finished.report["verdict"]["goals"]
    assert report["candidates"][1]["val_accuracy"] == finished.report["candidates"][1]["val_accuracy"]
    assert [curve["x"] for curve in report["curves"]] == [curve["x"] for curve in finished.report["curves"]]
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    assert seconds["baseline"] > 0  # of the earlier attempts: the last one did not train it


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def command(
    *words: object,
    file_bytes: int | None = None,
    send: signal.Signals | None = None,
    once: Callable[[], bool] = lambda: False,
) -> Outcome:
    """The command in a process of its own; `send` goes to it `once` something holds; no file outgrows `file_bytes`."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    argv = [sys.executable, "-m", "aerogel", *map(str, words)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=one_thread, preexec_fn=limit, **pipes) as process:
        end = time.monotonic() + 120
        while send is not None and not once():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "it never came so far"
            time.sleep(0.01)
        if send is not None:
            process.send_signal(send)
        out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def interrupted(run: Path, stage: str, number: signal.Signals, *words: object) -> Outcome:
    """Sends the signal once training in that stage has left two more records."""
    events = run / "events.jsonl"

    def records() -> int:
        return events.read_text().count(f'"train": "{stage}"') if events.exists() else 0

    before = records()
    return command(*words, send=number, once=lambda: records() >= before + 2)
