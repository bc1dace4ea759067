"""Packed sets: the same set, mapped; whole or not at all; and any change to its files is told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from toys import TOY, noisy_folder

from aerogel.data import Dataset, batches, files, load, pack
from aerogel.data.pack import load_packed, race, write_packed
from aerogel.errors import AerogelError, DataError
from aerogel.train import HardLabels, Recipe, fit, start

SIZE = (3, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy images of two classes; one more cannot be read."""
    return noisy_folder(tmp_path_factory.mktemp("images"), 30)


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    write_packed(load(f"folder:{folder}", size=SIZE, lazy=True), out)
    return out


def everything(data: Dataset) -> list[torch.Tensor]:
    options = {"seed": 3, "shuffle": True, "augment": data.augment}
    return [
        tensor for name in ("train", "val", "test") for batch in batches(data, name, 7, **options) for tensor in batch
    ]


def test_it_is_the_set_it_was_packed_from(folder: Path, packed: Path) -> None:
    theirs, ours = load(f"folder:{folder}", size=SIZE), load(f"packed:{packed}")
    assert ours.name == f"packed:{packed}"
    for name in ("classes", "mean", "std", "augment", "bad_files", "input_shape"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours.bad_files) == 1
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(a, b)


def test_a_disk_without_room_is_told_before_anything_is_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, usage = load(f"packed:{packed}"), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60 * (math.prod(SIZE) + 8) - 1))
    with pytest.raises(AerogelError, match=r"^[^\n]*/b: 60 packed images of 3x8x8 \(a smaller --input[^\n]* make room"):
        write_packed(data, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60 * (math.prod(SIZE) + 8)))
    write_packed(data, tmp_path / "a" / "b")


def test_it_trains_to_the_same_weights_as_its_files_in_memory_or_not(folder: Path, packed: Path) -> None:
    def trained(data: Dataset) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        fit(start(net, HardLabels(), data, Recipe(epochs=2, batch_size=9, lr=0.01)), data)
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    spec = f"folder:{folder}"
    sets = [load(spec, size=SIZE), load(spec, size=SIZE, lazy=True), load(f"packed:{packed}")]
    first, *others = [trained(data) for data in sets]
    assert all(torch.equal(first, other) for other in others)


def test_its_fingerprint_is_the_sets_and_is_not_computed(folder: Path, packed: Path) -> None:
    with patch("aerogel.data.dataset.image_digests", side_effect=AssertionError("computed")):
        found = load(f"packed:{packed}").fingerprint()
    assert found == load(f"folder:{folder}", size=SIZE).fingerprint()
    assert found == load(f"folder:{folder}", size=SIZE, lazy=True).fingerprint()


def test_pixels_are_mapped_and_not_read(packed: Path) -> None:
    data = load(f"packed:{packed}")
    for name in ("train", "val", "test"):
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{packed}/{name}/images" in line]
        assert [line.split()[1] for line in maps] == ["r--s"]  # for reading, shared by all processes
        assert getattr(data, name).images.numel() > 0


def test_a_set_in_memory_is_packed_too_and_may_be_resized(tmp_path: Path) -> None:
    write_packed(TOY, tmp_path / "toy")
    assert load_packed(tmp_path / "toy").fingerprint() == TOY.fingerprint()
    assert load(f"packed:{tmp_path}/toy", size=(3, 4, 4)).input_shape == (3, 4, 4)


def test_packing_holds_no_more_than_a_chunk(folder: Path, tmp_path: Path) -> None:
    data = load(f"folder:{folder}", size=SIZE, lazy=True)
    most = []
    really = files.Lazy.__getitem__

    def counted(self: files.Lazy, index: slice) -> torch.Tensor:
        most.append(len(found := really(self, index)))
        return found

    with patch.object(pack, "CHUNK", 5), patch.object(files.Lazy, "__getitem__", counted):
        write_packed(data, tmp_path / "set")
    assert max(most) == 5
    assert sum(most) == 60
    assert load_packed(tmp_path / "set").fingerprint() == data.fingerprint()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["train/images.bin", "val/labels.bin", "test/images.bin", "manifest.json"])
@pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove"])
def test_any_change_is_told(file: str, change: str, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "set")
    path = tmp_path / "set" / file
    if change == "flip":
        for place in (0, path.stat().st_size // 2):
            flip(path, place)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif change == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
    with pytest.raises(DataError, match=f"{file}.*(is not what was written|cannot be read|No such file|is not JSON)"):
        load(f"packed:{tmp_path}/set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "does not fit this version"),
        ({"more": 1}, "does not fit this version"),
        ({"splits": {}}, "must tell train, val and test"),
        ({"mean": [0.5]}, "a finite number for each of 3 channels"),
        ({"classes": ["cat"]}, r"must lie in \[0, 1\)"),
        ({"size": [3, 8, -8]}, "must tell train, val and test and a size"),
        ({"augment": "os.system"}, "unknown name 'os.system'"),
    ],
)
def test_a_manifest_that_was_made_by_hand_is_judged(
    change: dict[str, object], message: str, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "set")
    held = json.loads((packed / "manifest.json").read_text())
    del held["sha256"]
    held |= change
    (tmp_path / "set" / "manifest.json").write_text(json.dumps({"sha256": pack._sha256_of(held), **held}))
    with pytest.raises(AerogelError, match=message):
        load(f"packed:{tmp_path}/set")


def test_what_is_no_packed_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"packed:.* needs the manifest that aerogel data pack wrote: cannot read"):
        load(f"packed:{tmp_path}")
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DataError, match=r"manifest.json is not what was written"):
        load(f"packed:{tmp_path}")


def test_nothing_is_overwritten_and_nothing_half_written_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(AerogelError, match=r"data pack: .*set exists and is never overwritten"):
        write_packed(TOY, tmp_path / "set")
    shutil.copytree(folder, tmp_path / "copy")
    data = load(f"folder:{tmp_path}/copy", size=SIZE, lazy=True)
    shutil.rmtree(tmp_path / "copy" / "train" / "dog")
    with pytest.raises(DataError, match="was readable when the set was loaded"):
        write_packed(data, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "set"]


def test_the_race_counts_the_same_images_for_both(folder: Path, packed: Path) -> None:
    found = race(load(f"folder:{folder}", size=SIZE, lazy=True), load(f"packed:{packed}"))
    assert found["images"] == 21  # of 43 training images in batches of 22 and 21; the first is left out
    assert found["ratio"] == pytest.approx(found["packed_images_per_s"] / found["unpacked_images_per_s"])
    assert race(TOY, TOY)["images"] == 24  # one batch: it is counted


def test_the_command_packs_and_tells(folder: Path, tmp_path: Path, aerogel: Callable) -> None:
    words = ("data", "pack", f"folder:{folder}", "--out", tmp_path / "set", "--input", "3,8,8")
    outcome = aerogel(*words, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["fingerprint"] == load(f"packed:{tmp_path}/set").fingerprint()
    assert found["bytes"] == 60 * 3 * 8 * 8
    assert found["images"] == {"train": 43, "val": 5, "test": 12}
    assert found["epoch"]["ratio"] > 0
    assert "times as fast" in outcome.err
    again = aerogel(*words)
    assert again.code == 1
    assert "exists and is never overwritten" in again.err


def test_the_command_checks(folder: Path, tmp_path: Path, packed: Path, aerogel: Callable) -> None:
    outcome = aerogel("data", "check", f"folder:{folder}", "--input", "3,8,8", "--json")
    assert outcome.code == 2
    ((path, reason),) = json.loads(outcome.out)["bad_files"]
    assert path.endswith("train/cat/bad.jpg")
    assert reason.startswith("its content is none of JPEG")
    shutil.copytree(folder, tmp_path / "clean")
    (tmp_path / "clean" / "train" / "cat" / "bad.jpg").unlink()
    clean = aerogel("data", "check", f"folder:{tmp_path}/clean", "--input", "3,8,8")
    assert clean.code == 0
    assert "43 train, 5 val, 12 test; no bad files" in clean.out
    for i in range(10):
        for name in ("cat", "dog"):
            (tmp_path / "worse" / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "worse" / "train" / "cat" / f"{i}.png").touch()
    found = aerogel("data", "check", f"folder:{tmp_path}/worse", "--input", "3,8,8", "--json")
    assert found.code == 2
    assert len(json.loads(found.out)["bad_files"]) == 10
    assert not json.loads(found.out)["usable"]
    assert "more than 5%" in aerogel("data", "check", f"folder:{tmp_path}/worse", "--input", "3,8,8").out
    assert aerogel("data", "check", f"packed:{tmp_path}/worse").code == 1


def test_a_bad_files_name_cannot_control_the_terminal(folder: Path, tmp_path: Path, aerogel: Callable) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "train" / "cat" / "\x1b[2Jred\nline.png").touch()
    outcome = aerogel("data", "check", f"folder:{tmp_path}/set", "--input", "3,8,8")
    assert outcome.code == 2
    assert "\x1b" not in outcome.out
    assert outcome.out.count("\n") == 3  # two bad files and the sum
