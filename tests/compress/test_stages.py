"""The pieces of the stages that need no training: closing in on a latency, the frontier, the verdict's words."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aerogel.compress.check import check
from aerogel.compress.goal import parse_goal, parse_goals
from aerogel.compress.job import Job, open_job
from aerogel.compress.plan import TRIES, Probed, _close_in, _weights_for_file
from aerogel.compress.recover import frontier
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings
from aerogel.compress.ship import _goal, _goal_text, _nearest, _size_goal
from aerogel.compress.subgoal import shares
from aerogel.console import Console
from aerogel.cost.latency import Ratio
from aerogel.errors import AerogelError, CutError
from aerogel.stats import Interval
from aerogel.train import Recipe

SETTINGS = Settings(model="lenet_300_100", data="digits", target=["latency=0.5"], seconds=0.1)


@pytest.fixture(scope="module")
def job() -> Job:
    return open_job(SETTINGS, Console(io.StringIO()), parse_goals(SETTINGS.target))


@given(floor=st.floats(0, 0.3), curve=st.floats(0.5, 2), above=st.floats(0.2, 0.65))
def test_closing_in_finds_a_large_cut_within_the_goal(floor: float, curve: float, above: float) -> None:
    """Of a latency that grows with the MACs as floor + (1 - floor) MACs^curve."""
    goal = floor + above

    def probe(_: nn.Module, share: float, multiple: int) -> Probed:
        assert (0 < share < 1, multiple) == (True, 8)
        return Probed(share, share, floor + (1 - floor) * share**curve)

    tried = _close_in(probe, nn.Identity(), goal, 8)  # type: ignore[arg-type]
    assert 1 <= len(tried) <= TRIES
    assert max(probed.ratio for probed in tried if probed.ratio <= goal) >= 0.7 * goal


def test_closing_in_goes_on_past_what_coarse_widths_cannot_reach() -> None:
    asked = []

    def probe(_: nn.Module, share: float, multiple: int) -> Probed:
        asked.append(share)
        if share < 0.6:
            raise CutError("out of reach")
        return Probed(share, share, share)

    tried = _close_in(probe, nn.Identity(), 0.8, 1)  # type: ignore[arg-type]
    assert tried
    assert _close_in(probe, nn.Identity(), 0.1, 1) != tried  # type: ignore[arg-type]
    assert min(asked) < 0.6


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (("latency", "x", 0.4812, 0.476, 0.4871, 0.5), "latency x0.481 [0.476, 0.487] <= x0.500"),
        (("latency", "ms", 2.4812, 2.4, 2.6, 2.5), "latency 2.481 ms [2.4, 2.6] not within 2.5 ms"),
        (("accuracy drop", "pt", 0.1, -0.2, 0.42, 0.3), "accuracy drop 0.10 pt [-0.20, 0.42] not within 0.30 pt"),
        (("macs", "", 149_999.0, 149_999.0, 149_999.0, 150e3), "macs 149,999 <= 150,000"),
        (("macs", "x", 0.5, 0.5, 0.5, 0.5), "macs x0.500 <= x0.500"),
    ],
)
def test_a_goal_is_met_by_its_upper_bound_and_told_with_its_interval(goal: tuple[Any, ...], text: str) -> None:
    found = _goal(*goal)
    assert found["met"] is (found["high"] <= found["limit"])
    assert _goal_text(found) == text


def test_a_latency_goal_is_judged_by_the_upper_bound_of_what_was_typed() -> None:
    times = {"median_ms": 2.0, "low_ms": 1.9, "high_ms": 2.2}
    ratio = Ratio(Interval(0.4, 0.39, 0.42), SimpleNamespace(), SimpleNamespace(**times), pairs=9)  # type: ignore[arg-type]
    share = _size_goal(parse_goal("latency=0.41"), ratio, {}, {})
    assert (share["unit"], share["value"], share["high"], share["limit"], share["met"]) == ("x", 0.4, 0.42, 0.41, False)
    time = _size_goal(parse_goal("latency=2200us"), ratio, {}, {})
    assert (time["unit"], time["value"], time["high"], time["limit"], time["met"]) == ("ms", 2.0, 2.2, 2.2, True)


def test_a_count_is_judged_exactly() -> None:
    before, after = {"macs": 1000, "peak_bytes": 4096}, {"macs": 301, "peak_bytes": 2048}
    ratio: Any = None  # no latency is asked for
    assert _size_goal(parse_goal("macs=0.3"), ratio, before, after) == _goal("macs", "x", 0.301, 0.301, 0.301, 0.3)
    assert _size_goal(parse_goal("peak_bytes=2KiB"), ratio, before, after) == _goal(
        "peak_bytes", "", 2048, 2048, 2048, 2048
    )


def candidate(name: str, macs: int, accuracy: float) -> dict[str, Any]:
    others = dict.fromkeys(("params", "flops", "access_bytes", "peak_bytes", "channels", "file_bytes"), macs)
    return {"name": name, "macs": macs, "val_accuracy": accuracy, "latency_ratio": macs / 1000, **others}


def test_what_another_beats_in_size_and_accuracy_is_removed(tmp_path: Path) -> None:
    rows = [candidate("001", 600, 91.0), candidate("002", 500, 91.0), candidate("003", 300, 80.0)]
    state = {"baseline": candidate("000", 1000, 90.5)} | {f"candidate {row['name']}": row for row in rows}
    run = Run.create(SETTINGS, tmp_path / "run", state)
    for name in ("000", "001", "002", "003"):
        (run.path / "candidates" / name).mkdir(parents=True)
    found = frontier(SimpleNamespace(size_key="macs"), run, 3)  # type: ignore[arg-type]
    assert [(one["name"], one["frontier"], one["shipped"]) for one in found] == [
        ("000", False, False), ("001", False, False), ("002", True, False), ("003", True, True),
    ]  # fmt: skip
    assert sorted(path.name for path in (run.path / "candidates").iterdir()) == ["000", "002", "003"]


def test_a_latency_that_is_not_met_is_cut_for_deeper_until_it_is(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latency here is a tenth and the share of the MACs; cuts below 0.15 of them are out of reach."""
    stage = importlib.import_module("aerogel.compress.subgoal")
    run = Run.create(SETTINGS, tmp_path / "run", {"baseline": {"macs": 1000}})

    def cut_to(job: Job, plan: object, before: object, whole: object, share: dict[str, float]) -> SimpleNamespace:
        if share["macs"] < 0.15:
            raise CutError("out of reach")
        return SimpleNamespace(model=share["macs"])

    def time_it(probe: object, model: float) -> SimpleNamespace:
        return SimpleNamespace(ratio=Interval(model + 0.1, model + 0.09, model + 0.11))

    monkeypatch.setattr(stage, "_cut_to", cut_to)
    monkeypatch.setattr(stage.Probe, "time", time_it)

    def deepest(goal: float) -> float:
        whole = SimpleNamespace(model=0.8)
        found = stage._deeper_until(job, run, {}, nn.Identity(), {"macs": 0.8, "params": 0.5}, goal, whole)
        return float(found.model)

    assert 0.3 < deepest(0.5) <= 0.5 - 0.11
    assert deepest(0.95) == 0.8  # met at once
    assert deepest(0.2) >= 0.15  # out of reach: the deepest there is, and the verdict will say so


