"""A run stopped anywhere in an epoch and resumed: no sample twice, none missed, at any number of ranks and workers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from aerogel.data import Dataset, Split, assemble, batches
from aerogel.data.batching import batch_count

PLACES = [(ranks, workers) for ranks in (1, 2) for workers in (0, 2)]
QUICK, FULL = {0: 25, 2: 2}, {0: 100, 2: 100}  # cut points, by workers


def numbered(n: int) -> Dataset:
    """Image number i has the pixels i % 251 and i // 251, so that it can be told from every other."""
    index = torch.arange(n)
    images = torch.stack([index % 251, index // 251], 1).to(torch.uint8).view(n, 1, 1, 2)
    return assemble("numbered", Split(images, index % 3), Split(images[:3], index[:3]), "abc", val=n // 5)


def numbers(dataset: Dataset, made: Iterator[torch.Tensor]) -> list[int]:
    """Which images they are."""
    pixels = torch.cat([255 * (x * dataset.std[0] + dataset.mean[0]) for x in made]).round().long().flatten(1)
    return (pixels[:, 0] + 251 * pixels[:, 1]).tolist()


def check_resumed(dataset: Dataset, ranks: int, workers: int, points: int) -> None:
    """An epoch cut at `points` random places, each time read on by other iterators, as after a restart."""
    every = sorted(numbers(dataset, (b.inputs for b in batches(dataset, "train", 7))))
    assert len(set(every)) == len(every) == len(dataset.train)
    dice = random.Random(f"{ranks} {workers}")
    for _ in range(points):
        seed, epoch, size = dice.randrange(1000), dice.randrange(3), dice.randrange(2 * ranks, 20)
        count = batch_count(len(dataset.train), size)
        cut = dice.randrange(1, count)
        seen: list[int] = []
        whole: list[int] = []
        for rank in range(ranks):
            options = {"seed": seed, "epoch": epoch, "shuffle": True, "rank": rank, "ranks": ranks, "workers": workers}
            before = batches(dataset, "train", size, **options)  # type: ignore[arg-type]
            seen += numbers(dataset, (next(before).inputs for _ in range(cut)))
            del before  # killed here, whatever its workers had made ahead
            after = batches(dataset, "train", size, start=cut, **options)  # type: ignore[arg-type]
            seen += numbers(dataset, (b.inputs for b in after))
            options["workers"] = 0
            whole += numbers(dataset, (b.inputs for b in batches(dataset, "train", size, **options)))  # type: ignore[arg-type]
        assert sorted(seen) == every
        assert seen == whole  # in the same order too


@pytest.mark.parametrize(("ranks", "workers"), PLACES)
def test_every_sample_once_wherever_it_is_cut(ranks: int, workers: int) -> None:
    check_resumed(numbered(97), ranks, workers, QUICK[workers])


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "workers"), PLACES)
def test_every_sample_once_at_all_points(ranks: int, workers: int, faults_result: dict[str, object]) -> None:
    check_resumed(numbered(997), ranks, workers, FULL[workers])
    faults_result.update({"cut points": FULL[workers], "ranks": ranks, "workers": workers, "twice": 0, "missed": 0})


def test_so_it_is_where_images_are_decoded_as_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that does not fit the memory."""
    from aerogel.data import folder as folders

    for i in range(40):
        path = tmp_path / f"images/train/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 1), i + 1).save(path)
    whole = folders.load_folder(tmp_path / "images", (1, 1, 2))
    monkeypatch.setattr("aerogel.data.prepare.available_memory", lambda: 10)
    lazy = folders.load_folder(tmp_path / "images", (1, 1, 2))
    assert not isinstance(lazy.train.images, torch.Tensor)
    for cut, workers in ((1, 0), (3, 2)):
        first = batches(lazy, "train", 5, seed=1, shuffle=True, workers=workers)
        got = [next(first).inputs for _ in range(cut)]
        got += [b.inputs for b in batches(lazy, "train", 5, seed=1, shuffle=True, workers=workers, start=cut)]
        expected = [b.inputs for b in batches(whole, "train", 5, seed=1, shuffle=True)]
        assert torch.equal(torch.cat(got), torch.cat(expected))
