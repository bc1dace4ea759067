"""A run's folder: made whole or not at all, its state durable, its record honest about attempts that were stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aerogel.compress.run import STATE, Run, environment, is_run
from aerogel.compress.settings import Settings
from aerogel.compress.story import curves_of
from aerogel.data import load
from aerogel.errors import AerogelError

SETTINGS = Settings(model="lenet5", data="digits", target=["macs=0.5"], threads=2, seed=7)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(SETTINGS, tmp_path / "run", {"data": "abc", "check": {"text": "fine"}})


def test_a_new_run_is_read_back_as_it_was_made(run: Run) -> None:
    assert sorted(file.name for file in run.path.iterdir()) == ["config.toml", "environment.json", STATE]
    assert is_run(run.path)
    again = Run.open(run.path)
    assert again.settings == SETTINGS
    assert again["data"] == "abc"
    assert again.done == ["check"]


def test_what_a_stage_found_is_on_disk_at_once(run: Run) -> None:
    assert "plan" not in run
    run["plan"] = {"round_to": 8}
    again = Run.open(run.path)
    assert "plan" in again
    assert again["plan"] == {"round_to": 8}
    assert again.done == ["check", "plan"]
    assert json.loads((run.path / "events.jsonl").read_text())["stage"] == "plan"


def test_what_cannot_be_written_is_not_held_either(run: Run) -> None:
    with pytest.raises(AerogelError, match=r"cannot write .*state\.json"):
        run["plan"] = {"seconds": float("nan")}
    assert "plan" not in run
    assert "plan" not in Run.open(run.path)


def test_seconds_add_up_over_attempts_also_when_one_is_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 100.0, 104.0, 200.0, 200.25])
    monkeypatch.setattr("aerogel.compress.run.time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt, match="stop"), run.timed("baseline"):
        raise KeyboardInterrupt("stop")
    again = Run.open(run.path)
    with again.timed("baseline"):
        pass
    with again.timed("plan"):
        pass
    assert Run.open(run.path)["seconds"] == {"baseline": 6.5, "plan": 0.25}
    assert "seconds" not in again.done


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(AerogelError, match="taken exists and is never overwritten"):
        Run.create(SETTINGS, taken, {})
    assert list(tmp_path.rglob("*")) == [taken]


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"cannot write .*state\.json"):
        Run.create(SETTINGS, tmp_path / "deep/run", {"data": float("inf")})
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]
    (tmp_path / "file").write_text("")
    with pytest.raises(AerogelError, match=r"cannot write .*file/run: Not a directory"):
        Run.create(SETTINGS, tmp_path / "file/run", {})


def test_runs_without_a_name_get_the_time_the_model_and_the_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS.model_copy(
        update={"model": "/home/me/my net.py:build", "target": ["latency=2.5 ms", "macs=1K"]}
    )
    names = [Run.create(settings, None, {}).path for _ in range(3)]
    assert len(set(names)) == 3  # also within one second
    for path in names:
        assert path.parent == Path("runs")
        assert "-my-net.py-build-latency-2.5-ms" in path.name
        assert path.is_dir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / STATE).unlink(), r"run is not a run folder \(it has no state\.json\); give the folder"),
        (lambda path: (path / STATE).write_text("{"), r"state\.json is not JSON"),
        (lambda path: (path / STATE).write_text("[]"), r"state\.json is not a run's; it is corrupt"),
        (lambda path: (path / STATE).write_text("{}"), r"state\.json is not a run's; it is corrupt"),
        (lambda path: (path / "config.toml").unlink(), r"cannot read .*config\.toml: No such file"),
        (lambda path: (path / "config.toml").write_text("steps ="), r"config\.toml is not TOML"),
        (
            lambda path: (path / "config.toml").write_text('modle = "x"\ndata = "y"\nmodel = "z"'),
            r"run/config\.toml: option 'modle' is unknown; did you mean model",
        ),
    ],
)
def test_what_is_no_run_or_a_damaged_one_is_named(run: Run, damage: object, message: str) -> None:
    assert callable(damage)
    damage(run.path)
    with pytest.raises(AerogelError, match=message):
        Run.open(run.path)


def test_other_data_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    digits = load("digits")
    Run.create(SETTINGS, tmp_path / "same", {"data": digits.fingerprint()}).check_data(digits)
    other = Run.create(SETTINGS, tmp_path / "other", {"data": "0" * 64})
    with pytest.raises(
        AerogelError, match=r"digits has changed since .*other began; bring the data back or start a new"
    ):
        other.check_data(digits)


def test_clearing_removes_what_was_left_and_only_that(run: Run) -> None:
    (run.path / "candidates/001").mkdir(parents=True)
    (run.path / "candidates/001/model.onnx").write_text("half")
    (run.path / "candidates/000").mkdir()
    assert run.clear("candidates", "001") == run.path / "candidates/001"
    assert run.clear("never", "there") == run.path / "never/there"
    assert [path.name for path in (run.path / "candidates").iterdir()] == ["000"]


def test_an_event_that_cannot_be_written_is_told(run: Run) -> None:
    (run.path / "events.jsonl").mkdir()
    with pytest.raises(AerogelError, match=r"cannot write .*events\.jsonl: Is a directory"):
        run.event(train="baseline", step=1)


def test_curves_pass_over_a_torn_line_and_take_the_later_of_two_records(run: Run) -> None:
    run.event(train="baseline", step=2, hard=2.0)
    run.event(train="baseline", step=4, hard=1.0)
    with open(run.path / "events.jsonl", "a") as file:
        file.write('{"time": "2026", "train": "basel\n')
    run.event(stage="plan", done=True)
    run.event(train="baseline", step=4, hard=0.9)  # done again by a resumed run
    run.event(train="baseline", step=6, hard=0.5)
    run.event(train="step 001", step=1, hard=0.1, soft=0.2)
    assert curves_of(run) == [
        {"name": "baseline", "x": [2, 4, 6], "series": {"hard": [2.0, 0.9, 0.5]}},
        {"name": "step 001", "x": [1], "series": {"hard": [0.1], "soft": [0.2]}},
    ]


def test_the_environment_says_what_a_reader_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/aerogel", "compress", "lenet5", "--out", "my run"])
    found = environment(SETTINGS)
    assert found["command"] == "aerogel compress lenet5 --out 'my run'"
    assert (found["seed"], found["runtime_threads"]) == (7, 2)
    assert {"aerogel", "torch", "onnxruntime", "onnx", "numpy", "python", "cpu", "cores", "platform"} <= found.keys()
