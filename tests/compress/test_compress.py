"""The main job from end to end: what a run leaves, its verdict counted again, and every kind of input.

Goals here are counts, which are exact; the one latency goal is loose, so that no test depends on speed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from runs import JOB, Finished, digest, right, weights
from safetensors.torch import load_file

from aerogel import data
from aerogel.compress.settings import TABLES, Settings
from aerogel.export import load

Aerogel = Callable[..., Any]
NETWORK = """
import torch
from torch import nn

class Twig(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.thin = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)
    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.thin(torch.relu(self.depth(self.wide(x))))
        return self.head(x.mean((2, 3)))
"""


def linear_macs(folder: Path) -> int:
    """Of a network of linear layers: the numbers in their weights."""
    return sum(w.numel() for w in load_file(folder / "model.safetensors").values() if w.ndim == 2)


def test_the_stages_are_told_in_order(finished: Finished) -> None:
    stages = [line.split()[0] for line in finished.out.splitlines() if re.match(r"[a-z]", line)]
    order = list(dict.fromkeys(stages))
    assert order[:9] == ["compress", "check", "run", "baseline", "plan", "cut", "step", "ship", "report"]
    assert "lenet_300_100 on digits  ->  macs=0.3, drop <= 20 pt" in finished.out
    assert re.search(r"^PASS   macs x0\.\d{3} <= x0\.300   accuracy drop ", finished.out, re.MULTILINE)
    assert "\x1b" not in finished.out


def test_nothing_is_left_that_nobody_needs(finished: Finished) -> None:
    saved = ("config.json", "model.safetensors", "model.onnx")
    files = {f"candidates/{name}/{file}" for name in ("000", "001") for file in saved}
    files |= {f"model/{file}" for file in (*saved, "verify.json")}
    files |= {"config.toml", "environment.json", "events.jsonl", "state.json", "report.html", "report.json"}
    assert set(digest(finished.path)) == files
    assert {path.name for path in finished.path.iterdir() if path.is_dir()} == {"candidates", "model"}


def test_the_verdict_is_what_the_files_say(finished: Finished) -> None:
    """The drop on the test images, its Bonett-Price bounds and the share of MACs, counted from the files."""
    before, after = right(finished.path / "candidates/000", "test"), right(finished.path / "model", "test")
    n, lost, gained = len(before), int((before & ~after).sum()), int((~before & after).sum())
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    macs, drop = finished.report["verdict"]["goals"]
    assert drop["value"] == pytest.approx(100 * (lost - gained) / n, abs=1e-9)
    assert drop["low"] == pytest.approx(100 * (p - q - half), abs=1e-9)
    assert drop["high"] == pytest.approx(100 * (p - q + half), abs=1e-9)
    assert (drop["limit"], drop["met"]) == (20, drop["high"] <= 20)
    share = linear_macs(finished.path / "model") / linear_macs(finished.path / "candidates/000")
    assert macs["value"] == macs["low"] == macs["high"] == share
    assert (macs["limit"], macs["met"]) == (0.3, share <= 0.3)
    assert finished.report["verdict"]["pass"] is True
    assert finished.report["before"]["accuracy"]["value"] == pytest.approx(100 * before.mean())
    assert finished.report["after"]["accuracy"]["value"] == pytest.approx(100 * after.mean())


def test_the_report_agrees_with_a_recount(finished: Finished) -> None:
    report = finished.report
    for side, folder in (("before", "candidates/000"), ("after", "model")):
        tensors = load_file(finished.path / folder / "model.safetensors")
        hidden = [w.shape[0] for name, w in tensors.items() if re.search(r"fc\d\.weight", name)]
        assert report[side]["params"] == sum(w.numel() for w in tensors.values())
        assert report[side]["macs"] == linear_macs(finished.path / folder)
        assert report[side]["file_bytes"] == (finished.path / folder / "model.onnx").stat().st_size
        assert report[side]["channels"] == sum(hidden)
    original, shipped = report["candidates"]
    assert (original["name"], shipped["name"]) == ("000", "001")
    assert (original["shipped"], shipped["shipped"]) == (False, True)
    assert shipped["val_accuracy"] == pytest.approx(100 * right(finished.path / "candidates/001", "val").mean())
    assert shipped["macs"] == report["after"]["macs"] == sum(row["macs_after"] for row in report["layers"])
    assert report["before"]["macs"] == sum(row["macs_before"] for row in report["layers"])
    digits = data.load("digits")
    sizes = {split: len(getattr(digits, split)) for split in ("train", "val", "test")}
    assert report["data"] == {"name": "digits", "fingerprint": f"sha256:{digits.fingerprint()}", **sizes}
    assert report["cut"]["max_error"] <= 1e-4
    assert report["command"].startswith("aerogel compress lenet_300_100 --data digits")


def test_the_exported_file_computes_what_the_saved_model_computes(finished: Finished) -> None:
    model = load(finished.path / "model")
    images = torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    session = onnxruntime.InferenceSession(finished.path / "model/model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        assert np.abs(model(images).numpy() - logits).max() < 1e-4
    assert finished.report["parity"]["ok"]
    assert finished.report["parity"]["samples"] == finished.report["data"]["test"]


def test_every_stage_has_its_seconds_and_the_training_its_curves(finished: Finished) -> None:
    stages = finished.report["stages"]
    assert [stage["name"] for stage in stages] == ["check", "baseline", "plan", "cut and recover", "ship"]
    assert all(stage["seconds"] >= 0 and stage["text"] for stage in stages)
    assert sum(stage["seconds"] for stage in stages) > 0
    curves = {curve["name"]: curve for curve in finished.report["curves"]}
    losses = {name: set(curve["series"]) for name, curve in curves.items()}
    assert losses == {"baseline": {"hard"}, "step 001": {"hard", "soft"}}
    hard = curves["baseline"]["series"]["hard"]
    assert curves["baseline"]["x"][-1] == 40 * -(-1069 // 128)
    assert hard[-1] < hard[0]


def test_its_config_has_every_option(finished: Finished) -> None:
    text = (finished.path / "config.toml").read_text()
    for option in Settings.model_fields.keys() - {*TABLES, "weights", "input", "data_root"}:
        assert re.search(rf"^{option} = ", text, re.MULTILINE), option
    assert "epochs = 40.0" in text


def test_to_verify_it_gives_the_same_verdict(finished: Finished, aerogel: Aerogel) -> None:
    before = digest(finished.path)
    outcome = aerogel("verify", finished.path, "--json", "--threads", "2")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["pass"] is True
    assert found["verdict"]["goals"] == finished.report["verdict"]["goals"]
    assert found["after"]["latency"]["threads"] == 2
    assert found["text"].startswith(f"{finished.report['verdict']['text']}\n100.00 % top-1 agreement")
    assert digest(finished.path) == before


def test_a_file_that_was_replaced_is_found_out(finished: Finished, tmp_path: Path, aerogel: Aerogel) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    shutil.copyfile(run / "candidates/000/model.safetensors", run / "model/model.safetensors")
    outcome = aerogel("verify", run)
    assert outcome.code == 1
    assert re.fullmatch(r"error: .*model/model\.safetensors.*\n", outcome.err)


def test_a_saved_folder_verifies_alone_and_fails_with_anothers_file(
    finished: Finished, tmp_path: Path, aerogel: Aerogel
) -> None:
    outcome = aerogel("verify", finished.path / "candidates/001")
    assert outcome.code == 0
    assert re.match(r"PASS   100\.00 % top-1 agreement of model\.onnx .* on 64 images, .*random inputs", outcome.out)
    folder = shutil.copytree(finished.path / "candidates/001", tmp_path / "other")
    shutil.copyfile(finished.path / "candidates/000/model.onnx", folder / "model.onnx")
    outcome = aerogel("verify", folder, "--json")
    assert outcome.code == 2
    assert json.loads(outcome.out)["pass"] is False
    (folder / "model.onnx").unlink()
    outcome = aerogel("verify", folder)
    assert (outcome.code, "there is no file" in outcome.err) == (1, True)


def test_two_files_are_timed_in_turns(finished: Finished, aerogel: Aerogel) -> None:
    outcome = aerogel("verify", finished.path / "candidates/000", finished.path, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["ratio"]["low"] <= found["ratio"]["value"] <= found["ratio"]["high"]
    assert found["a"]["median_ms"] > 0
    assert re.match(r"A .* ms \[.*\nB .* ms \[.*\nB / A = x[\d.]+ \[[\d.]+, [\d.]+\]$", found["text"])


def test_its_report_is_written_again(finished: Finished, tmp_path: Path, aerogel: Aerogel) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    (run / "report.html").unlink()
    outcome = aerogel("report", run)
    assert outcome.code == 0
    assert outcome.out.endswith(f"{run}/report.html\n")
    assert "PASS" in (run / "report.html").read_text()
    assert (run / "report.json").read_bytes() == (finished.path / "report.json").read_bytes()


def test_its_folder_is_never_overwritten(finished: Finished, brief: Path, aerogel: Aerogel) -> None:
    before = digest(finished.path)
    outcome = aerogel("compress", *JOB, "--config", brief, "--out", finished.path)
    assert outcome.code == 1
    assert "exists and is never overwritten" in outcome.err
    assert digest(finished.path) == before


def test_a_run_repeats_itself_and_a_missed_goal_is_told_with_the_nearest(
    finished: Finished, tmp_path: Path, aerogel: Aerogel
) -> None:
    """From its config: the same weights, byte by byte. With --max-drop 0 the verdict fails; the result is there."""
    config, again = finished.path / "config.toml", tmp_path / "again"
    outcome = aerogel("compress", "--config", config, "--max-drop", "0", "--out", again, "--json")
    report = json.loads(outcome.out)
    assert weights(again / "candidates/000") == weights(finished.path / "candidates/000")
    assert weights(again / "model") == weights(finished.path / "model")
    assert (again / "config.toml").read_text() == config.read_text().replace("max_drop = 20.0", "max_drop = 0.0")

    verdict, drop = report["verdict"], report["verdict"]["goals"][-1]
    assert (outcome.code, verdict["pass"], drop["met"]) == (2, False, False)
    assert re.match(r"FAIL   macs x0\.\d{3} <= x0\.300   accuracy drop .* not within 0\.00 pt$", verdict["text"])
    (needed,) = (re.search(r"this size needs --max-drop ([\d.]+)", point["text"]) for point in verdict["nearest"])
    assert drop["high"] <= float(needed[1]) <= drop["high"] + 0.01
    assert report == json.loads((again / "report.json").read_text())
    assert json.loads((again / "model/verify.json").read_text())["verdict"] == verdict
    assert outcome.err.startswith("compress  lenet_300_100 on digits")
    assert f"nearest   {needed[0]}\n" in outcome.err
    assert aerogel("resume", again).code == 2  # as the run itself said


def test_ones_own_network_and_images_with_protected_layers_and_rounded_widths(tmp_path: Path, aerogel: Aerogel) -> None:
    make_images(tmp_path / "pets")
    (tmp_path / "net.py").write_text(NETWORK)
    options = 'steps = 1\nseconds = 0.1\nprotect = ["stem"]\nround_to = 4\ncriterion = "l1"\nrecover = 0.5\n'
    (tmp_path / "some.toml").write_text(options)
    words = ["net.py:Twig", "--data", "folder:pets", "--input", "3,16,16", "--config", "some.toml", "--batch-size", "8"]
    goals = ["--target", "macs=0.8", "--target", "params=0.9", "--max-drop", "100", "--epochs", "2"]
    outcome = aerogel("compress", *words, *goals)
    assert outcome.code == 0, outcome
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-net.py-Twig-macs-0.8")
    assert f"not read: {tmp_path}/pets/train/red/notes.txt (not an image suffix)" in outcome.out
    assert re.search(r"stays: .*: protected by 'stem'", outcome.out)

    after = load_file(run / "model/model.safetensors")
    width = after["wide.weight"].shape[0]
    assert after["stem.weight"].shape == (8, 3, 3, 3)
    assert after["depth.weight"].shape == (width, 1, 3, 3)
    assert (width < 16, width % 4) == (True, 0)
    report = json.loads((run / "report.json").read_text())
    assert [goal["name"] for goal in report["verdict"]["goals"]] == ["macs", "params", "accuracy drop"]
    assert report["title"] == "net.py:Twig on folder:pets"
    assert report["bad_files"] == [[f"{tmp_path}/pets/train/red/notes.txt", "not an image suffix"]]

    # Its saved folder names code: that is imported only when the user says so, and from anywhere.
    os.chdir(run)
    refused = aerogel("cost", "model")
    assert (refused.code, "--trust" in refused.err) == (1, True)
    assert json.loads(aerogel("cost", "model", "--trust", "--json").out)["params"] == report["after"]["params"]
    assert aerogel("verify", run).code == 0


def make_images(folder: Path) -> None:
    """Small PNGs of three colours, 12 each, and a note among them."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / f"train/{name}/{i}.png")
    (folder / "train/red/notes.txt").write_text("not an image")


