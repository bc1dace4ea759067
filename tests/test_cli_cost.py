"""`aerogel cost` as typed: groups, a device, two networks, budgets, every output, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aerogel as ag
from aerogel.cost.device import Device, this_path, write
from aerogel.cost.kernels import machine
from aerogel.report.cost_text import as_text

Aerogel = Callable[..., Any]

NETWORKS = """
import torch
from torch import nn

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))

class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x)

def unknown():
    return Inverse()
"""


SMALL_BERT = "hf:bert:num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=32,vocab_size=50"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds net.py alone."""
    (tmp_path / "net.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_json_is_the_versioned_report(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "lenet5", "--json", "--device", "raspberry_pi_4")
    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert (found["schema"], found["version"], found["model"]) == ("aerogel.cost", 1, "lenet5")
    assert (found["macs"], found["params"], found["uncounted"]) == (2_293_000, 431_080, [])
    assert found["verified"] is True
    assert found["predicted_ms"] == pytest.approx(sum(layer["ms"] for layer in found["layers"]))


@pytest.mark.parametrize("words", [("--by", "op"), ("--by", "family"), ("--by", "module"), ("--depth", "1")])
def test_rows_of_another_kind(words: tuple[str, ...], aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "lenet5", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split()[0] == (words[1] if words[0] == "--by" else "module")
    assert "params 431,080" in outcome.out


def test_a_device_tells_times_and_what_bounds_them(aerogel: Aerogel) -> None:
    out = aerogel("cost", "lenet5", "--device", "raspberry_pi_4").out
    assert out.splitlines()[0].split()[-3:] == ["ms", "share", "bound"]
    assert re.search(r"predicted [\d.]+ ms on raspberry_pi_4 \(Raspberry Pi 4 B.*datasheet, 4 threads\)", out)


def test_two_networks_layer_by_layer(aerogel: Aerogel) -> None:
    words = ("cost", "net.py:narrow", "--against", "net.py:wide", "--input", "1,28,28", "--device", "raspberry_pi_4")
    found = json.loads(aerogel(*words, "--json").out)["against"]
    assert found["totals"]["macs"]["ratio"] == 0.25
    assert [layer["status"] for layer in found["layers"]] == ["changed", "changed"]
    text = aerogel(*words).out
    assert re.search(r"MACs +50\.8 K +12\.7 K +x0\.25", text)
    assert "against net.py:wide: MACs x0.25" in text
    rows = list(csv.DictReader(io.StringIO(aerogel(*words, "--csv", "-").out)))
    assert [(row["macs_before"], row["macs_after"]) for row in rows] == [("50176", "12544"), ("640", "160")]


def test_a_network_against_a_saved_folder(aerogel: Aerogel) -> None:
    ag.save(ag.nets.build("lenet5"), "saved")
    found = json.loads(aerogel("cost", "lenet5", "--against", "saved", "--json").out)["against"]
    assert {layer["status"] for layer in found["layers"]} == {"same"}


def test_a_budget_that_holds_and_one_that_does_not(work: Path, aerogel: Aerogel) -> None:
    kept = aerogel("cost", "lenet5", "--budget", "macs<=3M,params<=500K,peak<=1MiB,access<=3MiB")
    assert kept.code == 0
    assert kept.out.count(" met: ") == 4
    (work / "budget.toml").write_text('macs = "2M"\nlatency = "1us"\n')
    outcome = aerogel("cost", "lenet5", "--budget", "budget.toml", "--device", "raspberry_pi_4")
    assert outcome.code == 2
    assert re.search(r"budget macs<=2M missed: 2\.29 M \(counted\); the most in features\S+ \(conv2d\): 1\.60 M",
                     outcome.out)  # fmt: skip
    assert re.search(r"budget latency<=1us missed: \S+ ms \(predicted on raspberry_pi_4\); the most in ", outcome.out)


def test_a_missed_budget_is_told_on_stderr_where_stdout_is_for_machines(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "lenet5", "--budget", "macs<=2M,params<=1M", "--json")
    assert outcome.code == 2
    assert [verdict["met"] for verdict in json.loads(outcome.out)["budget"]] == [False, True]
    assert outcome.err.startswith("budget macs<=2M missed: ")
    assert outcome.err.count("\n") == 1


def test_what_cannot_be_counted_meets_no_budget(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "net.py:unknown", "--input", "1,4,4", "--budget", "macs<=1G")
    assert outcome.code == 2
    assert "not counted: linalg_inv" in outcome.out
    assert "budget macs<=1G missed: 0 (counted), and more: linalg_inv could not be counted" in outcome.out


def test_files_are_written_even_when_a_budget_is_missed(work: Path, aerogel: Aerogel) -> None:
    words = ("--csv", "cost.csv", "--html", "cost.html", "--budget", "macs<=1K")
    outcome = aerogel("cost", "lenet5", *words)
    assert outcome.code == 2
    assert outcome.out.endswith("\ncost.html\ncost.csv\n")
    rows = list(csv.DictReader(io.StringIO((work / "cost.csv").read_text())))
    assert sum(int(row["macs"]) for row in rows) == 2_293_000
    assert "over budget" in (work / "cost.html").read_text()


def test_markdown_for_a_comment(aerogel: Aerogel) -> None:
    out = aerogel("cost", "lenet5", "--markdown", "--budget", "macs<=3M").out
    assert out.startswith("### Cost of `lenet5`\n")
    assert "- `budget macs<=3M met: 2.29 M (counted)`" in out
    assert "| layer | op | output |" in out


def test_csv_on_stdout_is_all_there_is(aerogel: Aerogel) -> None:
    out = aerogel("cost", "lenet5", "--csv", "-").out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert sum(int(row["params"]) for row in rows) == 431_080
    assert out.count("\n") == len(rows) + 1


WRONG = [
    (["--by", "layers"], r"--by 'layers' must be one of layer, module, op, family; did you mean layer\?"),
    (["--depth", "0"], r"--depth must be >= 1, got --depth 0"),
    (["--depth", "2", "--by", "op"], r"--depth goes with --by module, got --depth 2 --by op"),
    (["--against", "lenet5", "--by", "op"], r"--against compares layer by layer, got --by op; leave out --by"),
    (["--against", "lenet6"], r"model 'lenet6' is no net and no folder; did you mean lenet5"),
    (["--json", "--markdown"], r"only one of them can go to stdout: --json and --markdown; write a file"),
    (["--json", "--csv", "-"], r"only one of them can go to stdout: --json and --csv -"),
    (["--csv", "./page.html", "--html", "page.html"], r"--html and --csv must be two files, both are \./page\.html;"),
    (["--threads", "0"], r"cost: --threads must be >= 1, got 0; write --threads 1"),
    (["--csv", "net.py"], r"cost: net\.py exists and is never overwritten"),
    (["--html", "no/cost.html"], r"cost: there is no folder no for cost\.html; make it first"),
    (["--device", "raspberry"], r"device: no profile is called 'raspberry'; did you mean raspberry_pi_4"),
    (["--device", "this"], r"device: this machine has not been measured; run `aerogel cost --calibrate`"),
    (["--budget", "macs=3M"], r"--budget 'macs=3M' must be MEASURE<=VALUE or a \.toml file"),
    (["--budget", "latency<=3ms"], r"--budget latency<=3ms: nothing tells the latency; name a device with --device"),
    (["--budget", "none.toml"], r"--budget: cannot read none\.toml: No such file"),
    (["--input", "1,28"], r"--input must be C,H,W, three positive whole numbers, got '1,28'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_question_is_one_line_and_nothing_is_written(
    words: list[str], message: str, work: Path, aerogel: Aerogel
) -> None:
    spare = [] if "--html" in words else ["--html", "page.html"]
    outcome = aerogel("cost", "lenet5", *words, *spare)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err
    assert [path.name for path in work.iterdir() if path.name != "__pycache__"] == ["net.py"]


def test_the_exported_file_is_measured_whole_and_by_layer(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "net.py:narrow", "--input", "1,28,28", "--measure", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert found["latency"]["median_ms"] > 0
    assert found["latency"]["threads"] == 1
    times = {layer["op"]: layer["measured_ms"] for layer in found["layers"] if layer["measured_ms"] is not None}
    assert "linear" in times
    assert found["predicted_ms"] is None
    assert re.search(r"measured \S+ ms \[.*1 thread, batch 1\)", aerogel("cost", "lenet5", "--measure").out)


def test_a_measured_budget_says_so(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "lenet5", "--measure", "--budget", "latency<=1us")
    assert outcome.code == 2
    assert re.search(r"budget latency<=1us missed: .*\(measured\); the most in \S+ \(\w+\)", outcome.out)


def calibrated(**changes: object) -> Device:
    """A profile of this machine that nobody measured, kept as the measured one is."""
    held = {"name": "this", "source": machine(1), "threads": 1}
    profile = ag.cost.device("raspberry_pi_4").model_copy(update=held | changes)
    write(profile, this_path())
    return profile


def test_this_machine_predicts_from_its_kernels(aerogel: Aerogel, work: Path) -> None:
    profile = calibrated()
    found = json.loads(aerogel("cost", "lenet5", "--device", "this", "--json").out)
    assert found["prediction"]["kernels"] > 3
    assert found["prediction"]["estimated"] == {}
    assert 0 < sum(layer["ms"] for layer in found["layers"]) <= found["predicted_ms"] * 1.000001
    budget = aerogel("cost", "lenet5", "--device", "this", "--budget", "latency<=1s")
    assert budget.code == 0
    assert "(predicted on this)" in budget.out
    write(profile.model_copy(update={"source": "another machine"}), this_path())
    stale = aerogel("cost", "lenet5", "--device", "this")
    assert stale.code == 1
    assert "was measured on another machine" in stale.err
    assert "--calibrate` again" in stale.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "cost needs a MODEL"),
        (("lenet5", "--calibrate"), "--calibrate measures this machine, not a network, and goes with --threads and --"),
        (("--calibrate", "--budget", "macs<=1M"), "with --threads and --json alone; leave out --budget"),
        (("--calibrate", "--depth", "0", "--trust"), "with --threads and --json alone; leave out --depth and --trust"),
        ((SMALL_BERT, "--measure"), f"--measure: {SMALL_BERT} has no weights to run; write a factory that makes them"),
        (("lenet5", "--against", SMALL_BERT, "--measure"), f"--measure: {SMALL_BERT} has no weights to run; write a"),
        (("--calibrate", "--threads", "0"), "threads must be >= 1, got 0"),
        (("lenet5", "--device", "this"), "has not been measured; run `aerogel cost --calibrate`"),
        (("lenet5", "--budget", "latency<=1ms"), "name a device with --device, or measure it with --measure"),
        (("lenet5", "--measure", "--threads", "0"), "threads must be >= 1, got 0"),
    ],
)
def test_what_this_machine_cannot_tell_is_refused(words: tuple[str, ...], message: str, aerogel: Aerogel) -> None:
    outcome = aerogel("cost", *words)
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


WIDE = ("cost", "net.py:narrow", "--against", "net.py:wide", "--input", "1,28,28")


def test_this_machine_predicts_both_networks_by_their_kernels(aerogel: Aerogel) -> None:
    calibrated(run_us=2e6)
    found = json.loads(aerogel(*WIDE, "--device", "this", "--json").out)
    against = found["against"]
    assert found["roofline_because"] is None
    assert min(found["prediction"]["kernels"], against["prediction"]["kernels"]) >= 2
    assert against["totals"]["ms"]["after"] == found["predicted_ms"]
    for side, total, left in (
        ("before", against["totals"]["ms"]["before"], against["unplaced_ms"]),
        ("after", found["predicted_ms"], found["unplaced_ms"]),
    ):
        rows = sum(layer[f"ms_{side}"] for layer in against["layers"])
        assert rows > 0
        assert left >= 2000
        assert rows + left == pytest.approx(total)
    assert against["measured"] is None
    out = as_text(found)
    assert out.count(" stand in no row: what a run costs beside its kernels, and kernels that no layer takes") == 2
    assert "\nnet.py:wide: predicted from " in out


def test_where_one_has_no_weights_the_roofline_predicts_both(aerogel: Aerogel) -> None:
    profile = calibrated()
    for words in (("lenet5", "--against", SMALL_BERT), (SMALL_BERT, "--against", "lenet5"), (SMALL_BERT,)):
        found = json.loads(aerogel("cost", *words, "--device", "this", "--json").out)
        assert (found["prediction"], found["unplaced_ms"]) == (None, 0)
        assert found["roofline_because"] == f"{SMALL_BERT} has no weights to run"
        assert found["predicted_ms"] == pytest.approx(sum(layer["ms"] for layer in found["layers"]))
        if len(words) > 1:
            assert found["against"]["totals"]["ms"]["after"] == pytest.approx(found["predicted_ms"])
            assert found["against"]["prediction"] is None
    out = aerogel("cost", SMALL_BERT, "--device", "this").out
    assert f"predicted by the roofline, not by kernels: {SMALL_BERT} has no weights to run" in out
    write(profile.model_copy(update={"source": "another machine"}), this_path())
    assert "was measured on another machine" in aerogel("cost", SMALL_BERT, "--device", "this").err


def test_two_networks_are_measured_in_turns(aerogel: Aerogel) -> None:
    found = json.loads(aerogel(*WIDE, "--measure", "--json").out)
    measured = found["against"]["measured"]
    assert measured.keys() == {"before_ms", "after_ms", "ratio", "low", "high"}
    assert 0 < measured["low"] <= measured["ratio"] <= measured["high"]
    assert measured["after_ms"] == found["latency"]["median_ms"] > 0
    assert measured["before_ms"] != measured["after_ms"]
    assert any(layer["measured_ms"] for layer in found["layers"])
    assert "ms" not in found["against"]["totals"]
    said = r"\nmeasured: x\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\] of net\.py:wide, timed in turns\n"
    assert re.search(said, as_text(found))
