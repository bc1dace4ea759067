"""reproduce/liu2017_slimming.py: every row is the network that it says it is, made once, and put into the results."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from aerogel import nets
from aerogel.data import load
from aerogel.prune.slimming import scales

SCRIPTS = Path(__file__).parents[2] / "reproduce"
DATA = load("digits", size=(1, 16, 16))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("liu2017_slimming")


@pytest.fixture
def job(script: ModuleType, tmp_path: Path) -> Any:
    """Every row in a few steps on 8 x 8 digits."""
    return script.Job(
        "digits", "vgg11:width=0.125", "digits", epochs=0.2, penalty=1e-3, keep=0.5, penalties=(1e-3,),
        shares=(0.5, 0.9), runs=tmp_path / "runs", given=DATA,
    )  # fmt: skip


def shapes(net: nn.Module) -> list[torch.Size]:
    return [weight.shape for weight in net.parameters()]


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


def test_every_row_is_what_it_says(script: ModuleType, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[float] = []
    fit = script.fit

    def counted(state: Any, data: Any) -> nn.Module:
        trained.append(state.recipe.epochs)
        return fit(state, data)

    monkeypatch.setattr(script, "fit", counted)
    made = {row: job.network(row, 0) for row in script.ROWS}
    costs = {row: job.cost(net) for row, net in made.items()}
    small = shapes(made["slimmed"])
    assert sum(len(gamma) for gamma in scales(made["slimmed"]).values()) == 172  # half of 344
    assert all(shapes(made[row]) == small for row in ("tuned", "scratch_e", "scratch_b"))
    assert all(shapes(made[row]) == shapes(script.fresh(job, 0)) for row in ("unpruned", "sparse", "unpruned_twice"))
    for metric in ("macs", "params"):
        left = getattr(costs[f"uniform_{metric}"], metric) / getattr(costs["slimmed"], metric)
        assert 0.8 < left <= 1.0
    longer = min(2.0, costs["unpruned"].macs / costs["slimmed"].macs)
    # unpruned, sparse, tuned, two uniform ones, the slimmed shapes from scratch twice, twice the epochs
    assert trained == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2 * longer, 0.4])
    trained.clear()
    assert torch.equal(weights(job.network("tuned", 0)), weights(made["tuned"]))
    assert trained == []  # read back


def test_what_is_forgotten_starts_as_a_fresh_network_does(script: ModuleType, job: Any) -> None:
    net = script.fresh(job, 3)
    assert {gamma.unique().item() for gamma in scales(net).values()} == {0.5}
    again = script.forgotten(net, 3)
    assert shapes(again) == shapes(net)
    assert {gamma.unique().item() for gamma in scales(again).values()} == {0.5}
    assert 0.9 < (weights(again).std() / weights(net).std()).item() < 1.1
    assert not torch.equal(weights(again), weights(script.forgotten(net, 4)))
    assert torch.equal(weights(again), weights(script.forgotten(net, 3)))


def test_a_row_is_learnt_once_and_told_in_a_table(
    script: ModuleType, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, tables = (importlib.import_module(name) for name in ("results", "tables"))
    path = tmp_path / "liu2017_slimming.json"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.slimming("digits") == "Not measured yet."
    for row in ("unpruned", "slimmed"):
        script.learn(job, row, 0, path=path)
    held = {row["row"]: row for row in results.rows(path)}
    whole, small = (held[f"digits_{row}_params"]["ours"][0] for row in ("unpruned", "slimmed"))
    assert whole == sum(p.numel() for p in nets.build("vgg11", **script.fresh(job, 0).spec["args"]).parameters())
    table = tables.slimming("digits").splitlines()
    assert table[2].startswith("| unpruned | ")
    assert table[3].startswith("| slimmed, before fine-tuning | ")
    assert f"{small / 1e3:.0f} k ({small / whole - 1:+.1%})" in table[3]
    assert table[-1].endswith("`python reproduce/liu2017_slimming.py --job digits`.")


def test_tuning_fine_tunes_what_meets_the_goals(
    script: ModuleType, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "GOALS", {"params": 0.5, "macs": 0.5})
    results, tables = (importlib.import_module(name) for name in ("results", "tables"))
    path = tmp_path / "liu2017_slimming.json"
    script.tune(job, path=path)
    held = {row["row"]: row["mean"] for row in results.rows(path)}
    small, large = (f"digits_lambda=0.001_channels={share}" for share in ("0.5", "0.9"))
    assert held[f"{small}_params"] < 0.5 < held[f"{large}_params"] < 1
    assert held[f"{small}_macs"] < 0.5
    assert held[f"{small}_sparse_val"] == held[f"{large}_sparse_val"]
    assert [name for name in held if name.endswith("_tuned_val")] == [f"{small}_tuned_val"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    cut, spared = tables.slimming_tuning("digits").splitlines()[2:4]
    assert cut.startswith(f"| 0.001 | 0.5 | x{held[f'{small}_params']:.3f} | x{held[f'{small}_macs']:.3f} |")
    assert cut.endswith(f"| {held[f'{small}_tuned_val']:.2f} % |")
    assert spared.endswith("| goals missed |")


def test_the_papers_rows_stand_below_ours(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, tables = (importlib.import_module(name) for name in ("results", "tables"))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.slimming_cifar() == "Not measured yet."
    assert tables.CIFAR.keys() == script.JOBS.keys() - {"fashion_vgg11"}
    for row, top1, params in [("unpruned", 80.0, 1000.0), ("sparse", 79.0, 1000.0), ("slimmed", 10.0, 120.0),
                              ("tuned", 80.5, 120.0)]:  # fmt: skip
        for name, value in {"top1": top1, "params": params, "macs": params}.items():
            results.add(tmp_path / "liu2017_slimming.json", f"cifar_vgg19_{row}_{name}", 0, value, unit="it",
                        command="python it.py", hardware="a CPU", seconds=1.0)  # fmt: skip
    ours, theirs = tables.slimming_cifar().splitlines()[2:4]
    assert ours == "| VGG-19 x0.25 | 80.00 % | 79.00 % | 10.00 % | 80.50 % | -88.0% | -88.0% |"
    assert theirs == "| the paper's VGG-19, 70 % of channels | 93.66 % | | | 93.80 % | -88.5% | -51.0% |"


def test_jobs_of_other_choices_share_only_what_they_may(script: ModuleType, job: Any) -> None:
    other, harder = dataclasses.replace(job, keep=0.3), dataclasses.replace(job, penalty=1e-2)
    shared = {row for row in script.ROWS if job.depends_on(row) == other.depends_on(row)}
    assert shared == {"unpruned", "unpruned_twice", "sparse"}
    assert job.depends_on("sparse") != harder.depends_on("sparse")
    assert script.JOBS["fashion_vgg11"].rows == tuple(script.ROWS)
