"""reproduce/kd_students.py in a few steps: every pair and loss trains, once; and the picture of docs/."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

import aerogel as ag
from aerogel.train import Recipe

SCRIPTS = Path(__file__).parents[2] / "reproduce"
DATA = ag.data.load("digits", size=(1, 16, 16))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("kd_students")


@pytest.fixture
def job(script: ModuleType, tmp_path: Path) -> Any:
    return script.Job(Recipe(epochs=0.5, batch_size=16), images=32, runs=tmp_path / "runs", given=DATA)


@pytest.mark.parametrize("loss", ["alone", "kd", "fitnet", "at", "sp", "dkd", "dist"])
def test_a_student_of_every_loss_is_trained_once(script: ModuleType, job: Any, tmp_path: Path, loss: str) -> None:
    path = tmp_path / "results" / "students.json"
    script.learn(job, "shufflenet_v2", loss, 0, path=path)
    before = path.read_bytes()
    script.learn(job, "shufflenet_v2", loss, 0, path=path)
    assert path.read_bytes() == before
    [row] = importlib.import_module("results").rows(path)
    assert row["row"] == f"shufflenet_v2_{loss}"
    assert 0 <= row["mean"] <= 100


def test_rows_of_cifar_are_told_apart_and_have_three_channels(script: ModuleType, job: Any, tmp_path: Path) -> None:
    colour = dataclasses.replace(job, dataset="cifar10", given=ag.data.load("digits", size=(3, 16, 16)))
    path = tmp_path / "students.json"
    script.learn_teacher(colour, 0, path=path)
    script.learn(colour, "shufflenet_v2", "kd", 0, path=path)
    held = importlib.import_module("results").rows(path)
    assert [row["row"] for row in held] == ["cifar10_teacher", "cifar10_shufflenet_v2_kd"]
    assert {row["command"] for row in held} == {"python reproduce/kd_students.py --data cifar10"}


@pytest.mark.parametrize("student", ["mobilenet_v2", "shufflenet_v1", "shufflenet_v2"])
def test_the_tapped_maps_are_of_8_by_8_positions(script: ModuleType, student: str) -> None:
    for spec, name in ((script.STUDENTS[student], student), (script.TEACHER, script.TEACHER)):
        net = script.fresh(spec, 0).eval()
        with ag.distill.Taps(net, list(script.STAGES[name])) as taps:
            net(DATA.train.rows(slice(0, 2)).float())
            assert tuple(taps[script.STAGES[name][0]].shape[2:]) == (8, 8)


def test_bold_needs_two_seeds_and_two_standard_errors(script: ModuleType) -> None:
    beyond = importlib.import_module("tables")._beyond
    plain = {"mean": 80.0, "sd": 1.0, "ours": [79.0, 80.0, 81.0]}
    assert beyond({"mean": 82.0, "sd": 1.0, "ours": [81.0, 82.0, 83.0]}, plain)
    assert not beyond({"mean": 81.5, "sd": 1.0, "ours": [80.5, 81.5, 82.5]}, plain)
    assert not beyond({"mean": 90.0, "sd": None, "ours": [90.0]}, plain)


def test_the_picture_has_a_line_a_series_and_a_tick_an_x(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    draw = importlib.import_module("pictures").lines
    text = draw({"30": [(1, 400, 10), (4, 300, 5), (20, 350, 0)], "800": [(1, 150, 0), (4, 120, 0)]}, "T", "errors")
    root = ElementTree.fromstring(text)
    kinds = [one.tag.rpartition("}")[2] for one in root.iter()]
    assert kinds.count("polyline") == 2
    assert kinds.count("circle") == 5
    words = {one.text for one in root.iter() if one.tag.endswith("text")}
    assert {"1", "4", "20", "30", "800", "T", "errors"} <= words
