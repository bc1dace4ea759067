"""The sets themselves: digits everywhere, the others where AEROGEL_DATA holds them."""

from __future__ import annotations

import os

import pytest
import torch

from aerogel.data import Dataset, load
from aerogel.data.prepare import statistics
from aerogel.errors import DataError

COUNTS = {
    "mnist": (55_000, 5_000, 10_000),
    "fashion_mnist": (55_000, 5_000, 10_000),
    "cifar10": (45_000, 5_000, 10_000),
}
MEANS = {"mnist": (0.1307,), "fashion_mnist": (0.2860,), "cifar10": (0.4914, 0.4822, 0.4465)}
DEVIATIONS = {"mnist": (0.3081,), "fashion_mnist": (0.3530,), "cifar10": (0.2470, 0.2435, 0.2616)}


def rows(dataset: Dataset, name: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in getattr(dataset, name).images}


def test_digits() -> None:
    dataset = load("digits")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (1069, 189, 539)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.classes == tuple("0123456789")
    assert dataset.augment == "shift"
    assert dataset.train.images.max() >= 250
    everything = torch.cat([part.labels for part in (dataset.train, dataset.val, dataset.test)])
    share = torch.bincount(everything) / 1797
    for part in (dataset.train, dataset.val, dataset.test):
        assert (torch.bincount(part.labels) - len(part) * share).abs().max() < 2
    assert len(rows(dataset, "train") | rows(dataset, "val") | rows(dataset, "test")) == 1797  # none twice
    assert (dataset.mean, dataset.std) == statistics(dataset.train.images)
    assert load("digits").fingerprint() == dataset.fingerprint()
    assert load("digits", size=(3, 8, 8)).input_shape == (3, 8, 8)


@pytest.mark.data
@pytest.mark.parametrize("name", list(COUNTS))
def test_real_set(name: str) -> None:
    if "AEROGEL_DATA" not in os.environ:
        pytest.skip("AEROGEL_DATA is not set")
    try:
        dataset = load(name)
    except DataError as error:
        if "was not found" not in str(error):
            raise
        pytest.skip(str(error))
    parts = (dataset.train, dataset.val, dataset.test)
    assert tuple(map(len, parts)) == COUNTS[name]
    assert dataset.input_shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
    assert dataset.num_classes == 10
    # the figures that everybody quotes are those of train and validation together
    assert dataset.mean == pytest.approx(MEANS[name], abs=2e-3)
    assert dataset.std == pytest.approx(DEVIATIONS[name], abs=3e-3)
    held = torch.bincount(dataset.val.labels)
    together = held + torch.bincount(dataset.train.labels)
    assert (held - 5000 * together / together.sum()).abs().max() < 1
    if name != "mnist":
        assert together.unique().tolist() == [(55_000 if name == "fashion_mnist" else 45_000) // 10 + 500]
        assert torch.bincount(dataset.test.labels).unique().tolist() == [1000]
