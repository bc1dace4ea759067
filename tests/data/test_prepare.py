"""Carving, statistics, resizing, memory and the search for named sets; and `load`, which joins them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from aerogel.data import SETS, TITLES, Split, load, prepare
from aerogel.data.prepare import carve, check_memory, resize_images, statistics
from aerogel.errors import AerogelError, DataError


def numbered(labels: list[int]) -> Split:
    """Each image's single pixels spell its own number, so that it can be found again."""
    number = torch.arange(len(labels))
    images = torch.stack((number // 256, number % 256), dim=1).to(torch.uint8).view(-1, 1, 1, 2)
    return Split(images, torch.tensor(labels))


def numbers(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].long() * 256 + split.images[:, 0, 0, 1]).tolist()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=400), st.data())
def test_carve_is_a_stratified_partition(labels: list[int], data: st.DataObject) -> None:
    sizes = np.bincount(labels)
    count = data.draw(st.integers(1, len(labels) - 1))
    if sizes.max() < 2:
        return
    rest, part = carve(numbered(labels), count)
    assert sorted(numbers(rest) + numbers(part)) == list(range(len(labels)))
    assert numbers(rest) == sorted(numbers(rest))
    for split in (rest, part):
        assert split.labels.tolist() == [labels[i] for i in numbers(split)]
    taken = np.bincount(part.labels, minlength=len(sizes))
    share = count * sizes / len(labels)
    tiny = (share < 1) | (sizes - share < 1)
    assert np.all(np.abs(taken - share)[~tiny] < 1)
    assert np.all(taken[sizes >= 2] >= 1)
    assert np.all((sizes - taken)[sizes >= 1] >= 1)
    assert tiny.any() or len(part) == count


def test_carve_is_the_same_every_time_and_no_prefix() -> None:
    split = numbered([i % 4 for i in range(400)])
    first = numbers(carve(split, 80)[1])
    assert first == numbers(carve(split, 80)[1])
    assert 150 < sum(first) / len(first) < 250  # drawn from everywhere


def test_carve_refuses_counts_that_leave_nothing() -> None:
    with pytest.raises(DataError, match=r"count must be in \(0, 4\), got 4"):
        carve(numbered([0, 0, 1, 1]), 4)
    with pytest.raises(DataError, match=r"count must be in \(0, 4\), got 0"):
        carve(numbered([0, 0, 1, 1]), 0)
    with pytest.raises(DataError, match="no class has two images"):
        carve(numbered([0, 1, 2]), 1)


