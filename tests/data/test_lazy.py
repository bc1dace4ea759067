"""Images that are decoded as they are used: the same set, the same batches, whatever reads them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from toys import noisy_folder

from aerogel.data import Dataset, batch_count, batches, files, load, prepare
from aerogel.data.files import Lazy
from aerogel.errors import DataError

SIZE = (3, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 noisy images of two classes; one cannot be read."""
    return noisy_folder(tmp_path_factory.mktemp("images"), 40, ("png", "jpg"))


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Dataset, Dataset]:
    return load(f"folder:{folder}", size=SIZE), load(f"folder:{folder}", size=SIZE, lazy=True)


def all_of(data: Dataset, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    defaults = {"seed": 3, "epoch": 2, "shuffle": True, "augment": "crop_flip"}
    return [tuple(batch) for batch in batches(data, "train", 9, **defaults | options)]


def test_it_is_the_set_that_it_is_in_memory(both: tuple[Dataset, Dataset]) -> None:
    held, lazy = both
    assert isinstance(lazy.train.images, Lazy)
    assert not isinstance(held.train.images, Lazy)
    assert (lazy.mean, lazy.std, lazy.classes) == (held.mean, held.std, held.classes)
    assert lazy.bad_files == held.bad_files
    assert len(lazy.bad_files) == 1
    assert lazy.fingerprint() == held.fingerprint()
    for name in ("train", "val", "test"):
        ours, theirs = getattr(lazy, name), getattr(held, name)
        assert ours.images.shape == theirs.images.shape
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.rows(slice(None)), theirs.images)
    some = torch.tensor([5, 2, 5])
    assert torch.equal(lazy.train.rows(some), held.train.images[some])
    mask = held.train.labels == 1
    assert torch.equal(lazy.train.subset(mask).rows(slice(2)), held.train.images[mask][:2])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers_nor_on_where_the_pixels_are(
    workers: int, both: tuple[Dataset, Dataset]
) -> None:
    held, lazy = both
    whole = all_of(held)
    assert len(whole) == batch_count(len(held.train), 9)
    before = torch.get_rng_state()
    for start in (0, 4, len(whole)):
        found = all_of(lazy, workers=workers, start=start)
        assert len(found) == len(whole) - start
        for ours, theirs in zip(found, whole[start:], strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_with_workers_share_each_batch(both: tuple[Dataset, Dataset]) -> None:
    held, lazy = both
    parts = [all_of(lazy, workers=1, rank=rank, ranks=2) for rank in range(2)]
    for number, (inputs, labels, _) in enumerate(all_of(held)):
        for rank in range(2):
            assert torch.equal(parts[rank][number][0], inputs[rank::2])
            assert torch.equal(parts[rank][number][1], labels[rank::2])


def test_workers_serve_a_set_in_memory_too(both: tuple[Dataset, Dataset]) -> None:
    for ours, theirs in zip(all_of(both[0], workers=2), all_of(both[0]), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_a_pass_that_is_left_ends_its_workers(both: tuple[Dataset, Dataset]) -> None:
    going = batches(both[1], "train", 9, workers=2)
    next(going)
    assert len(multiprocessing.active_children()) == 2
    del going
    assert multiprocessing.active_children() == []


def test_signals_that_reach_the_workers_too_do_not_end_the_pass(both: tuple[Dataset, Dataset]) -> None:
    whole = all_of(both[0])
    going = batches(both[1], "train", 9, seed=3, epoch=2, shuffle=True, augment="crop_flip", workers=2)
    found = [next(going)]
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGINT)
        os.kill(child.pid or 0, signal.SIGTERM)
    found += list(going)
    assert all(torch.equal(ours.inputs, theirs[0]) for ours, theirs in zip(found, whole, strict=True))


def test_a_worker_that_the_system_ends_is_told(both: tuple[Dataset, Dataset]) -> None:
    going = batches(both[1], "train", 9, workers=1)
    next(going)
    (child,) = multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL  # the loader's would raise anywhere in training
    os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process ended \(.*\), as for lack of memory .*; use fewer workers"):
        list(going)


def test_memory_decides(folder: Path, both: tuple[Dataset, Dataset]) -> None:
    with patch.object(prepare, "available_memory", lambda: 2 * 81 * 3 * 8 * 8 - 1):
        lazy = load(f"folder:{folder}", size=SIZE)
    assert isinstance(lazy.test.images, Lazy)
    assert lazy.fingerprint() == both[0].fingerprint()
    with patch.object(prepare, "available_memory", lambda: 2 * 81 * 3 * 8 * 8):
        assert not isinstance(load(f"folder:{folder}", size=SIZE).test.images, Lazy)


def test_another_size_is_asked_for_when_files_are_read(both: tuple[Dataset, Dataset]) -> None:
    with pytest.raises(DataError, match=r"have one size, \(3, 8, 8\), and cannot be resized; give --input where"):
        prepare.resized(both[1], (3, 4, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_goes_later_is_named(workers: int, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    lazy = load(f"folder:{tmp_path / 'copy'}", size=SIZE, lazy=True)
    for name in ("cat", "dog"):
        (tmp_path / "copy" / "train" / name / "007.jpg").write_bytes(b"")
    every = (batch for split in ("train", "val", "test") for batch in batches(lazy, split, 9, workers=workers))
    with pytest.raises(DataError, match=r"007.jpg was readable when the set .* \(an empty file\); put it back and res"):
        list(every)


def test_files_are_examined_once_and_changed_ones_again(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    read: list[str] = []
    really = files.read_image

    def counted(file: Path, size: tuple[int, int, int]) -> torch.Tensor:
        read.append(Path(file).name)
        return really(file, size)

    def again() -> Dataset:
        read.clear()
        return load(f"folder:{root}", size=SIZE, lazy=True)

    with patch.object(files, "read_image", counted), patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache")):
        first = again()
        assert len(read) == 81
        assert again().fingerprint() == first.fingerprint()
        assert again().bad_files == first.bad_files
        assert read == []
        Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "train" / "cat" / "bad.jpg")
        (root / "train" / "dog" / "000.png").unlink()
        changed = again()
        assert read == ["bad.jpg"]
        assert changed.bad_files == ()
        assert changed.fingerprint() == load(f"folder:{root}", size=SIZE).fingerprint() != first.fingerprint()
        (kept,) = (tmp_path / "cache" / "aerogel" / "images").iterdir()
        for damage in (b"", kept.read_bytes()[:50], b"x" * 5000):
            kept.write_bytes(damage)
            assert again().fingerprint() == changed.fingerprint()
            assert len(read) == 80
        load(f"folder:{root}", size=(1, 8, 8), lazy=True)
        assert len(read) == 160  # another size is another examination
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache")):
        assert load(f"folder:{root}", size=SIZE, lazy=True).fingerprint() == changed.fingerprint()
