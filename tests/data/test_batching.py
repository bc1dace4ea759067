"""Batches: every image once in a pass, for any number of processes, from any position; and normalisation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOY, make_dataset, make_split, numbered

from aerogel.data import AUGMENTS, Split, batch_count, batches, normalise
from aerogel.data.batching import batch_rows
from aerogel.errors import AerogelError


@settings(deadline=None)  # of one example: the machine may be busy
@given(n=st.integers(1, 300), batch_size=st.integers(1, 400))
def test_a_pass_is_divided_as_array_split_does(n: int, batch_size: int) -> None:
    count = batch_count(n, batch_size)
    theirs = np.array_split(np.arange(n), -(-n // batch_size))
    ours = [np.arange(n)[batch_rows(n, batch_size, number)] for number in range(count)]
    assert len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    sizes = [len(rows) for rows in ours]
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= min(sizes) <= max(sizes) <= batch_size


@settings(deadline=None)
@given(
    n=st.integers(1, 300),
    batch_size=st.integers(1, 320),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_every_image_comes_once_with_its_label_at_any_number_of_ranks_from_any_position(
    n: int, batch_size: int, seed: int, epoch: int, shuffle: bool, data: st.DataObject
) -> None:
    count = batch_count(n, batch_size)
    ranks = data.draw(st.integers(1, n // count))
    stop = data.draw(st.integers(0, count))
    resumed_ranks = data.draw(st.integers(1, n // count))  # a run may go on with another number of processes
    options = {"seed": seed, "epoch": epoch, "shuffle": shuffle}
    few = numbered(n)
    parts = [list(batches(few, "train", batch_size, rank=r, ranks=ranks, **options))[:stop] for r in range(ranks)]
    parts += [
        list(batches(few, "train", batch_size, rank=r, ranks=resumed_ranks, start=stop, **options))
        for r in range(resumed_ranks)
    ]
    labels = torch.cat([batch.labels for part in parts for batch in part])
    pixels = torch.cat([batch.inputs.flatten() for part in parts for batch in part])
    assert torch.equal(labels.sort().values, torch.arange(n))
    assert torch.allclose(pixels, (labels % 256).float(), atol=1e-3)
    if not shuffle and ranks == resumed_ranks == 1:
        assert torch.equal(labels, torch.arange(n))


@pytest.mark.parametrize("points", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_resumed_at_random_points_with_other_workers_and_ranks_misses_nothing(points: int) -> None:
    rng = np.random.default_rng(0)
    data = numbered(97)
    for _ in range(points):
        batch_size = int(rng.integers(4, 40))
        options = {"seed": int(rng.integers(99)), "epoch": int(rng.integers(9)), "shuffle": True, "augment": "shift"}
        stop = int(rng.integers(batch_count(97, batch_size) + 1))
        labels = []
        for start, until in ((0, stop), (stop, None)):
            ranks, workers = int(rng.choice([1, 2])), int(rng.choice([0, 2]))
            for rank in range(ranks):
                share = {"rank": rank, "ranks": ranks, "workers": workers, "start": start}
                going = batches(data, "train", batch_size, **options, **share)
                labels += [batch.labels for batch in itertools.islice(going, until)]
        assert torch.equal(torch.cat(labels).sort().values, torch.arange(97))


@settings(deadline=None)
@given(
    batch_size=st.integers(3, 30),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
    augment=st.sampled_from(sorted(AUGMENTS)),
)
def test_the_ranks_parts_of_a_batch_are_the_batch_augmentation_included(
    batch_size: int, ranks: int, seed: int, epoch: int, augment: str
) -> None:
    options = {"seed": seed, "epoch": epoch, "shuffle": True, "augment": augment}
    whole = list(batches(TOY, "train", batch_size, **options))
    parts = [list(batches(TOY, "train", batch_size, rank=r, ranks=ranks, **options)) for r in range(ranks)]
    for rank, part in enumerate(parts):
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs[rank::ranks])
            assert torch.equal(ours.labels, theirs.labels[rank::ranks])


@settings(deadline=None)
@given(
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
    shuffle=st.booleans(),
    augment=st.sampled_from(sorted(AUGMENTS)),
    data=st.data(),
)
def test_pass_begun_at_start_is_tail_of_whole(
    batch_size: int, seed: int, epoch: int, shuffle: bool, augment: str, data: st.DataObject
) -> None:
    options = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "augment": augment}
    whole = list(batches(TOY, "train", batch_size, **options))
    start = data.draw(st.integers(0, len(whole)))
    tail = list(batches(TOY, "train", batch_size, start=start, **options))
    assert len(tail) == len(whole) - start
    for ours, theirs in zip(tail, whole[start:], strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(("shuffle", "augment"), [(True, "none"), (False, "shift")])
def test_order_and_augmentation_change_with_seed_and_epoch(shuffle: bool, augment: str) -> None:
    def first(**options: int) -> torch.Tensor:
        return next(iter(batches(TOY, "train", 24, shuffle=shuffle, augment=augment, **options))).inputs

    kept = first(seed=1, epoch=2)
    assert torch.equal(kept, first(seed=1, epoch=2))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 1}):
        assert not torch.equal(kept, first(**other))


def test_batches_of_one_pass_are_augmented_differently() -> None:
    twice = Split(torch.cat((TOY.val.images,) * 2), torch.cat((TOY.val.labels,) * 2))
    first, second = batches(dataclasses.replace(TOY, val=twice), "val", len(TOY.val), augment="crop_flip")
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.inputs, second.inputs)


def test_batch_types_shapes_and_counts() -> None:
    found = list(batches(TOY, "train", 7))
    assert [len(batch.labels) for batch in found] == [6, 6, 6, 6]
    assert found[0].inputs.dtype == torch.float32
    assert found[0].inputs.shape == (6, 1, 6, 5)
    assert found[0].labels.dtype == torch.int64
    assert [len(batch.labels) for batch in batches(TOY, "test", 5)] == [4, 3]
    assert [len(batch.labels) for batch in batches(TOY, "test", 10**9)] == [7]
    assert list(batches(TOY, "train", 7, start=4)) == []


def test_batches_are_the_callers_own() -> None:
    before = TOY.fingerprint()
    for batch in batches(TOY, "val", 4):
        batch.inputs.zero_()
        batch.labels.zero_()
    assert dataclasses.replace(TOY).fingerprint() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "vaal"}, "unknown split 'vaal'; did you mean val"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"epoch": -2}, "epoch must be >= 0, got -2"),
        ({"start": 5}, r"start must be in \[0, 4\], got 5"),
        ({"start": -1}, r"start must be in \[0, 4\], got -1"),
        ({"augment": "shfit"}, "unknown name 'shfit'; did you mean shift"),
        ({"workers": -1}, "workers must be >= 0, got -1"),
        ({"ranks": 0}, "ranks must be >= 1, got 0"),
        ({"rank": 2, "ranks": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"rank": -1}, r"rank must be in \[0, 1\), got -1"),
        ({"ranks": 7}, "at most the 6 images of the smallest batch of train, got 7; give a larger --batch-size or st"),
    ],
)
def test_wrong_argument_is_refused_at_the_call(options: dict[str, object], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        batches(TOY, **{"split": "train", "batch_size": 7, **options})


@settings(deadline=None)
@given(
    mean=st.lists(st.floats(-1, 2), min_size=3, max_size=3),
    std=st.lists(st.floats(0.05, 3), min_size=3, max_size=3),
)
def test_normalise_is_the_definition(mean: list[float], std: list[float]) -> None:
    images = make_split(4, size=(3, 6, 5)).images
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = normalise(images, tuple(mean), tuple(std))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_train_part_is_normalised_to_mean_0_and_deviation_1() -> None:
    toy = make_dataset(90, size=(3, 8, 8))
    inputs = torch.cat([batch.inputs for batch in batches(toy, "train", 16)]).double()
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5
    assert (inputs.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_normalise_refuses_what_does_not_fit() -> None:
    images = make_split(2).images
    with pytest.raises(AerogelError, match="normalise: images must be uint8"):
        normalise(images.float(), (0.5,), (0.5,))
    with pytest.raises(AerogelError, match="a finite number for each of 1 channels"):
        normalise(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(AerogelError, match="std > 0"):
        normalise(images, (0.5,), (0.0,))
    with pytest.raises(AerogelError, match="finite"):
        normalise(images, (float("nan"),), (1.0,))


@pytest.mark.parametrize("ranks", [1, 2])
def test_keys_say_which_image_in_which_pass(ranks: int) -> None:
    few = numbered(23)  # its labels are the images' places
    for epoch in (0, 3):
        for rank in range(ranks):
            options = {"seed": 2, "epoch": epoch, "shuffle": True, "rank": rank, "ranks": ranks}
            for batch in batches(few, "train", 5, **options):
                assert batch.keys is not None
                assert torch.equal(batch.keys, batch.labels + 23 * epoch)
