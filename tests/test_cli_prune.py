"""`aerogel prune` as a user calls it: methods, schedules, the scan, what is told and what is judged, and resuming."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from aerogel import data
from aerogel.compress.job import _Log
from aerogel.export import load
from aerogel.train import accuracy

Aerogel = Callable[..., Any]
NETWORK = """
from torch import nn

def unit(i, o, norm):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o) if norm else nn.Identity(), nn.ReLU())

def net(norm=True):
    return nn.Sequential(unit(1, 8, norm), nn.MaxPool2d(2), unit(8, 16, norm), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(64, 10))

def plain():
    return net(norm=False)
"""
SIZE = ("--data", "digits", "--input", "1,12,12")
BRIEF: dict[str, Any] = {"seconds": 0.05, "round_to": 1, "recover": 0.5, "slim": 0.5}
TRAIN = {"epochs": 4, "batch_size": 64, "warmup": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, aerogel: Aerogel) -> Path:
    """net.py, and trained/: its network after some epochs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "net.py").write_text(NETWORK)
    words = (f"{folder}/net.py:net", *SIZE, "--epochs", "8", "--batch-size", "64", "--out", folder / "trained")
    assert aerogel("train", *words).code == 0
    return folder


@pytest.fixture
def prune(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> Callable[..., Any]:
    """`prune("--target", "macs=0.5", config={...})`: of the trained network, into ./run of an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)

    def call(*words: object, model: str = "net", out: str = "run", ema: float | None = None, **config: Any) -> Any:
        train = TRAIN if ema is None else TRAIN | {"ema": ema}
        (tmp_path / "some.toml").write_text(tomli_w.dumps(BRIEF | config | {"train": train}))
        given = ["--weights", home / "trained"] if model == "net" else []
        named = (f"{home}/net.py:{model}", *SIZE, *given, "--config", "some.toml", "--out", out)
        return aerogel("prune", *named, *words)

    return call


def report_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "report.json").read_text())


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def said(out: str, stage: str) -> list[str]:
    """What a stage printed, line by line."""
    return re.findall(rf"^{stage} +(.+)$", out, re.MULTILINE)


def test_it_cuts_in_rounds_and_tells_the_drop_without_judging_it(prune: Callable[..., Any], aerogel: Aerogel) -> None:
    outcome = prune("--method", "magnitude", "--target", "macs=0.5", "--steps", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert said(outcome.out, "prune") == ["net.py:net on digits  ->  macs=0.5"]
    (method,) = said(outcome.out, "method")
    assert method == "l2: smallest l2 norm of the weights (magnitude); iterative, 2 cuts"
    first, second = (said(outcome.out, f"cut 00{k}")[0] for k in (1, 2))
    shares = [float(re.match(r"MACs x([\d.]+)", line)[1]) for line in (first, second)]  # type: ignore[index]
    assert 0.6 < shares[0] <= 0.5**0.5 + 1e-3
    assert shares[1] <= 0.5
    assert re.search(r"validation [\d.]+ % before recovery   cut = masked to \d", first)
    assert re.search(r"^PASS   macs x0\.\d+ <= x0\.500   accuracy drop \S+ pt \[\S+, \S+\]$", outcome.out, re.MULTILINE)
    report = report_of("run")
    macs, drop = report["verdict"]["goals"]
    assert (macs["met"], drop["met"], drop["limit"]) == (True, None, None)
    assert report["method"] == method
    assert report["repeat"][0] == "aerogel prune --config run/config.toml"
    assert report["candidates"][2]["unrecovered_accuracy"] <= 100
    page = Path("run/report.html").read_text()
    assert "limit" not in page[page.index("<b>accuracy drop</b>") : page.index("Before and after")]
    assert aerogel("resume", "run").code == 0


def test_cut_while_training_it_resumes_to_the_very_same_weights(
    prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    """Stopped between and after the cuts, with momentum and averaged weights; data show a criterion the way."""
    words = ("--method", "taylor", "--schedule", "gradual", "--steps", "3", "--target", "macs=0.4")
    assert prune(*words, ema=0.9, out="whole").code == 0
    logged, stops = _Log.__call__, [9, 30]

    def log_and_interrupt(log: _Log, step: Any) -> None:
        logged(log, step)
        if stops and step.number == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Log, "__call__", log_and_interrupt)
    outcome = prune(*words, ema=0.9)
    codes = [outcome.code]
    while codes[-1] == 130 and len(codes) < 9:
        outcome = aerogel("resume", "run")
        codes.append(outcome.code)
    assert codes == [130, 130, 0]
    assert "recover   goes on at step 30 of 34" in outcome.out
    for part in ("candidates/001", "model"):
        whole, again = weights(f"whole/{part}"), weights(f"run/{part}")
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    report = report_of("run")
    assert report["verdict"]["goals"][0]["value"] <= 0.4
    assert [curve["name"] for curve in report["curves"]] == ["gradual"]
    assert report["curves"][0]["x"][-1] == 34
    assert [one["name"] for one in report["candidates"]] == ["000", "001"]
    assert not Path("run/checkpoints").exists()


def test_slimming_trains_with_the_penalty_shows_the_scales_and_is_judged_where_a_drop_is_limited(
    prune: Callable[..., Any],
) -> None:
    outcome = prune("--method", "slimming", "--target", "channels=0.5", "--max-drop", "0", "--json", penalty=0.01)
    report = json.loads(outcome.out)
    channels, drop = report["verdict"]["goals"]
    assert (outcome.code, report["verdict"]["pass"]) == (2, False)
    assert (channels["met"], drop["met"], drop["limit"]) == (True, False, 0)
    assert "this size needs --max-drop" in report["verdict"]["nearest"][0]["text"]
    assert report == report_of("run")
    assert said(outcome.err, "prune") == ["net.py:net on digits  ->  channels=0.5, drop <= 0 pt"]
    assert said(outcome.err, "method")[0].startswith("slimming: training with 0.01 x |gamma|")
    assert said(outcome.err, "slim")[0] == "2 epochs with a penalty of 0.01 on batch-norm scales"
    curves = {curve["name"]: set(curve["series"]) for curve in report["curves"]}
    assert curves == {"slim": {"hard", "slimming"}, "step 001": {"hard", "soft"}}
    counts = {name: sum(row) for name, row in report["scales"]["counts"].items()}
    assert counts == {"original": 24, "slimmed": 24, "result": 12}
    assert "scales" in plots_of("run")
    assert {stage["name"] for stage in report["stages"]} >= {"slim", "plan"}
    norms = [tensor for name, tensor in weights("run/model").items() if name.endswith(".1.weight")]
    assert sum(len(gamma) for gamma in norms) == 12


@pytest.mark.slow
def test_several_passes_of_slimming_keep_the_penalty_until_the_last(prune: Callable[..., Any]) -> None:
    words = ("--method", "slimming", "--schedule", "iterative", "--steps", "2", "--target", "channels=0.5")
    assert prune(*words).code == 0
    curves = {curve["name"]: set(curve["series"]) for curve in report_of("run")["curves"]}
    assert curves["step 001"] == {"hard", "soft", "slimming"}
    assert curves["step 002"] == {"hard", "soft"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l1", "fpgm", "lamp", "hessian", "apoz", "activation", "bn_scale", "random"])
def test_every_other_criterion_reaches_the_goal(method: str, prune: Callable[..., Any]) -> None:
    assert prune("--method", method, "--schedule", "one-shot", "--target", "macs=0.5", recover=0.25).code == 0
    assert report_of("run")["method"].startswith(f"{method}: ")


def test_the_scan_alone_needs_no_goal(
    prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    """Stopped at its first point, it is done by resuming."""
    with monkeypatch.context() as patched:
        stage = importlib.import_module("aerogel.compress.scan")  # the attribute of that name is its function
        patched.setattr(stage, "accuracy", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 0.0)
        assert prune("--scan", scan_images=100).code == 130
    outcome = aerogel("resume", "run", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    scan = report["scan"]
    assert (scan["images"], scan["criterion"], len(scan["shares"])) == (100, "l2", 9)
    assert {name: curve["channels"] for name, curve in scan["groups"].items()} == {"0.0": 8, "2.0": 16}
    for curve in scan["groups"].values():
        assert curve["removed"] == sorted(curve["removed"])
        assert curve["macs"] == sorted(curve["macs"], reverse=True)
        assert all(0 <= value <= 100 for value in curve["values"])
    assert report["verdict"]["pass"] is None
    assert "after" not in report
    assert "scan" in plots_of("run")
    assert "DONE" in Path("run/report.html").read_text()
    again = aerogel("resume", "run")
    assert again.code == 0
    assert re.search(r"^accuracy, % removed +channels +10 +30 +50 +70 +90$", again.out, re.MULTILINE)
    assert re.search(r"^2\.0 +16 +\d+\.\d\d", again.out, re.MULTILINE)
    refused = aerogel("verify", "run")
    assert refused.err == "error: verify: run is a sensitivity scan; there is no result in it to be checked\n"


@pytest.mark.slow
def test_a_scan_before_a_cut_that_is_not_trained_after(home: Path, prune: Callable[..., Any]) -> None:
    """recover = 0: the weights are those of the original, the norms' statistics are measured again."""
    outcome = prune("--scan", "--target", "macs=0.6", "--schedule", "one-shot", recover=0)
    assert outcome.code == 0, outcome
    report = report_of("run")
    digits = data.load("digits", size=(1, 12, 12))
    net = load("run/candidates/000", factory=_factory(home))
    assert report["scan"]["whole"] == accuracy(net, digits, "val")
    assert report["scan"]["images"] == len(digits.val)
    assert [stage["name"] for stage in report["stages"]][:3] == ["check", "baseline", "scan"]
    assert report["curves"] == []
    before, after = weights("run/candidates/000"), weights("run/model")
    kept = {tuple(row.flatten().tolist()) for row in before["0.0.weight"]}
    assert all(tuple(row.flatten().tolist()) in kept for row in after["0.0.weight"])
    assert not set(after["2.1.running_var"].tolist()) & set(before["2.1.running_var"].tolist())


def _factory(home: Path) -> Callable[[], torch.nn.Module]:
    space: dict[str, Any] = {}
    exec((home / "net.py").read_text(), space)
    return space["net"]


def plots_of(run: str) -> dict[str, Any]:
    page = Path(run, "report.html").read_text()
    return json.loads(re.search(r'<script id="plots"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


MACS = ("--target", "macs=0.5")
WRONG: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("method", (*MACS, "--method", "slimmin"), {}, r"--method 'slimmin' is unknown; did you mean slimming"),
    ("no_target", (), {}, r"--target is missing; say what to reach, as --target macs=0\.5, or ask for --scan alone"),
    ("schedule", (*MACS, "--schedule", "slow"), {}, r"option schedule: .*'gradual'.*got 'slow'"),
    ("one_shot_steps", (*MACS, "--schedule", "one-shot", "--steps", "3"), {},
     r"one-shot makes one cut; leave --steps out, or choose --schedule iterative"),
    ("steps_0", (*MACS, "--steps", "0"), {}, r"option steps: .*got 0"),
    ("gradual_short", (*MACS, "--schedule", "gradual", "--epochs", "0.5"), {},
     r"8 cuts do not fit into 0\.5 of 4 training steps.*fewer cuts or train longer"),
    ("gradual_untrained", (*MACS, "--schedule", "gradual"), {"recover": 0}, r"gradual cuts within the recovery; give"),
    ("slimming_ranking", (*MACS, "--method", "slimming"), {"ranking": "global"},
     r"slimming has one threshold on raw scales: leave out ranking"),
    ("reach", ("--target", "macs=0.0001"), {}, r"macs=0\.0001 \(cutting reaches .*out of reach"),
    ("drop", (*MACS, "--max-drop", "-1"), {}, r"option max_drop: .*got -1"),
    ("protect", MACS, {"protect": ["frist"]}, r"'frist' names no layer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "config", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_command_is_one_clear_line(
    name: str, words: tuple[str, ...], config: dict[str, Any], message: str, prune: Callable[..., Any]
) -> None:
    outcome = prune(*words, **config)
    assert outcome.code == 1
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err)
    assert re.search(message, outcome.err), outcome.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "slimming",
            r"--method slimming goes by .* batch norms: net\.py:plain has no channels .*--method l2",
        ),
        ("bn_scale", r"criterion 'bn_scale': group .* passes no batch norm"),
    ],
)
def test_a_network_without_batch_norms_cannot_be_pruned_by_their_scales(
    method: str, message: str, prune: Callable[..., Any]
) -> None:
    outcome = prune("--target", "macs=0.5", "--method", method, model="plain")
    assert outcome.code == 1
    assert re.search(message, outcome.err), outcome.err
    assert not Path("run").exists()
