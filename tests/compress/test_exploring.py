"""`aerogel distill --explore-temperature` and `--cache`, as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aerogel as ag
from aerogel.compress.exploring import student_of
from aerogel.distill.temperature import TEMPERATURES, moved
from aerogel.export import InputSpec
from aerogel.train import HardLabels, Recipe, fit, predict, start

Aerogel = Callable[..., Any]
DIGITS = ag.data.load("digits")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = ag.nets.build("mlp", widths=16)
    fit(start(net, HardLabels(), DIGITS, Recipe(epochs=2, lr=0.1)), DIGITS)
    folder = tmp_path_factory.mktemp("nets") / "teacher"
    spec = InputSpec(shape=DIGITS.input_shape, mean=DIGITS.mean, std=DIGITS.std)
    ag.save(net, folder, input=spec, classes=DIGITS.classes)
    return folder


def test_a_temperature_is_explored(aerogel: Aerogel, teacher: Path, tmp_path: Path) -> None:
    words = ["distill", "--explore-temperature", "--teacher", str(teacher), "--data", "digits"]
    done = aerogel(*words, "--out", str(tmp_path / "a"))
    assert done.code == 0, done.err
    assert "try T " in done.out
    assert str(tmp_path / "a" / "temperature.html") in done.out
    held = json.loads((tmp_path / "a" / "temperature.json").read_text())
    logits = predict(ag.load(teacher), DIGITS, "val")
    for row, expected in zip(held["rows"], moved(logits, DIGITS.val.labels), strict=True):
        assert row["entropy"] == pytest.approx(expected.entropy, rel=1e-4)
        assert row["student"] is None
    assert (tmp_path / "a" / "temperature.html").read_text().startswith("<!doctype html>")

    (tmp_path / "run.toml").write_text("model = 'mlp:widths=4'\n")  # as every run's config.toml names its student
    file = ("--config", str(tmp_path / "run.toml"))
    done = aerogel(*words, *file, "--temperature", "7", "--json", "--out", str(tmp_path / "b"))
    found = json.loads(done.out)
    assert found["page"] == str(tmp_path / "b" / "temperature.html")
    assert [row["temperature"] for row in found["rows"]] == sorted({*TEMPERATURES, 7.0})
    assert all(row["student"]["balance"] > 0 for row in found["rows"])
    assert found["samples"][0]["student"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--loss", "kd", "--epochs", "2"],
            "trains nothing; leave out --loss, --epochs, and train with the T that you ch",
        ),
        (["--mixup", "--cache", "c"], "leave out --mixup, --cache"),
        (["--teacher", "TEACHER"], "asks one teacher at a time, got teacher, teacher: the mean of several is another"),
        (["--temperature", "-1"], "temperature"),
        (["--out", "."], "exists and is never overwritten"),
    ],
)
def test_what_does_not_go_with_it(aerogel: Aerogel, teacher: Path, words: list[str], message: str) -> None:
    words = [word.replace("TEACHER", str(teacher)) for word in words]
    done = aerogel("distill", "--explore-temperature", "--teacher", str(teacher), "--data", "digits", *words)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_the_student_of_a_file_is_the_student(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("model = 'mlp:widths=4'\n")
    assert student_of(None, tmp_path / "run.toml") == "mlp:widths=4"
    assert student_of("lenet5", tmp_path / "run.toml") == "lenet5"
    (tmp_path / "other.toml").write_text("seed = 1\n")
    assert student_of(None, tmp_path / "other.toml") is None
    assert student_of(None, None) is None


@pytest.mark.slow
def test_a_second_run_asks_the_teacher_nothing_and_ends_alike(aerogel: Aerogel, teacher: Path, tmp_path: Path) -> None:
    words = ["distill", "--teacher", str(teacher), "--student", "mlp:widths=4", "--data", "digits", "--epochs", "1"]
    cache = ["--cache", str(tmp_path / "answers")]
    n = len(DIGITS.train)
    weights = {}
    for name, asked in (("live", None), ("first", n), ("second", 0)):
        done = aerogel(*words, *([] if asked is None else cache), "--out", str(tmp_path / name))
        assert done.code == 0, done.err
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
        if asked is not None:
            assert f"asked for {asked:,} images of training, {n - asked:,} were there" in " ".join(done.out.split())
    for name in ("first", "second"):
        assert all(torch.equal(tensor, weights["live"][key]) for key, tensor in weights[name].items())
    done = aerogel(*words, *cache, "--seed", "1", "--out", str(tmp_path / "other"))
    assert done.code == 1
    assert "was made for another augmentation, seed or batch size (seed 0 instead of 1)" in done.err
    assert not (tmp_path / "other").exists()