def test_a_network_that_was_cut_already_is_cut_further(
    finished: Finished, brief: Path, tmp_path: Path, aerogel: Aerogel
) -> None:
    words = ["--data", "digits", "--target", "params=0.5", "--max-drop", "100", "--epochs", "1", "--config", brief]
    outcome = aerogel("compress", finished.path / "model", *words, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome
    assert "no weights given" not in outcome.out
    assert weights(tmp_path / "run/candidates/000") == weights(finished.path / "model")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["title"] == "model on digits"
    assert report["before"]["params"] == finished.report["after"]["params"]
    assert report["after"]["params"] <= 0.5 * report["before"]["params"]
    assert [curve["name"] for curve in report["curves"]] == ["step 001"]


def test_weights_are_taken_and_a_latency_is_met(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    """A goal that the far deeper cut to a fifth of the MACs meets too; the network's latency is all in its weights."""
    monkeypatch.setattr(importlib.import_module("aerogel.compress.plan"), "TRIES", 2)
    (tmp_path / "some.toml").write_text("steps = 1\nseconds = 0.3\nround_to = 1\nrecover = 0.3\n")
    given = ["lenet_300_100", "--data", "digits", "--weights", finished.path / "candidates/000", "--epochs", "1"]
    goals = ["--target", "latency=0.9", "--target", "macs=0.2", "--max-drop", "100", "--config", "some.toml"]
    outcome = aerogel("compress", *given, *goals, "--out", "run")
    assert outcome.code == 0, outcome
    assert "no weights given" not in outcome.out
    assert weights(tmp_path / "run/candidates/000") == weights(finished.path / "candidates/000")
    latency, macs, _ = json.loads((tmp_path / "run/report.json").read_text())["verdict"]["goals"]
    assert latency["unit"] == "x"
    assert latency["low"] <= latency["value"] <= latency["high"] <= latency["limit"] == 0.9
    assert macs["value"] <= 0.2
    assert re.search(r"latency: cutting reaches .* to .* ms .*; the goal is inside", outcome.out)
    assert re.search(r"plan +MACs x0\.\d+ in widths of 1 give latency x", outcome.out)
