"""Splits and datasets."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from toys import TOY, make_dataset, make_split

from aerogel.data import Split, assemble
from aerogel.errors import AerogelError, DataError


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