def test_the_nearest_goals_can_be_typed_and_tell_what_else_was_found() -> None:
    shipped = candidate("002", 300, 80.0) | {"frontier": True, "shipped": True}
    other = candidate("001", 603, 90.0) | {"frontier": True, "shipped": False}
    original = candidate("000", 1000, 91.0) | {"frontier": True, "shipped": False}
    goals = [
        _goal("macs", "x", 0.3, 0.3, 0.3, 0.2),
        _goal("latency", "ms", 2.5, 2.4, 2.6, 2.0),
        _goal("params", "", 300.0, 300.0, 300.0, 400.0),
        _goal("accuracy drop", "pt", 11.0, 8.0, 14.3217, 1.0),
    ]
    found = _nearest(SimpleNamespace(size_key="macs"), [original, other, shipped], goals)  # type: ignore[arg-type]
    assert [point["text"] for point in found] == [
        "this size needs --max-drop 14.33",
        "--target macs=0.3 is what this result meets",
        "--target latency=2.63ms is what this result meets",
        "--target macs=0.603 cost 1.00 points on validation: candidates/001",
    ]
    slower = [_goal("latency", "x", 1.1, 1.0, 1.2, 0.5), goals[-1] | {"met": True}]
    found = _nearest(SimpleNamespace(size_key="latency_ratio"), [original, shipped], slower)  # type: ignore[arg-type]
    assert [point["text"] for point in found] == ["no latency below the original's was reached"]


