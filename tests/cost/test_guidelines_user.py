"""What a user says to lint: exceptions, limits, a file of options, and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import SLOW_COMPUTE, SLOW_MEMORY, SLOW_START, Add, unequal
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from aerogel.cost import Device, count, lint
from aerogel.cost.guidelines import NOISE
from aerogel.cost.guidelines.exceptions import Exceptions, exceeded
from aerogel.cost.roofline import total_ms
from aerogel.errors import AerogelError
from aerogel.export import open_model
from aerogel.graph import capture
from aerogel.report.findings import as_text, lint_report

Aerogel = Callable[..., Any]


def test_allow_leaves_modules_out_of_a_rule() -> None:
    graph = unequal()
    assert {f.module.partition(".")[0] for f in lint(graph, SLOW_MEMORY, allow=["G1:[1-7].*"]) if f.rule == "G1"} == {
        "8"
    }
    assert not [f for f in lint(graph, SLOW_MEMORY, allow=["g1:*"]) if f.rule == "G1"]
    assert [f for f in lint(graph, SLOW_MEMORY, allow=["G2:*", "P1:*"]) if f.rule == "G1"]


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ("G1", r"allow must be RULE:PATTERN of modules, got 'G1'; write G2:features"),
        ("G9:*", r"allow: 'G9' is no rule; did you mean G"),
        ("G1:nowhere.*", r"allow: no module matches 'nowhere\.\*' in 'G1:nowhere\.\*'"),
    ],
)
def test_an_exception_that_is_wrong_is_told(allow: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        lint(unequal(), SLOW_MEMORY, allow=[allow])


def test_a_device_that_is_none() -> None:
    with pytest.raises(AerogelError, match=r"lint: device must be a Device, got str; write device=ag\.cost\.device"):
        lint(unequal(), "raspberry_pi_4")  # type: ignore[arg-type]


def test_limits_add_up_the_findings_of_a_rule() -> None:
    found = lint(unequal(), SLOW_MEMORY)
    total = sum(f.share for f in found if f.rule == "G1")
    assert exceeded(found, [f"G1={100 * total + 0.1:.3f}%", "G2=0%"]) == []
    assert max(f.share for f in found) < total - 0.001, "no single finding is over the next limit"
    (line,) = exceeded(found, [f"G1={100 * total - 0.1:.3f}%"])
    assert line.startswith(f"G1: {total:.1%} of the predicted time, over ")
    with pytest.raises(AerogelError, match=r"fail-on must be RULE=SHARE%, got 'G1=0\.05'; write G1=5%"):
        exceeded(found, ["G1=0.05"])


ODD: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "nothing": (nn.Identity(), (1, 3, 8, 8)),
    "one activation": (nn.ReLU(), (1, 3, 8, 8)),
    "no batch": (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (8,)),
    "one dimension": (nn.Sequential(nn.Conv1d(3, 8, 3, padding="same"), nn.Conv1d(8, 8, 3, groups=2)), (1, 3, 32)),
    "three dimensions": (nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 40, 1), nn.BatchNorm3d(40)), (1, 3, 8, 8, 8)),
    "padding in words": (Add(nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(3, 8, 1)), (1, 3, 8, 8)),
    "recurrent": (nn.LSTM(8, 8, batch_first=True), (2, 5, 8)),
    "attention": (nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), (2, 50, 64)),
    "computed weight": (weight_norm(nn.Conv2d(3, 8, 3)), (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("on", [SLOW_MEMORY, SLOW_COMPUTE, SLOW_START], ids=lambda on: on.name)
def test_odd_networks_are_read_as_any_other(name: str, on: Device) -> None:
    net, shape = ODD[name]
    graph = capture(net, (torch.zeros(shape),))
    findings = lint(graph, on)
    report = json.loads(json.dumps(lint_report(name, graph, on, findings), allow_nan=False))
    text = as_text(report)
    assert all(finding.ms >= 0 and finding.share >= 0 and finding.nodes for finding in findings)
    assert report["predicted_ms"] == pytest.approx(total_ms(count(graph).layers, on))
    assert all(finding.rule in text for finding in findings if finding.share >= NOISE)
    assert ("nothing found" in text) == (not findings)


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 128, 1), nn.Conv2d(128, 16, 1)
        self.end = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.wide(x).relu()  # aerogel: allow G1, P4
        return self.end(self.narrow(x).relu())

def build():
    return Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in sys.modules if name.startswith("aerogel_user_guided")]:
        monkeypatch.delitem(sys.modules, name)  # an earlier test's file of that name
    (tmp_path / "guided.py").write_text(NET)
    (tmp_path / "slow.toml").write_text(
        'name = "slow"\ntitle = "slow memory"\nkind = "datasheet"\nsource = "made up"\nsimd = 8\noverhead_us = 0.01\n'
        "cache_bytes = 0\ncache_gb_s = 4\nmemory_gb_s = 4\n"
        "[gmacs]\nconv = 5000\ndepthwise = 5000\nelementwise = 5000\n"
    )
    return tmp_path


def test_the_command_for_machines(folder: Path, aerogel: Aerogel) -> None:
    words = ("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml", "--json")
    outcome = aerogel(*words)
    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert (found["schema"], found["version"], found["device"]["name"]) == ("aerogel.lint", 1, "slow")
    assert [f["module"] for f in found["findings"] if f["rule"] == "G1"] == ["narrow"], "the comment left `wide` out"
    assert {"op", "source", "severity", "bytes", "ms", "share", "rewrite", "gain_bytes", "gain_ms", "needs_retraining",
            "note", "score", "what", "nodes", "modules"} <= found["findings"][0].keys()  # fmt: skip
    failed = aerogel(*words, "--fail-on", "G1=1%")
    assert failed.code == 2
    assert failed.err.startswith("G1: ")
    assert json.loads(failed.out)["exceeded"][0] == failed.err.strip()
    assert aerogel(*words, "--fail-on", "G1=1%", "--allow", "G1:narrow").code == 0


def test_the_command_for_people_and_its_file(folder: Path, aerogel: Aerogel) -> None:
    (folder / "lint.toml").write_text(f'device = "{folder}/slow.toml"\nallow = ["P4:*"]\nfail_on = ["G1=1%"]\n')
    words = ("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--config", folder / "lint.toml")
    outcome = aerogel(*words)
    assert outcome.code == 2
    assert "on slow memory (datasheet)" in outcome.out
    assert "128 -> 16 channels move" in outcome.out
    assert "needs retraining" in outcome.out
    assert "P4" not in outcome.out
    assert "over the limit  G1: " in outcome.out
    (folder / "lint.toml").write_text("fails = 3\n")
    outcome = aerogel(*words)
    assert (outcome.code, outcome.out) == (1, "")
    assert "lint.toml: fails: Extra inputs are not permitted; give device, allow, fail_on" in outcome.err


def test_a_comment_in_one_of_two_files_of_a_name_is_refused(
    folder: Path, aerogel: Aerogel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "guided.py").write_text("pass\n" * 20)
    other = type(sys)("another_guided")
    other.__file__ = str(folder / "other" / "guided.py")
    monkeypatch.setitem(sys.modules, "another_guided", other)
    outcome = aerogel("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml")
    assert outcome.code == 1
    assert "2 imported files are called guided.py, and what they allow in line 12 differs" in outcome.err


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ("allow G1 because it is needed", {"G1"}),
        ("allow G1 , P4, for now", {"G1", "P4-peak"}),
        ("allow G1,P4 - measured", {"G1", "P4-peak"}),
        ("allow P4-peak: no room", {"P4-peak"}),
    ],
)
def test_words_may_follow_the_rules_of_a_comment(words: str, rules: set[str], folder: Path) -> None:
    (folder / "guided.py").write_text(NET.replace("allow G1, P4", words))
    graph = capture(open_model(f"{folder}/guided.py:build").model, (torch.zeros(1, 3, 32, 32),))
    lines = Exceptions.read(graph, []).lines
    assert {line: allowed for line, allowed in lines.items() if allowed} == {"guided.py:12": rules}


def test_a_comment_that_names_no_rule(folder: Path, aerogel: Aerogel) -> None:
    for words, wrong in (("G7", "G7"), ("G1, P8", "P8"), ("because it is needed", "because")):
        (folder / "guided.py").write_text(NET.replace("allow G1, P4", f"allow {words}"))
        outcome = aerogel("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml")
        assert outcome.code == 1
        assert f"the comment at guided.py:12: {wrong!r} is no rule" in outcome.err
