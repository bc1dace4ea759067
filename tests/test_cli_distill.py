"""`aerogel distill` as a user calls it: what is trained, kept, told and refused; a stopped run goes on exactly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from aerogel import data
from aerogel.compress.distilling import _Watch
from aerogel.compress.job import _Log
from aerogel.distill.agreement import agreement, calibration_error, confusion
from aerogel.export import InputSpec, load, save
from aerogel.imports import import_factory
from aerogel.train import HardLabels, Recipe, fit, predict, start

Aerogel = Callable[..., Any]
NETWORK = """
import math
import torch
from torch import nn

def unit(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, 2, padding=1), nn.BatchNorm2d(o), nn.ReLU())

class Net(nn.Module):
    def __init__(self, wide, classes=10):
        super().__init__()
        self.one, self.two = unit(1, wide), unit(wide, 2 * wide)
        self.spare = nn.Linear(1, 1)
        self.head = nn.Linear(2 * wide, classes)

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))

def big():
    return Net(16)

def small():
    return Net(4)

def seven():
    return Net(4, 7)

def ill():
    net = Net(4)
    net.head.bias.data[3] = math.inf
    return net

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 10))

def fresh():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net(4)
"""
SIZE = ("--data", "digits", "--input", "1,8,8")
TRAIN = {"epochs": 3, "batch_size": 64, "lr": 0.1, "warmup": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.py, and teacher/: its big network after some epochs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    digits, net = data.load("digits", size=(1, 8, 8)), import_factory(f"{folder}/net.py:big")()
    fit(start(net, HardLabels(), digits, Recipe(epochs=12, batch_size=32, lr=0.1)), digits)
    spec = InputSpec(shape=(1, 8, 8), mean=digits.mean, std=digits.std)
    save(net, folder / "teacher", factory=f"{folder}/net.py:big", input=spec, classes=digits.classes)
    return folder


@pytest.fixture
def distill(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> Callable[..., Any]:
    """`distill("--alone", lesson={...})`: the small network by the trained one, into ./run of an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)

    def call(
        *words: object, teacher: str | None = "teacher", out: str = "run", lesson: dict[str, Any] | None = None,
        **train: Any,
    ) -> Any:  # fmt: skip
        table = {"seconds": 0.05, "train": TRAIN | train} | ({"distill": lesson} if lesson else {})
        (tmp_path / "some.toml").write_text(tomli_w.dumps(table))
        given = ["--teacher", f"{home}/{teacher}"] if teacher else []
        student = [] if "--student" in words else ["--student", f"{home}/net.py:small"]
        config = (*SIZE, "--trust", "--config", "some.toml", "--out", out)
        return aerogel("distill", *given, *student, *config, *words)

    return call


def report_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "report.json").read_text())


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: str, other: str) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(out: str, stage: str) -> list[str]:
    return re.findall(rf"^{stage} +(.+)$", out, re.MULTILINE)