@pytest.mark.parametrize(
    ("target", "share"),
    [("file_bytes=0.5", 0.475), ("file_bytes=630B", 0.58), ("file_bytes=1", 1.0)],
    ids=["x", "B", "1"],
)
def test_a_file_goal_becomes_a_share_of_the_weights_in_it(target: str, share: float) -> None:
    """Of a file of 1,050 bytes, 50 of which no cut takes."""
    whole = {"file_bytes": 1050, "weight_bytes": 1000}
    assert _weights_for_file(parse_goal(target), whole) == pytest.approx(share)
    with pytest.raises(CutError, match=r"file_bytes=0\.04 is out of reach: the file holds 50 bytes beside the weights"):
        _weights_for_file(parse_goal("file_bytes=0.04"), whole)


@pytest.mark.parametrize(("momentum", "slim"), [(0.9, 1.0), (0.0, 0.5)], ids=["sgd", "plain"])
def test_the_penalty_of_slimming_moves_an_unheld_scale_from_1_to_0(momentum: float, slim: float) -> None:
    train = Recipe(epochs=4, batch_size=107, lr=0.1, schedule="constant", warmup=0, momentum=momentum)
    asked = SETTINGS.model_copy(update={"slimming": True, "slim": slim, "train": train})
    settings = open_job(asked, Console(io.StringIO()), parse_goals(["params=0.5"])).settings
    scale = speed = 0.0
    for _ in range(int(4 * slim * -(-1069 // 107))):  # steps of an epoch, the last batch is not left out
        speed = momentum * speed + settings.penalty
        scale += 0.1 * speed
    assert scale == pytest.approx(1, rel=0.3 if momentum else 0.06)  # momentum needs its time to build up


def test_the_share_of_every_round_follows_the_schedule() -> None:
    plan = {"target": {"macs": 0.25}}
    for schedule, kept in {"iterative": 0.25**0.5, "linear": 0.625, "gradual": 0.25 + 0.75 / 8}.items():
        job: Any = SimpleNamespace(settings=SETTINGS.model_copy(update={"schedule": schedule, "steps": 2}))
        assert shares(job, plan, 1) == {"macs": pytest.approx(kept)}
        assert shares(job, plan, 2) == {"macs": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("target", "ratio", "message"),
    [
        ("latency=0.2", 0.3, r"latency=0\.2 .*: cutting reaches 3 to 10 ms \(x0\.30 to x1\); ask for latency=0\.34 or"),
        ("latency=2ms", 0.3, r"latency=2ms is out of reach: .*; ask for latency=3\.4ms or more"),
        ("latency=0.5", 0.95, r"latency=0\.5 is out of reach: .*; cutting makes this network no faster here"),
        ("latency=11ms", 0.3, r"latency=11ms: the network is already within it \(latency=10ms\); ask for less"),
    ],
)  # fmt: skip
def test_a_latency_out_of_reach_is_refused_with_one_that_is_not(
    job: Job, target: str, ratio: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, ratio)
    asked = open_job(SETTINGS, Console(io.StringIO()), parse_goals([target]))
    with pytest.raises(AerogelError, match=message):
        check(asked)


def test_a_latency_in_reach_is_a_share_of_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.3)
    stream = io.StringIO()
    checked = check(open_job(SETTINGS, Console(stream), parse_goals(["latency=4ms", "params=0.5"])))
    assert checked.fractions == {"params": 0.5, "latency": 0.4}
    assert "latency: cutting reaches 3 to 10 ms (x0.30 to x1); the goal is inside" in stream.getvalue()


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """The original takes 10 ms and the deepest cut that share of it, whatever is exported."""
    ends = Interval(ratio, 0.97 * ratio, 1.03 * ratio)
    times = [SimpleNamespace(median_ms=10.0), SimpleNamespace(median_ms=10.0 * ratio)]
    stage = importlib.import_module("aerogel.compress.check")  # the attribute of that name is its function
    monkeypatch.setattr(stage, "export_onnx", lambda model, args, path: SimpleNamespace(path=path))
    monkeypatch.setattr(stage, "compare_files", lambda *_: Ratio(ends, *times, pairs=1))  # type: ignore[arg-type]


def test_a_folder_is_saved_with_its_onnx_file_or_not_at_all(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.save(job.opened.model, tmp_path / "plain", onnx=False)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]

    def fail(*_: object) -> None:
        raise AerogelError("export_onnx: cannot be exported")

    monkeypatch.setattr("aerogel.compress.job.export_onnx", fail)
    with pytest.raises(AerogelError, match="cannot be exported"):
        job.save(job.opened.model, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_saved_network_reads_images_as_it_was_trained_to(job: Job, tmp_path: Path) -> None:
    """The normalisation comes with the weights, be they the MODEL or --weights."""
    other = job.data.mean[0] + 0.1
    trained = Job(SETTINGS, (), _with_mean(job, other), job.opened, job.console)
    trained.save(job.opened.model, tmp_path / "saved", onnx=False)
    for model, weights in ((str(tmp_path / "saved"), None), ("lenet_300_100", str(tmp_path / "saved"))):
        settings = SETTINGS.model_copy(update={"model": model, "weights": weights})
        assert open_job(settings, Console(io.StringIO())).data.mean == (other,)
    settings = SETTINGS.model_copy(update={"model": str(tmp_path / "saved"), "input": (1, 32, 32)})
    with pytest.raises(AerogelError, match=r"reads images of 1,28,28, digits has 1,32,32; pass --input 1,28,28"):
        open_job(settings, Console(io.StringIO()))


def _with_mean(job: Job, mean: float) -> Any:
    return dataclasses.replace(job.data, mean=(mean,))


def test_small_sets_are_trained_for_more_epochs_unless_the_user_says(job: Job) -> None:
    assert job.settings.train.epochs == 40  # 10 x the root of 20,000 images over 1,069
    settings = Settings(model="lenet_300_100", data="digits", train={"epochs": 10})  # type: ignore[arg-type]
    assert open_job(settings, Console(io.StringIO())).settings.train.epochs == 10


def test_the_data_root_of_a_run_is_used_unless_the_user_sets_one_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model="lenet5", data="mnist", data_root=str(tmp_path / "held"))
    with pytest.raises(AerogelError, match=re.escape(f"$AEROGEL_DATA ({tmp_path}/held)")):
        open_job(settings, Console(io.StringIO()))
    assert "AEROGEL_DATA" not in os.environ
    monkeypatch.setenv("AEROGEL_DATA", "now")
    with pytest.raises(AerogelError, match=re.escape("$AEROGEL_DATA (now)")):
        open_job(settings, Console(io.StringIO()))