@given(st.integers(1, 1100), st.sampled_from([1, 3]), st.integers(0, 99))
def test_statistics_are_those_of_float64(n: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, 3, 2), dtype=torch.uint8, generator=generator)
    mean, std = statistics(images)
    pixels = images.double() / 255
    assert np.allclose(mean, pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    assert np.allclose(std, pixels.std((0, 2, 3), correction=0), rtol=0, atol=1e-12)


def test_constant_channel_has_deviation_one() -> None:
    assert statistics(torch.full((600, 1, 2, 2), 77, dtype=torch.uint8)) == ((77 / 255,), (1.0,))


@pytest.mark.parametrize("size", [(1, 9, 9), (3, 9, 9), (1, 30, 20), (3, 30, 20), (1, 13, 17), (3, 13, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_within_one_of_float(channels: int, size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (600, channels, 13, 17), dtype=torch.uint8, generator=generator)
    found = resize_images(images, size)
    expected = images.float()
    if channels == 3 and size[0] == 1:
        expected = (expected * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    expected = F.interpolate(expected, size[1:], mode="bilinear", antialias=True).expand(-1, size[0], -1, -1)
    assert found.shape == (600, *size)
    assert found.dtype == torch.uint8
    assert (found.float() - expected).abs().max() <= 1.5  # one level, and the rounding of luma before


def test_resize_to_the_same_size_copies_nothing_and_grey_repeats() -> None:
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    assert resize_images(images, (1, 4, 4)) is images
    assert torch.equal(resize_images(images, (3, 4, 4)), images.expand(-1, 3, -1, -1))


def test_resize_refuses_channels_it_cannot_make() -> None:
    with pytest.raises(AerogelError, match="cannot make 3 channels of 4"):
        resize_images(torch.zeros(2, 4, 4, 4, dtype=torch.uint8), (3, 4, 4))


@pytest.mark.parametrize("size", [(2, 8, 8), (1, 0, 8), (3, 8, -1), (3, 8), (0, 8, 8)])
def test_load_refuses_a_bad_size(size: tuple[int, ...]) -> None:
    with pytest.raises(AerogelError, match=f"must be C,H,W .* got {','.join(map(str, size))}"):
        load("digits", size=size)


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "available_memory", lambda: 2**30)
    check_memory(2**19, (1, 32, 32))
    with pytest.raises(DataError, match=r"524289 images of 1x32x32 need 0.50 GiB, over half of the 1.00 GiB"):
        check_memory(2**19 + 1, (1, 32, 32))
    with pytest.raises(DataError, match=r"1797 images of 3x1024x1024 .* give a smaller --input"):
        load("digits", size=(3, 1024, 1024))


def test_available_memory_is_plausible() -> None:
    found = prepare.available_memory()
    assert found is None or 2**20 < found < 2**50


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist/ lacks train-images-idx3-ubyte.gz"),
        ("fashion_mnist", "fashion-mnist/ lacks train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar10-jpeg/ lacks train.parquet, test.parquet; get them from https://"),
    ],
)
def test_absent_set_says_where_it_looked_and_what_to_do(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)
    with pytest.raises(DataError, match=file) as caught:
        load(name)
    message = str(caught.value)
    assert "$AEROGEL_DATA (not set)" in message
    assert str(tmp_path / "data") in message
    assert "set AEROGEL_DATA" in message
    assert "\n" not in message

    monkeypatch.setenv("AEROGEL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load(name)


def test_environment_comes_before_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("data", "mine"):
        (tmp_path / root / "set").mkdir(parents=True)
        (tmp_path / root / "set" / "a").touch()
    monkeypatch.setenv("AEROGEL_DATA", str(tmp_path / "mine"))
    assert prepare.find_files("set", "set", ["a"], "nowhere") == tmp_path / "mine" / "set"
    (tmp_path / "mine" / "set" / "a").unlink()
    assert prepare.find_files("set", "set", ["a"], "nowhere") == Path("data/set")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnits", "unknown data set 'mnits'; did you mean mnist"),
        ("", "unknown data set ''"),
        ("folder:", "unknown data set 'folder:'; did you mean folder:PATH"),
        ("nothing_here:factory", "no module 'nothing_here'"),
    ],
)
def test_unknown_spec_is_refused(spec: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        load(spec)


FACTORY = """
import torch
from aerogel.data import Split, assemble

def toy():
    images = torch.arange(20 * 12, dtype=torch.uint8).view(20, 1, 3, 4)
    split = Split(images, torch.arange(20) % 2)
    return assemble("mine", split, split.subset(slice(4)), ("even", "odd"), val=4)

def broken():
    return 1 / 0

def number():
    return 3
"""


def test_own_factory_is_loaded_and_resized(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(FACTORY)
    dataset = load(f"{path}:toy")
    assert dataset.name == f"{path}:toy"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (16, 4, 4)
    bigger = load(f"{path}:toy", size=(3, 6, 8))
    assert bigger.input_shape == (3, 6, 8)
    assert (bigger.mean, bigger.std) == statistics(bigger.train.images)
    assert torch.equal(bigger.val.labels, dataset.val.labels)


def test_failing_factory_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(FACTORY)
    with pytest.raises(AerogelError, match=r"own.py:broken' raised ZeroDivisionError: .* at .*own.py:11"):
        load(f"{path}:broken")
    with pytest.raises(AerogelError, match=r"must return an aerogel.data.Dataset, got a int"):
        load(f"{path}:number")


def test_every_named_set_has_a_title() -> None:
    assert TITLES.keys() == SETS.keys()
    assert TITLES["cifar10"] == "CIFAR-10 (JPEG)"
