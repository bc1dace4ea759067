"""Splits, datasets, normalisation; and the law that a pass begun midway is the tail of the whole pass."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerogel.data import AUGMENTS, Dataset, Split, assemble, batches, normalise
from aerogel.errors import AerogelError, DataError


def make_split(n: int, *, size: tuple[int, int, int] = (1, 6, 5), classes: int = 3, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % classes)


def make_dataset(n: int = 30, *, size: tuple[int, int, int] = (1, 6, 5)) -> Dataset:
    return assemble("toy", make_split(n, size=size), make_split(7, size=size, seed=1), "abc", val=6)


TOY = make_dataset()


@given(
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
    shuffle=st.booleans(),
    augment=st.sampled_from(sorted(AUGMENTS)),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_pass_begun_at_start_is_tail_of_whole(
    batch_size: int, seed: int, epoch: int, shuffle: bool, augment: str, drop_last: bool, data: st.DataObject
) -> None:
    if drop_last:
        batch_size = min(batch_size, len(TOY.train))
    options = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "augment": augment, "drop_last": drop_last}
    whole = list(batches(TOY, "train", batch_size, **options))
    start = data.draw(st.integers(0, len(whole)))
    tail = list(batches(TOY, "train", batch_size, start=start, **options))
    assert len(tail) == len(whole) - start
    for ours, theirs in zip(tail, whole[start:], strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.labels, theirs.labels)


@given(batch_size=st.integers(1, 40), seed=st.integers(0, 2**32), shuffle=st.booleans())
def test_every_image_comes_once_with_its_own_label(batch_size: int, seed: int, shuffle: bool) -> None:
    numbered = Split(torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1), torch.arange(24))
    numbered_set = dataclasses.replace(
        TOY,
        train=numbered,
        val=numbered,
        test=numbered,
        classes=tuple(map(str, range(24))),
        mean=(0.0,),
        std=(1 / 255,),
    )
    found = list(batches(numbered_set, "train", batch_size, seed=seed, shuffle=shuffle))
    labels = torch.cat([batch.labels for batch in found])
    pixels = torch.cat([batch.inputs.flatten() for batch in found])
    assert torch.equal(labels.sort().values, torch.arange(24))
    assert torch.allclose(pixels, labels.float(), atol=1e-3)
    assert shuffle or torch.equal(labels, torch.arange(24))


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
    assert [len(batch.labels) for batch in found] == [7, 7, 7, 3]
    assert found[0].inputs.dtype == torch.float32
    assert found[0].inputs.shape == (7, 1, 6, 5)
    assert found[0].labels.dtype == torch.int64
    assert len(list(batches(TOY, "train", 7, drop_last=True))) == 3
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
        (
            {"batch_size": 25, "drop_last": True},
            "drop_last leaves no batch, batch_size=25 exceeds the 24 images",
        ),
    ],
)
def test_wrong_argument_is_refused_at_the_call(options: dict[str, object], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        batches(TOY, **{"split": "train", "batch_size": 7, **options})


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


def test_split_refuses_other_types_shapes_and_counts() -> None:
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match=r"images must be uint8 of shape .N, C, H, W., got float32"):
        Split(images.float(), labels)
    with pytest.raises(DataError, match=r"images must be uint8 of shape .N, C, H, W., got uint8 of shape .4, 2, 2."):
        Split(images[:, 0], labels)
    with pytest.raises(DataError, match=r"labels must be int64 of shape .N,., got int32"):
        Split(images, labels.int())
    with pytest.raises(DataError, match="equally many, got 4 and 3"):
        Split(images, labels[:3])
    with pytest.raises(DataError, match="images must be a tensor, got a ndarray"):
        Split(images.numpy(), labels)


def test_subset_takes_positions_masks_and_slices() -> None:
    split = make_split(6)
    assert torch.equal(split.subset(torch.tensor([4, 1])).labels, torch.tensor([1, 1]))
    assert torch.equal(split.subset(split.labels == 2).images, split.images[[2, 5]])
    assert len(split.subset(slice(1, 4))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": make_split(0)}, "'toy' has an empty val split"),
        ({"test": make_split(5, size=(1, 6, 6))}, "test has .1, 6, 6. and train .1, 6, 5."),
        ({"classes": ("a", "b")}, r"must lie in \[0, 2\), train has 0 to 2"),
        ({"mean": (0.1, 0.2, 0.3)}, "a finite number for each of 1 channels"),
        ({"augment": "mixup"}, "augment: unknown name 'mixup'"),
    ],
)
def test_dataset_refuses_parts_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        dataclasses.replace(TOY, **change)


def test_negative_label_is_refused() -> None:
    train = Split(TOY.train.images, TOY.train.labels - 1)
    with pytest.raises(DataError, match="train has -1 to 1"):
        assemble("toy", train, TOY.test, "abc", val=3)


def test_fingerprint_follows_the_data_and_not_the_name() -> None:
    assert make_dataset().fingerprint() == TOY.fingerprint()
    assert dataclasses.replace(TOY, name="other").fingerprint() == TOY.fingerprint()
    pixels = TOY.test.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(TOY, test=Split(pixels, TOY.test.labels))
    relabelled = dataclasses.replace(TOY, val=Split(TOY.val.images, TOY.val.labels.flip(0)))
    prints = {TOY.fingerprint(), changed.fingerprint(), relabelled.fingerprint()}
    assert len(prints) == 3
    assert all(len(text) == 64 for text in prints)


def test_import_leaves_the_heavy_libraries_alone() -> None:
    code = "import sys, aerogel.data; print([m for m in ('PIL', 'pyarrow', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
