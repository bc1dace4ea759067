"""The scripts of reproduce/: what they put into the result files, and the tables made of them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import aerogel as ag
from aerogel.train import Recipe

SCRIPTS = Path(__file__).parents[2] / "reproduce"
MEASURED = {"unit": "x", "command": "python it.py", "hardware": "a CPU", "seconds": 2.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script("tables")`: that file as a module, found as when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def macs_of(net: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    """By PyTorch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(*example)
    return counter.get_total_flops() // 2


def test_a_row_holds_every_seed_once(script: Any, tmp_path: Path) -> None:
    results, path = script("results"), tmp_path / "new" / "it.json"
    for seed, value in [(0, 1.0), (1, 5.0), (0, 3.0)]:
        results.add(path, "it", seed, value, **MEASURED)
    (row,) = results.rows(path)
    assert dict(zip(row["seeds"], row["ours"], strict=True)) == {0: 3.0, 1: 5.0}
    assert row["mean"] == 4.0
    assert row["sd"] == pytest.approx(2**0.5)
    assert len(row["seconds"]) == 2
    assert sorted(results.held_seeds(path, "it")) == [0, 1]
    assert results.held_seeds(path, "another") == []


def test_processes_that_add_at_once_lose_nothing(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    code = (
        "import sys; from pathlib import Path; from results import add\n"
        "for seed in range(int(sys.argv[1]), int(sys.argv[1]) + 20):\n"
        f"    add(Path({str(path)!r}), 'it', seed, 1.0, **{MEASURED!r})"
    )
    working = [subprocess.Popen([sys.executable, "-c", code, str(first)], cwd=SCRIPTS) for first in (0, 20, 40)]
    assert [one.wait() for one in working] == [0, 0, 0]
    assert sorted(script("results").held_seeds(path, "it")) == list(range(60))


def test_one_seed_has_no_spread(script: Any, tmp_path: Path) -> None:
    results = script("results")
    results.add(tmp_path / "it.json", "it", 0, 1.0, **MEASURED)
    assert results.rows(tmp_path / "it.json")[0]["sd"] is None


def test_light_nets_become_a_table_in_its_place(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, tables = script("results"), script("tables")
    numbers = {"macs": 2.5e6, "params": 60e3, "access_bytes": 2**20, "latency_ms": 0.25, "latency": 1.5}
    for seed, top1 in [(0, 88.0), (1, 90.0)]:
        for row, value in {"top1": top1, **numbers}.items():
            results.add(tmp_path / "light_nets.json", f"shufflenet_v1_g3_{row}", seed, value, **MEASURED)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:light_nets -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"light_nets": (page, tables.light_nets)})
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="1"):
        tables.main()
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert capsys.readouterr().out.splitlines() == ["stale: page.md", "written: page.md"]
    text = page.read_text()
    row = "| ShuffleNetV1 x0.25, 3 groups | 2 | 89.00 ± 1.41 % | 2.50 M | 60 k | 1.00 MiB | 0.250 ms | x1.50 ± 0.00 |"
    assert row in text
    assert "old" not in text
    assert "MobileNet" not in text.replace("of MobileNetV1's", "")  # has no numbers yet
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_page_without_the_place_is_named(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, page = script("tables"), tmp_path / "page.md"
    page.write_text("nothing here\n")
    (tmp_path / "it.json").write_text("[]")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"it": (page, lambda: "a table")})
    with pytest.raises(SystemExit, match=r"page\.md has no place for it"):
        tables.main()


def test_the_light_nets_are_those_of_the_table_and_cost_about_the_same(script: Any) -> None:
    light, tables = script("light_nets"), script("tables")
    assert light.NETS.keys() == tables.LIGHT.keys()
    for name, spec in light.NETS.items():
        assert 2.2e6 < macs_of(light.fresh(name, 0), light.EXAMPLE) < (4.8e6 if name == "mobilenet_v2" else 2.8e6), name
        width = ag.nets.parse(spec)[1]["width"]
        assert f"x{width:g}" in tables.LIGHT[name] or name.endswith("_unshuffled")


@pytest.mark.slow
def test_a_light_net_is_trained_and_measured(script: Any, tmp_path: Path) -> None:
    light, results, path = script("light_nets"), script("results"), tmp_path / "light_nets.json"
    digits = ag.data.load("digits")
    light.learn("shufflenet_v1_g3", 1, data=digits, path=path, recipe=Recipe(epochs=0.5, batch_size=64))
    assert results.held_seeds(path, "shufflenet_v1_g3_latency") == []
    light.measure("shufflenet_v1_g3", 1, path=path, seconds=0.5)
    held = {row["row"]: row for row in results.rows(path)}
    assert held["shufflenet_v1_g3_macs"]["ours"] == [macs_of(light.fresh("shufflenet_v1_g3", 1), light.EXAMPLE)]
    assert 0 <= held["shufflenet_v1_g3_top1"]["mean"] <= 100
    assert held["shufflenet_v1_g3_latency"]["mean"] > 0
    assert results.held_seeds(path, "shufflenet_v1_g3_latency") == [1]