def plots_of(run: str) -> dict[str, Any]:
    page = Path(run, "report.html").read_text()
    return json.loads(re.search(r'<script id="plots"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def answers(folder: Path) -> torch.Tensor:
    """Logits on the test digits of a saved folder's model.onnx, by ONNX Runtime and numpy alone."""
    spec = json.loads((folder / "config.json").read_text())["input"]
    mean, std = (np.reshape(spec[key], (1, -1, 1, 1)) for key in ("mean", "std"))
    inputs = ((data.load("digits", size=(1, 8, 8)).test.images.numpy() / 255 - mean) / std).astype(np.float32)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": inputs})[0])


def test_the_student_alone_is_shipped_and_the_report_tells_what_it_gained(
    home: Path, distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    words = ("--loss", "kd,hard,hint=1", "--tap", "one=one", "--tap", "two=two", "--alone")
    outcome = distill(*words, epochs=5)
    assert (outcome.code, outcome.err) == (0, "")
    assert said(outcome.out, "distill") == ["net.py:small on digits  <-  teacher"]
    assert said(outcome.out, "losses") == ["kd 0.9 + hard 0.1 + hint 1 at T 4"]
    assert re.search(r"; 368 more are trained beside the student and left out of it$", said(outcome.out, "check")[0])
    report = report_of("run")
    networks = {one["name"]: one for one in report["distillation"]["networks"]}
    assert list(networks) == ["teacher", "student before", "student", "labels alone"]
    assert networks["teacher"]["accuracy"]["value"] > networks["student"]["accuracy"]["value"]
    assert networks["student"]["accuracy"]["value"] > networks["student before"]["accuracy"]["value"] + 10
    assert networks["student"]["params"] < networks["teacher"]["params"] / 4

    digits = data.load("digits", size=(1, 8, 8))
    student, teacher = answers(Path("run/model")), predict(load(home / "teacher", trust=True), digits, "test")
    labels = digits.test.labels
    told, right = networks["student"], student.argmax(1) == labels
    assert told["accuracy"]["value"] == pytest.approx(100 * right.double().mean())
    assert told["agreement"] == pytest.approx(100 * agreement(student, teacher))
    assert told["ece"] == pytest.approx(100 * calibration_error(student, labels), abs=1e-4)
    assert networks["teacher"]["ece"] == pytest.approx(100 * calibration_error(teacher, labels), abs=1e-4)
    assert report["distillation"]["confusion"]["counts"] == confusion(student, teacher).tolist()
    gap, gain = report["distillation"]["gap"], report["distillation"]["gain"]
    assert gap["low"] < gap["value"] < gap["high"]
    assert gap["value"] == pytest.approx(networks["teacher"]["accuracy"]["value"] - told["accuracy"]["value"])
    assert gain["value"] == pytest.approx(told["accuracy"]["value"] - networks["labels alone"]["accuracy"]["value"])

    assert not any("heads" in name or "teacher" in name for name in weights("run/model"))
    assert weights("run/model").keys() == weights("run/candidates/alone").keys()
    assert sum(t.numel() for t in weights("run/model").values()) < 700
    assert not Path("run/checkpoints").exists()

    curves = {curve["name"]: curve for curve in report["curves"]}
    assert list(curves) == ["student", "labels alone", "teacher"]
    losses = {"kd loss", "hard loss", "hint loss"}
    watched = {"validation accuracy, %", "agreement with the teacher on validation, %", "ECE on validation, %"}
    assert set(curves["student"]["series"]) == losses | watched
    assert set(curves["labels alone"]["series"]) == {"hard loss"} | watched
    seen = curves["student"]["series"]["validation accuracy, %"]
    per_epoch = curves["student"]["x"][-1] // 5
    epochs = [x for x, value in zip(curves["student"]["x"], seen, strict=True) if value is not None]
    assert epochs == [per_epoch * epoch for epoch in range(1, 6)]
    assert seen[-1] == networks["student"]["val_accuracy"]
    assert {"confusion", "reliability", "curve-0"} <= plots_of("run").keys()
    assert [stage["name"] for stage in report["stages"]] == ["check", "teacher", "distil", "alone", "ship"]

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun's, after another process has died
    assert json.loads(distill(*words, "--json", epochs=5).out) == report
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    found = aerogel("verify", "run", "--json")
    assert (found.code, json.loads(found.out)["pass"]) == (0, True)
    assert json.loads(aerogel("resume", "run", "--json").out) == report
    assert aerogel("report", "run").code == 0
    assert re.search(r"^labels alone +\d+\.\d\d % \[", outcome.out, re.MULTILINE)


HARD_TO_RESUME = {"losses": {"kd": 1.0, "hard": 1.0, "hint": 1.0, "crd": 0.5}, "taps": {"one": "one"}, "alone": True,
                  "keep": "best", "options": {"crd": {"size": 128, "dim": 8}}}  # fmt: skip


def test_it_resumes_to_the_very_same_bits(
    distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    """Projectors, CRD's queue, averaged weights, Adam; stopped within an epoch, between two, in either training. What
    comes after both is another test's: an error ends these runs there."""

    def unshipped(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("aerogel.compress.distilling.ship", unshipped)
    recipe = {"ema": 0.9, "optimizer": "adamw", "lr": 0.01, "epochs": 2}
    assert distill(out="whole", lesson=HARD_TO_RESUME, **recipe).code == 1
    logged, watched, stops = _Log.__call__, _Watch.__call__, ["distil 21", "distil, epoch", "alone 25"]

    def stop(place: str) -> None:
        if stops and stops[0] == place:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    def log(self: _Log, step: Any) -> None:
        logged(self, step)
        stop(f"{self._stage} {step.number}")

    def watch(self: _Watch, state: Any) -> None:
        stop(f"{self._name}, epoch")
        watched(self, state)

    monkeypatch.setattr(_Log, "__call__", log)
    monkeypatch.setattr(_Watch, "__call__", watch)
    codes = [distill(lesson=HARD_TO_RESUME, **recipe).code]
    while codes[-1] == 130 and len(codes) < 9:
        codes.append(aerogel("resume", "run", "--trust").code)
    assert codes == [130, 130, 130, 1]
    assert not stops
    for name in ("distil", "alone"):
        assert same(f"whole/candidates/{name}", f"run/candidates/{name}")
        one, other = (json.loads(Path(run, "state.json").read_text())[name] for run in ("whole", "run"))
        assert one == other
        epochs = seen("whole", f"{name}, validation")
        assert epochs == seen("run", f"{name}, validation")
        assert one["val_accuracy"] == max(epoch["val_accuracy"] for epoch in epochs.values())


def seen(run: str, what: str) -> dict[int, dict[str, float]]:
    """{step: record} of events.jsonl; of a step told twice the later record."""
    events = map(json.loads, Path(run, "events.jsonl").read_text().splitlines())
    keys = ("val_accuracy", "agreement", "ece")
    return {event["step"]: {key: event[key] for key in keys} for event in events if event.get("train") == what}


def test_several_teachers_teach_without_labels(home: Path, distill: Callable[..., Any]) -> None:
    second = ("--teacher", f"{home}/net.py:fresh")
    lesson = {"shares": [3.0, 1.0], "combine": "geometric", "autocast": "bf16"}
    outcome = distill(*second, "--loss", "kd", "--temperature", "1", "--mixup", "--json", lesson=lesson)
    assert outcome.code == 0, outcome
    assert said(outcome.err, "losses") == ["kd 1 at T 1, mixup; no label is read"]
    report = json.loads(outcome.out)
    members = report["distillation"]["members"]
    assert [one["name"] for one in members] == ["teacher", "net.py:fresh"]
    assert members[0]["accuracy"] > 60 > members[1]["accuracy"]
    assert set(report["curves"][0]["series"]) >= {"kd loss"}
    assert "hard loss" not in report["curves"][0]["series"]
    assert "The teachers one by one" in Path("run/report.html").read_text()
    assert "latency" not in report["distillation"]


@pytest.mark.slow
def test_a_student_that_knows_something_goes_on_from_there(
    home: Path, distill: Callable[..., Any], aerogel: Aerogel
) -> None:
    assert distill("--epochs", "2").code == 0
    outcome = distill("--weights", "run/model", "--lr", "0.001", "--epochs", "1", out="again")
    assert outcome.code == 0, outcome
    first, again = (report_of(run)["distillation"]["networks"] for run in ("run", "again"))
    assert again[1]["accuracy"] == first[2]["accuracy"]
    repeated = aerogel("distill", "--config", "run/config.toml", "--out", "repeated")
    assert repeated.code == 0, repeated
    assert same("run/model", "repeated/model")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_and_go_on_when_stopped(
    home: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    """The student's and the teacher's classes are the user's own; a feature loss has weights of its own."""
    words = ("--loss", "kd,hard,hint=1", "--tap", "two=two", "--epochs", "2")
    assert distill(*words, out="alone").code == 0
    paths = ("--teacher", home / "teacher", "--student", f"{home}/net.py:small", "--config", "some.toml", "--trust")
    job = ("-m", "aerogel", "distill", *paths, *SIZE, *words)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AEROGEL_DATA": ""}

    def started(*command: object) -> subprocess.Popen[str]:
        return subprocess.Popen([*torchrun, *map(str, command)], cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    out, _ = (whole := started(*job, "--out", "both")).communicate(timeout=280)
    assert whole.returncode == 0, out
    assert len(re.findall(r"^report ", out, re.MULTILINE)) == 1
    one, two = weights("alone/model"), weights("both/model")
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)
    held = json.loads(Path("both/state.json").read_text())["speed"]
    assert held["distil"]["processes"] == 2

    stopped = started(*job, "--epochs", "3000", "--out", "stopped")
    while not Path("stopped/events.jsonl").exists() or "validation" not in Path("stopped/events.jsonl").read_text():
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    out, _ = stopped.communicate(timeout=280)
    assert "what was done is kept; `aerogel resume stopped` finishes it" in out, out
    assert list(Path("stopped/checkpoints/distil").glob("step_*"))


WRONG: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("no_teacher", (), {"teacher": None}, r"--teacher is missing; name a trained network"),
    ("untrained", ("--teacher", "lenet_300_100"), {"teacher": None},
     r"--teacher lenet_300_100: .*zoo without weights knows nothing; train it first \(aerogel train lenet_300_100 --d"
     r"ata digits --out teacher"),
    ("unknown", ("--teacher", "lenet55"), {"teacher": None}, r"model 'lenet55' is no net and no folder; did you mean"),
    ("left_over", ("--teacher-weights", "w.pt"), {}, r"--teacher-weights \S*w\.pt is left over: give one for each"),
    ("classes", (), {"teacher": "net.py:seven"}, r"--teacher net\.py:seven tells 7 classes apart, digits has 10; take"),
    ("infinite", (), {"teacher": "net.py:ill"}, r"--teacher net\.py:ill: .*logits must be finite, got 2 of 20"),
    ("size", (), {"teacher": "net.py:narrow"}, r"net\.py:narrow cannot read images of 1,8,8: .*; pass --input, or"),
    ("input", ("--input", "1,12,12"), {}, r"teacher reads images of 1,8,8, digits has 1,12,12; pass --input 1,8,8"),
    ("cold", ("--temperature", "0"), {}, r"option distill\.temperature: .*greater than 0, got 0"),
    ("loss", ("--loss", "kd,dkdd"), {}, r"--loss: there is no loss 'dkdd'; did you mean dkd"),
    ("twice", ("--loss", "kd", "--loss", "kd=2"), {}, r"--loss: each loss is given once, got kd again"),
    ("weight", ("--loss", "kd=many"), {}, r"--loss 'kd=many': the weight must be a number >= 0, got 'many'; write"),
    ("file_loss", (), {"lesson": {"losses": {"kdd": 1.0}}}, r"losses: there is no loss 'kdd'; did you mean kd"),
    ("mixup", ("--mixup",), {}, r"with mixup no loss may read labels, got hard; leave them out"),
    ("untapped", ("--loss", "hint"), {}, r"Distil: hint must have taps"),
    ("half_tap", ("--loss", "hint", "--tap", "one"), {}, r"--tap 'one' must be STUDENT_MODULE=TEACHER_MODULE"),
    ("same_tap", ("--loss", "hint", "--tap", "one=one", "--tap", "one=two"), {}, r"'one' of the student is given"),
    ("no_module", ("--loss", "hint", "--tap", "onne=one"), {}, r"'onne' is no module of the network; did you mean one"),
    ("no_theirs", ("--loss", "hint", "--tap", "one=tow"), {}, r"'tow' is no module of the network; did you mean two"),
    ("silent", ("--loss", "hint", "--tap", "spare=one"), {}, r"'spare' of Net did not fire"),
    ("needless_tap", ("--tap", "one=one"), {}, r"taps are given but no loss reads features"),
    ("option", (), {"lesson": {"options": {"kd": {"alpha": 1}}}}, r"kd has no option 'alpha'; known: temperature"),
    ("table", (), {"lesson": {"temperatur": 2}}, r"option 'distill\.temperatur' is unknown; did you mean temperature"),
    ("shares", (), {"lesson": {"shares": [1.0, 2.0]}}, r"weights must be 1 numbers >= 0 with a positive sum"),
    ("scale", (), {"lesson": {"mean": [0.1]}}, r"mean and std of the teacher are given together"),
    ("hub", ("--teacher", "hf:google/vit"), {"teacher": None}, r"model 'hf:google/vit' has no weights: .*save_pret"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "given", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_command_is_one_clear_line_and_nothing_is_written(
    name: str, words: tuple[str, ...], given: dict[str, Any], message: str, distill: Callable[..., Any]
) -> None:
    outcome = distill(*words, **given)
    assert outcome.code == 1
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err)
    assert re.search(message, outcome.err), outcome.err
    assert not Path("run").exists()


def test_a_missing_student_and_another_verbs_options_are_named(home: Path, tmp_path: Path, aerogel: Aerogel) -> None:
    words = ("distill", "--teacher", home / "teacher", "--data", "digits")
    assert aerogel(*words).err == "error: --student is missing; name the network to train, such as lenet5\n"
    config = tmp_path / "cut.toml"
    config.write_text("criterion = 'l1'\ntemperature = 2.0\n")
    outcome = aerogel(*words, "--student", "lenet5", "--config", config)
    assert re.match(r"error: distill cuts nothing: leave out criterion, temperature; its own", outcome.err)
    config.write_text("[distill]\nteacher = ['x']\n")
    outcome = aerogel("compress", "lenet5", "--data", "digits", "--target", "macs=0.5", "--config", config)
    assert re.match(r"error: the \[distill\] table is not for `aerogel compress`", outcome.err)


def test_a_teacher_of_other_classes_is_refused(home: Path, distill: Callable[..., Any]) -> None:
    held = json.loads((home / "teacher/config.json").read_text())
    other = home / "swapped"
    other.mkdir(exist_ok=True)
    (other / "model.safetensors").write_bytes((home / "teacher/model.safetensors").read_bytes())
    held["classes"][:2] = held["classes"][1::-1]
    (other / "config.json").write_text(json.dumps(held))
    outcome = distill(teacher="swapped")
    assert outcome.code == 1
    assert re.search(r"swapped calls class 0 '1', digits calls it '0'; take a teacher of the same classes", outcome.err)


def test_a_teacher_at_chance_is_told_and_a_run_that_names_code_is_not_resumed_elsewhere(
    distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aerogel: Aerogel
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("aerogel.compress.distilling.learn", fail)
    outcome = distill(teacher="net.py:fresh")
    assert outcome.code == 1
    assert "warning   the teacher answers no better than by chance (10 %): is it trained?" in outcome.out
    assert "stopped   what was done is kept; `aerogel resume run` finishes it" not in outcome.out
    refused = aerogel("verify", "run")
    assert refused.err == "error: verify: run has no result yet; finish it with `aerogel resume run`\n"
    state = Path("run/state.json")
    held = state.read_text()
    state.write_text(re.sub(r'("networks": \[\s*")\w', r"\1#", held, count=1))
    outcome = aerogel("resume", "run")
    assert (
        outcome.err == "error: resume: the teacher is not the one with which run began; bring it back, or start a new "
        "run\n"
    )
    state.write_text(held)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    outcome = aerogel("resume", "run")
    assert outcome.code == 1
    assert "which is code, and was not begun by you on this machine" in outcome.err
