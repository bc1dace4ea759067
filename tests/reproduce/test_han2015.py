"""reproduce/han2015_mnist.py: every stage in a few steps on digits, put into the results as it says."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aerogel.data import load
from aerogel.prune.masks import Masks

SCRIPTS = Path(__file__).parents[2] / "reproduce"
DATA = load("digits", size=(1, 28, 28))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = importlib.import_module("han2015_mnist")
    monkeypatch.setattr(found, "RESULTS", tmp_path / "han.json")
    monkeypatch.setattr(found, "AGAIN", 0.5)
    monkeypatch.setattr(found, "DENSITIES", (0.3, 0.1))
    found.lessons.cache_clear()
    return found


@pytest.fixture
def job(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    recipe = {"batch_size": 64}
    whole = script.JOBS["lenet_300_100"]
    made = dataclasses.replace(
        whole, epochs=2, round=0.5, rungs=(4, 10), rung=8, school=4, copies=2, teacher=1, runs=tmp_path / "runs",
        given=DATA, recipe=whole.recipe.model_copy(update=recipe), taught=whole.taught.model_copy(update=recipe),
    )  # fmt: skip
    monkeypatch.setitem(script.JOBS, "lenet_300_100", made)
    return made


def held(script: ModuleType) -> dict[str, dict[str, Any]]:
    rows = importlib.import_module("results").rows(script.RESULTS)
    return {row["row"]: row for row in rows}


def test_the_papers_shares_are_kept_in_rounds_and_the_file_is_small(script: ModuleType, job: Any) -> None:
    script.paper_rows(job, 0)
    masks = Masks.of(job.network("12x", 0))
    assert [kept for kept, _ in masks.counts().values()] == [round(0.08 * 235200), round(0.09 * 30000), 260]
    row = held(script)["lenet_300_100_12x"]
    assert row["paper"] == 1.59
    assert row["ratio"] == pytest.approx(266200 / masks.survivors)
    assert row["bytes"] < row["bytes_lossless"] < 4 * 266200 / 8
    assert row["bytes_bound"] < row["bytes"] < 1.3 * row["bytes_bound"] + 3000
    assert row["more"]["kept"] == {"0": masks.survivors}
    assert "bytes" not in held(script)["lenet_300_100_dense"]
    script.files(job, 0)  # nothing is trained again
    assert held(script)["lenet_300_100_12x"] == row


def test_dropout_shrinks_while_a_network_retrains_and_is_kept_as_built(
    script: ModuleType, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = script.JOBS["alexnet"]
    small = dataclasses.replace(
        whole, epochs=0.2, round=0.1, given=DATA, runs=tmp_path / "runs", arguments=whole.arguments | {"width": 0.05}
    )
    seen: list[float] = []

    def watched(job: Any, net: Any, *others: Any, **more: Any) -> Any:
        seen.append(net.classifier.dropout6.p)
        return trained(job, net, *others, **more)

    trained = script.trained
    monkeypatch.setattr(script, "trained", watched)
    script.paper_rows(small, 0)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 0.5
    assert seen[-1] == pytest.approx(0.5 * 0.08**0.5, rel=0.05)
    assert small.network("9x", 0).classifier.dropout6.p == 0.5
    row = held(script)["alexnet_9x"]
    assert row["fc_ratio"] > row["ratio"] > row["conv_ratio"] > 1


@pytest.mark.slow
def test_every_rung_starts_from_the_one_before_and_is_as_sparse_as_it_says(script: ModuleType, job: Any) -> None:
    script.ladder_rows(job, 0)
    rows = held(script)
    assert rows["lenet_300_100_ladder_1x"]["ratio"] == 1
    for rung in job.rungs:
        assert rung <= rows[f"lenet_300_100_ladder_{rung}x"]["ratio"] < 1.1 * rung
    before, after = (job.network(f"ladder_{rung}", 0) for rung in job.rungs)
    assert after.features.fc1.weight.shape[0] <= before.features.fc1.weight.shape[0] <= 300
    assert (job.runs / "teacher_2.safetensors").exists()


def test_the_best_rung_is_chosen_by_validation(script: ModuleType, job: Any) -> None:
    results = importlib.import_module("results")

    def put(row: str, val: float, ratio: float, seeds: tuple[int, ...] = (0, 1)) -> None:
        for seed in seeds:
            results.add(script.RESULTS, row, seed, 1.0, unit="% error", command="it", hardware="a CPU", seconds=1.0,
                        more={"val": val, "ratio": ratio})  # fmt: skip

    script.best(job, 0)  # nothing is there yet
    put("lenet_300_100_dense", 1.5, 1)
    put("lenet_300_100_ladder_4x", 1.4, 4)
    script.best(job, 0)
    assert held(script)["lenet_300_100_best"]["ratio"] == 4
    put("lenet_300_100_ladder_10x", 1.4, 10, seeds=(0,))  # of fewer seeds
    script.best(job, 0)
    assert held(script)["lenet_300_100_best"]["ratio"] == 4
    put("lenet_300_100_ladder_10x", 1.6, 10)
    script.best(job, 0)
    assert held(script)["lenet_300_100_best"]["ratio"] == 4
    put("lenet_300_100_ladder_10x", 1.5, 10)
    script.best(job, 0)
    assert held(script)["lenet_300_100_best"]["rung"] == "lenet_300_100_ladder_10x"


def test_figures_have_a_row_a_point(script: ModuleType, job: Any) -> None:
    script.tradeoff_rows(job, 0)
    script.sensitivity_rows(job, 0)
    rows = held(script)
    points = [name for name in rows if "tradeoff" in name]
    assert len(points) == 2 * 3 * 2
    assert {
        f"lenet_300_100_tradeoff_{norm}_{how}_0.1" for norm in ("l1", "l2") for how in ("none", "once", "iterative")
    } < {*points}
    curve = rows["lenet_300_100_sensitivity_features.fc1"]
    assert {f"at_{share:g}" for share in script.SHARES} <= curve.keys()
    count = len(rows)
    script.tradeoff_rows(job, 0)  # held already
    assert len(held(script)) == count


def test_copies_are_the_images_themselves_and_bent_ones(script: ModuleType, job: Any) -> None:
    lessons, images = importlib.import_module("han2015_lessons"), DATA.train.images[:50]
    bent = lessons.distorted(images, 1)
    assert bent.shape == images.shape
    assert bent.dtype == torch.uint8
    assert torch.equal(bent, lessons.distorted(images, 1))
    assert not torch.equal(bent, lessons.distorted(images, 2))
    still = lessons.distorted(images, 1, strength=0.0).float() - images.float()
    assert still.abs().max() <= 1
    moved = (bent.float() - images.float()).abs().mean() / images.float().mean()
    assert 0.1 < moved < 1.5


def test_a_ramp_ends_at_its_share_half_way(script: ModuleType) -> None:
    shares = script.ramp(0.25, 0.1, 200)
    assert max(shares) == 100
    assert shares[100] == pytest.approx(0.1)
    values = list(shares.values())
    assert values == sorted(values, reverse=True)
    assert values[0] < 0.25
