"""`aerogel prune --sparsity` as a user calls it: single weights, on every schedule, resumed to the same bits, told."""

from __future__ import annotations

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
from torch import Tensor, nn

from aerogel.compress.job import _Log
from aerogel.compress.sparsify import in_pattern
from aerogel.prune.masks import Masks
from aerogel.prune.weights import score
from aerogel.train import accuracy

Aerogel = Callable[..., Any]
NETWORK = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(),
                         nn.Linear(16, 10))

def conv():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 10))

def zero_head():
    model = net()
    nn.init.zeros_(model[6].weight)
    return model
"""
SIZE = ("--data", "digits", "--input", "1,8,8")
TRAIN = {"epochs": 4, "batch_size": 64, "warmup": 0.1, "lr": 0.2}
WEIGHTS = 64 * 32 + 32 * 16 + 16 * 10


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, aerogel: Aerogel) -> Path:
    """net.py, and trained/: its network after some epochs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "net.py").write_text(NETWORK)
    words = (f"{folder}/net.py:net", *SIZE, "--epochs", "10", "--batch-size", "64", "--lr", "0.2")
    assert aerogel("train", *words, "--out", folder / "trained").code == 0
    return folder


@pytest.fixture
def prune(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> Callable[..., Any]:
    """`prune("--sparsity", 0.9, sparse={...})`: of the trained network, or of an untrained `model`, into ./run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)

    def call(
        *words: object, model: str = "", out: str = "run", train: dict[str, Any] | None = None, **config: Any
    ) -> Any:
        settings = {"seconds": 0.05, "recover": 0.5} | config | {"train": TRAIN | (train or {})}
        (tmp_path / "some.toml").write_text(tomli_w.dumps(settings))
        given = [] if model else ["--weights", home / "trained"]
        return aerogel("prune", f"{home}/net.py:{model or 'net'}", *SIZE, *given, "--config", "some.toml", "--out", out,
                       *words)  # fmt: skip

    return call


def report_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "report.json").read_text())


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def left(folder: str) -> int:
    return sum(int((w != 0).sum()) for w in weights(folder).values() if w.ndim > 1)


def said(out: str, stage: str) -> list[str]:
    return re.findall(rf"^{stage} +(.+)$", out, re.MULTILINE)


def test_it_prunes_in_rounds_and_tells_what_is_left(prune: Callable[..., Any], aerogel: Aerogel) -> None:
    outcome = prune("--method", "magnitude", "--sparsity", 0.9, "--steps", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert said(outcome.out, "prune")[0] == "net.py:net on digits  ->  sparsity 0.9"
    (method,) = said(outcome.out, "method")
    assert method == "magnitude: the smallest |w| of single weights, global; iterative, 3 cuts"
    assert said(outcome.out, "check") == [f"{WEIGHTS:,} weights in 3 layers can be pruned"]
    counts = [
        int(re.match(r"([\d,]+) of", said(outcome.out, f"prune 00{k}")[0])[1].replace(",", "")) for k in (1, 2, 3)
    ]  # type: ignore[index]
    for k, count in enumerate(counts, start=1):  # dead neurons may take a few more
        wanted = round(0.1 ** (k / 3) * WEIGHTS)
        assert wanted - 40 <= count <= wanted
    assert re.search(r"dropout while retraining: 3 0\.2 -> 0\.1\d\d", outcome.out)
    assert re.search(r"^PASS   weights x0\.0?\d+ <= x0\.100   accuracy drop \S+ pt", outcome.out, re.MULTILINE)
    assert re.search(r"^weights left +all +left +%$", outcome.out, re.MULTILINE)
    assert left("run/candidates/003") == left("run/model") <= counts[-1]
    report = report_of("run")
    kept, drop = report["verdict"]["goals"]
    assert (kept["name"], kept["met"], drop["limit"]) == ("weights", True, None)
    assert sum(layer["kept"] for layer in report["pruned"]["layers"]) == counts[-1]
    assert sum(layer["weights"] for layer in report["pruned"]["layers"]) == WEIGHTS
    assert [one["name"] for one in report["candidates"]] == ["000", "001", "002", "003"]
    assert report["candidates"][3]["nonzero_weights"] == left("run/model") == report["after"]["nonzero_weights"]
    assert report["after"]["sparse_bytes"] < report["before"]["sparse_bytes"] / 3
    assert re.search(r"^Sparse file +\S+ KiB +\S+ (KiB|B) +x0\.", outcome.out, re.MULTILINE)
    assert {stage["name"] for stage in report["stages"]} >= {"prune and retrain", "ship"}
    page = Path("run/report.html").read_text()
    assert "neurons were left without weights" in page or report["pruned"]["dead"] == 0
    assert "a sparse network is no faster there" in page
    assert aerogel("verify", "run").code == 0
    assert aerogel("resume", "run").code == 0


SCHEDULES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "gradual": (("--schedule", "gradual", "--steps", "3"), {"recover": 1.0, "train": {"ema": 0.9}}),
    "iterative": (
        ("--method", "taylor", "--steps", "2"),
        {"recover": 1.0, "train": {"optimizer": "adamw", "lr": 0.01}},
    ),
    "rewind": (("--schedule", "rewind", "--steps", "2"), {"model": "net", "sparse": {"rewind": 0.5}}),
    "movement": (("--method", "movement", "--schedule", "gradual", "--steps", "2"), {"recover": 1.0}),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("iterative", "rewind", "movement")]


@pytest.mark.parametrize("name", ["gradual", *SLOW])
def test_stopped_it_resumes_to_the_very_same_weights(
    name: str, prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    words, config = SCHEDULES[name]
    words = ("--sparsity", "0.8", *words)
    assert prune(*words, out="whole", **config).code == 0
    logged, stops = _Log.__call__, [5, 20, 40]
    seen = [0]

    def log_and_interrupt(log: _Log, step: Any) -> None:
        logged(log, step)
        seen[0] += 1
        if stops and seen[0] == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Log, "__call__", log_and_interrupt)
    outcome = prune(*words, **config)
    codes = [outcome.code]
    while codes[-1] == 130 and len(codes) < 9:
        outcome = aerogel("resume", "run")
        codes.append(outcome.code)
    assert codes == [130, 130, 130, 0], outcome
    for part in ("candidates/001", "model"):
        whole, again = weights(f"whole/{part}"), weights(f"run/{part}")
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
    assert left("run/model") <= round(0.2 * WEIGHTS)
    assert not Path("run/checkpoints").exists()


def test_pruning_again_is_cumulative_and_told(prune: Callable[..., Any], aerogel: Aerogel, home: Path) -> None:
    words = ("--schedule", "one-shot", "--sparsity")
    assert prune(*words, 0.5, sparse={"keep_dead": True}).code == 0
    first = {name: w == 0 for name, w in weights("run/model").items() if w.ndim > 1}
    more = ("run/model", *SIZE, *words, "0.8", "--config", "some.toml", "--out", "again", "--trust")
    outcome = aerogel("prune", *more)
    assert outcome.code == 0, outcome
    told = said(outcome.out, "check")[0]
    zeros = int(sum(mask.sum() for mask in first.values()))
    assert told.endswith(f"{100 * zeros / WEIGHTS:.2f} % of them are zero already, stay so and count")
    assert left("again/model") == round(0.2 * WEIGHTS)
    for name, gone in first.items():
        assert (weights("again/model")[name][gone] == 0).all()
    assert report_of("again")["pruned"]["zero_before"] == zeros
    assert re.search(r"PASS   weights x0\.200 <= x0\.200", outcome.out)
    less = aerogel("prune", "again/model", *SIZE, *words, "0.3", "--config", "some.toml", "--out", "less", "--trust")
    assert less.code == 0  # what is gone stays gone
    assert left("less/model") == round(0.2 * WEIGHTS)


@pytest.mark.slow
def test_snip_prunes_before_any_training(prune: Callable[..., Any]) -> None:
    outcome = prune("--method", "snip", "--sparsity", 0.7, "--schedule", "one-shot", model="net")
    assert outcome.code == 0, outcome
    assert float(re.search(r"validation ([\d.]+) % before", said(outcome.out, "prune 001")[0])[1]) < 40  # type: ignore[index]
    assert left("run/model") <= round(0.3 * WEIGHTS)
    curves = {curve["name"]: curve["x"][-1] for curve in report_of("run")["curves"]}
    assert curves["baseline"] == curves["step 001"]  # as long as the whole network


def test_weights_that_begin_at_zero_are_not_taken_for_pruned_ones(prune: Callable[..., Any]) -> None:
    words = ("--schedule", "rewind", "--steps", 1, "--sparsity", 0.5)
    outcome = prune(*words, model="zero_head", train={"epochs": 1}, sparse={"keep_dead": True})
    assert outcome.code == 0, outcome
    assert left("run/model") == round(0.5 * WEIGHTS)


@pytest.mark.slow
def test_a_scan_of_a_pruned_network_keeps_what_is_gone(
    prune: Callable[..., Any], aerogel: Aerogel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prune("--schedule", "one-shot", "--sparsity", 0.5, sparse={"keep_dead": True}).code == 0
    gone = {name: w == 0 for name, w in weights("run/model").items() if w.ndim > 1}
    seen: list[bool] = []

    def looked_at(network: nn.Module, *words: Any) -> float:
        seen.append(all(not w[gone[name]].any() for name, w in network.named_parameters() if name in gone))
        return accuracy(network, *words)

    monkeypatch.setattr("aerogel.compress.sparse_scan.accuracy", looked_at)
    Path("some.toml").write_text(tomli_w.dumps({"scan_images": 50, "train": TRAIN, "sparse": {"scan_epochs": 0.1}}))
    words = ("run/model", *SIZE, "--scan", "--sparsity", 0, "--config", "some.toml", "--out", "scan", "--trust")
    assert aerogel("prune", *words).code == 0
    assert len(seen) > 30
    assert all(seen)


def test_a_pattern_goes_by_what_is_left() -> None:
    """A random score must not give the places of a pattern to weights that are gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.view(-1, 4)[:, 1:3] = 0
    masks = in_pattern(model, score("random", model), Masks.of(model), 2, 4)
    assert masks.survivors == 320


def test_a_pattern_runs_along_inputs_alone() -> None:
    model = nn.Sequential(
        nn.Embedding(8, 4), nn.Linear(4, 8), nn.ConvTranspose1d(8, 4, 1), nn.Conv1d(4, 3, 1), nn.Linear(3, 4)
    )
    masks = in_pattern(model, score("magnitude", model), Masks.of(model), 2, 4)
    assert {name for name, mask in masks.items() if not mask.all()} == {"1.weight", "3.weight"}


@pytest.mark.slow
def test_patterns_ratios_and_l1(prune: Callable[..., Any]) -> None:
    words = ("--schedule", "one-shot", "--sparsity", 0.5)
    assert prune(*words, out="pattern", sparse={"pattern": "2:4", "keep_dead": True}).code == 0
    for name, w in weights("pattern/model").items():
        if w.ndim > 1:
            assert ((w.view(-1, 4) != 0).sum(1) <= 2).all(), name
    assert prune(*words, out="ratios", sparse={"ratios": {"1": 0.9, "6": 0.0}, "keep_dead": True}).code == 0
    kept = {layer["name"]: layer["share"] for layer in report_of("ratios")["pruned"]["layers"]}
    assert kept == {"1.weight": pytest.approx(10, abs=0.1), "4.weight": pytest.approx(50), "6.weight": 100}
    assert prune(*words, "--scan", out="scanned", sparse={"scan_drop": 3.0, "keep_dead": True}).code == 0
    report = report_of("scanned")
    for layer in report["pruned"]["layers"]:
        curve, gone = report["scan"]["groups"][layer["name"]]["values"], 1 - layer["share"] / 100
        within = [value >= report["scan"]["whole"] - 3.0 for value in curve]
        count = within.index(False) if False in within else len(within)
        assert gone == pytest.approx(([0.0, *report["scan"]["shares"]])[count], abs=0.01), layer
    outcome = prune("--sparsity", 0.5, "--steps", 1, model="conv", out="l1", sparse={"l1": 1e-3})
    assert outcome.code == 0, outcome
    assert {name: set(one["series"]) for one in report_of("l1")["curves"] for name in [one["name"]]} == {
        "baseline": {"hard", "l1"}, "step 001": {"hard", "soft", "l1"},
    }  # fmt: skip


def test_the_scan_tells_what_every_layer_is_worth(prune: Callable[..., Any]) -> None:
    outcome = prune("--scan", "--sparsity", 0, sparse={"scan_epochs": 0.5}, scan_images=100)
    assert outcome.code == 0, outcome
    report = report_of("run")
    scan = report["scan"]
    assert (scan["unit"], scan["criterion"], scan["images"]) == ("weights", "magnitude", 100)
    assert {name: curve["channels"] for name, curve in scan["groups"].items()} == {
        "1.weight": 2048, "4.weight": 512, "6.weight": 160,
    }  # fmt: skip
    for curve in scan["groups"].values():
        assert len(curve["values"]) == len(curve["retrained"]) == len(scan["shares"])
        assert sum(curve["retrained"]) > sum(curve["values"])
    assert report["verdict"]["pass"] is None
    assert re.search(r"^accuracy, % removed +weights +20 +60", outcome.out, re.MULTILINE)
    page = Path("run/report.html").read_text()
    assert "Single weights go by the" in page
    assert "trained again" in page


WRONG: list[tuple[str, tuple[object, ...], dict[str, Any], str]] = [
    ("sparsity_1", ("--sparsity", 1), {}, r"option sparse\.sparsity: .*less than 1, got 1"),
    ("sparsity_negative", ("--sparsity", -0.1), {}, r"option sparse\.sparsity: .*equal to 0, got -0\.1"),
    ("nothing", ("--sparsity", 0), {}, r"--sparsity 0 prunes nothing; ask for more, as 0\.9, or for --scan"),
    ("method", ("--sparsity", 0.5, "--method", "magnitud"), {}, r"'magnitud' scores no single weights; did you mean"),
    ("channel_method", ("--sparsity", 0.5, "--method", "fpgm"), {}, r"'fpgm' scores no single weights"),
    ("weight_method", ("--target", "macs=0.5", "--method", "movement"), {}, r"scores single weights; give --sparsity"),
    ("both", ("--sparsity", 0.5, "--target", "macs=0.5"), {}, r"--sparsity prunes single weights, target channels"),
    ("ranking", ("--sparsity", 0.5), {"ranking": "global"}, r"--sparsity prunes single weights, ranking channels"),
    ("layer", ("--sparsity", 0.5), {"protect": ["7"]}, r"'7' names no weights that can be pruned"),
    ("ratio_layer", ("--sparsity", 0.5), {"sparse": {"ratios": {"9": 0.5}}}, r"ratios: '9' names no layer"),
    ("ratio", ("--sparsity", 0.5), {"sparse": {"ratios": {"1": 1.5}}}, r"option sparse\.ratios\.1: .*got 1\.5"),
    ("snip_rounds", ("--sparsity", 0.5, "--method", "snip"), {}, r"snip prunes once, before training; choose"),
    ("snip_trained", ("--sparsity", 0.5, "--method", "snip", "--schedule", "one-shot"), {},
     r"--method snip needs the network's first weights, not trained ones: leave --weights out"),
    ("movement", ("--sparsity", 0.5, "--method", "movement"), {}, r"movement goes by what training moves; choose"),
    ("rewind_trained", ("--sparsity", 0.5, "--schedule", "rewind"), {}, r"--schedule rewind needs the network's first"),
    ("rewind_late", ("--sparsity", 0.5, "--schedule", "rewind"), {"model": "net", "sparse": {"rewind": 9.0}},
     r"option sparse\.rewind must be below the 4 epochs of training, got 9"),
    ("rewind_else", ("--sparsity", 0.5), {"sparse": {"rewind": 1.0}}, r"rewind says where --schedule rewind goes back"),
    ("rewind_channels", ("--target", "macs=0.5", "--schedule", "rewind"), {}, r"rewind is a schedule of single"),
    ("scan_drop", ("--sparsity", 0.5), {"sparse": {"scan_drop": 1.0}}, r"scan_drop takes each layer's share"),
    ("pattern", ("--sparsity", 0.5, "--schedule", "one-shot"), {"sparse": {"pattern": "2-4"}}, r"pattern: .*2-4"),
    ("pattern_fit", ("--sparsity", 0.5, "--schedule", "one-shot"), {"sparse": {"pattern": "2:7"}},
     r"pattern 2:7: no layer has inputs in multiples of 7"),
    ("pattern_whole", ("--sparsity", 0.5, "--schedule", "one-shot"), {"sparse": {"pattern": "4:2"}},
     r"pattern 4:2 prunes nothing: it keeps the first number of the second; 2:4 is usual"),
    ("unknown", ("--sparsity", 0.5), {"sparse": {"rewnd": 1}}, r"option 'sparse\.rewnd' is unknown; did you"),
    ("gradual_short", ("--sparsity", 0.5, "--schedule", "gradual", "--epochs", 0.5), {}, r"8 cuts do not fit into"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "config", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_command_is_one_clear_line(
    name: str, words: tuple[object, ...], config: dict[str, Any], message: str, prune: Callable[..., Any]
) -> None:
    outcome = prune(*words, **config)
    assert outcome.code == 1
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert not Path("run").exists()


def test_the_table_is_for_prune_alone(home: Path, tmp_path: Path, aerogel: Aerogel) -> None:
    (tmp_path / "some.toml").write_text("[sparse]\nsparsity = 0.5\n")
    outcome = aerogel(
        "compress", f"{home}/net.py:net", *SIZE, "--target", "macs=0.5", "--config", tmp_path / "some.toml"
    )
    assert re.search(r"the \[sparse\] table is not for `aerogel compress`; leave it out, or prune", outcome.err)


def test_a_network_of_another_name_is_built_as_it_was() -> None:
    """What this file's networks are: the weights that are counted above."""
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    net: nn.Module = space["net"]()
    assert sum(w.numel() for w in net.parameters() if w.ndim > 1) == WEIGHTS
