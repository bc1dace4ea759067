"""Checkpoints: a run resumed at any step ends bit for bit where the unbroken one does; damage is found and named."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, Split, assemble
from aerogel.errors import AerogelError
from aerogel.train import (
    HardLabels,
    Objective,
    Recipe,
    State,
    load_checkpoint,
    save_checkpoint,
    start,
    steps,
)
from aerogel.train.checkpoint import best_checkpoint, check_room, checkpoint_bytes, damage

TOTAL = 6  # 1.5 epochs of 4 batches


def toy(n: int = 41) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(n) % 3)
    return assemble("toy", split, split, "abc", val=9, augment="shift")


DATA = toy()


def convolutions(first: int = 4, last: int = 4) -> nn.Module:
    convs = (nn.Conv2d(1, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, last, 3))
    return nn.Sequential(*convs, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * last, 3))


class View(nn.Module):
    """Not trained channels_last; its layers are tied, and one buffer is left out of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        h = self.convs(x).view(len(x), -1)
        return self.fc(self.two(self.one(h).relu())) * (1 + 0.1 * self.calls)


class Scaled(nn.Module):
    """An objective with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        noise = 0.1 * torch.rand(len(batch.inputs), 3)
        return {"hard": F.cross_entropy(self.scale * student(batch.inputs) + noise, batch.labels)}


class Tied(nn.Module):
    """Two parameters in the same memory, tied the old way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
        self.b.weight.data = self.a.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x.flatten(1)).relu()))


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Objective], dict[str, Any]]] = {
    "sgd": (convolutions, HardLabels, {}),
    "sgd without memory": (convolutions, HardLabels, {"momentum": 0.0}),
    "sgd with average": (convolutions, HardLabels, {"ema": 0.9, "clip": 0.1, "augment": "crop_flip"}),
    "adamw": (convolutions, HardLabels, {"optimizer": "adamw", "lr": 0.01}),
    "adamw with average, bf16": (convolutions, HardLabels, {"optimizer": "adamw", "ema": 0.5, "autocast": "bf16"}),
    "view": (View, HardLabels, {"schedule": "step", "augment": "none"}),
    "objective with weights": (convolutions, Scaled, {"schedule": "constant", "seed": 7}),
    "same memory": (Tied, HardLabels, {}),
}


def begin(kind: str = "sgd", noise: int = 0, **changes: Any) -> State:
    """The state at step 0; `noise` changes the initial weights, which loading must replace."""
    net, objective, recipe = RUNS[kind]
    torch.manual_seed(noise)
    state = start(net(), objective(), DATA, Recipe(**({"epochs": 1.5, "batch_size": 8} | recipe | changes)))
    assert state.channels_last == (net is convolutions)
    return state


def everything(state: State) -> dict[str, Tensor]:
    """All tensors that training changes."""
    found: dict[str, Tensor] = {}
    for part in ("model", "average", "objective"):
        if isinstance(module := getattr(state, part), nn.Module):
            found |= {f"{part} {name}": p.detach().clone() for name, p in module.named_parameters()}
            found |= {f"{part} {name}": b.clone() for name, b in module.named_buffers()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        found |= {f"{index} {slot}": t.clone() for slot, t in slots.items() if isinstance(t, Tensor)}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_at_any_step_it_ends_as_if_unbroken(kind: str, tmp_path: Path) -> None:
    whole = begin(kind)
    save_checkpoint(tmp_path / "0", whole)
    losses = []
    for step in steps(whole, DATA):
        losses.append(step.losses)
        save_checkpoint(tmp_path / str(step.number), whole)
    expected = everything(whole)
    assert len(losses) == TOTAL
    for number in range(TOTAL + 1):
        again = begin(kind, noise=1)
        assert load_checkpoint(tmp_path / str(number), again) == []
        assert again.step == number
        assert [step.losses for step in steps(again, DATA)] == losses[number:]
        assert_same(everything(again), expected)


def test_tied_memory_stays_tied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, begin("same memory"))
    again = begin("same memory", noise=1)
    load_checkpoint(tmp_path, again)
    assert again.model.a.weight.data_ptr() == again.model.b.weight.data_ptr()


def test_a_restored_state_does_not_hang_on_the_files(tmp_path: Path) -> None:
    """What is loaded is in memory: a file changed afterwards changes nothing."""
    trained = train(begin("adamw"), tmp_path, [4])
    again = begin("adamw", noise=1)
    load_checkpoint(tmp_path, again)
    for path in tmp_path.rglob("*.safetensors"):
        with open(path, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
    assert_same(everything(again), everything(trained))


def test_a_folder_without_checkpoints_leaves_the_start(tmp_path: Path) -> None:
    (tmp_path / "step_of_mine").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        state = begin()
        before = everything(state)
        assert load_checkpoint(folder, state) == []
        assert state.step == 0
        assert_same(everything(state), before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train(state: State, folder: Path, saves: list[int]) -> State:
    """Trains to the last of `saves`, saving at each."""
    for step in steps(state, DATA):
        if step.number in saves:
            save_checkpoint(folder, state)
        if step.number == saves[-1]:
            break
    return state


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step_of_mine").mkdir()
    (tmp_path / ".step_0000001.abcd.tmp").mkdir()  # of a run that was killed
    train(begin(), tmp_path, [1, 2, 5])
    assert names(tmp_path) == ["step_0000002", "step_0000005", "step_of_mine"]


def test_steps_are_numbers_not_words(tmp_path: Path) -> None:
    state = begin()
    for state.step in (9_999_998, 9_999_999, 10_000_000):
        save_checkpoint(tmp_path, state)
    assert names(tmp_path) == ["step_10000000", "step_9999999"]
    load_checkpoint(tmp_path, again := begin(noise=1))
    assert again.step == 10_000_000


def test_saving_twice_writes_once(tmp_path: Path) -> None:
    state = train(begin(), tmp_path, [3])
    before = (tmp_path / "step_0000003" / "model.safetensors").stat().st_ino
    assert save_checkpoint(tmp_path, state) == tmp_path / "step_0000003"
    assert (tmp_path / "step_0000003" / "model.safetensors").stat().st_ino == before


def test_checkpoints_of_another_run_are_neither_read_nor_removed(tmp_path: Path) -> None:
    train(begin(), tmp_path, [2, 4])
    with pytest.raises(AerogelError, match=r"checkpoint: .*step_0000002 is later than step 1 or another run's"):
        train(begin(), tmp_path, [1])
    with pytest.raises(AerogelError, match=r"checkpoint: .*step_0000004 is later than step 4 or another run's"):
        train(begin(lr=0.5), tmp_path, [4])
    state = begin(lr=0.5, seed=3)
    before = everything(state)
    with pytest.raises(
        AerogelError, match=r"step_0000004 is of another recipe or data set \(lr 0.05, now 0.5; seed 0, now 3\)"
    ):
        load_checkpoint(tmp_path, state)
    assert_same(everything(state), before)
    assert names(tmp_path) == ["step_0000002", "step_0000004"]


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    train(begin(), tmp_path, [2])
    more = start(convolutions(), HardLabels(), toy(57), Recipe(epochs=1.5, batch_size=8))
    with pytest.raises(AerogelError, match=r"another recipe or data set \(steps_per_epoch 4, now 6\); start a new run"):
        load_checkpoint(tmp_path, more)


OTHERS = (lambda: convolutions(5), lambda: convolutions(last=1), lambda: convolutions().double(), Tied)


class Counting(nn.Module):
    """An objective that draws from every global generator and keeps a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, held: dict[str, int]) -> None:
        self.calls = held["calls"]

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        noise = random.random() + random.gauss(0, 1) + np.random.rand() + np.random.standard_normal() + self.calls
        return {"hard": F.cross_entropy(student(batch.inputs), batch.labels) * (1 + 0.01 * noise)}


def test_global_generators_and_numbers_of_an_objective_go_on(tmp_path: Path) -> None:
    def fresh(seed: int) -> State:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return start(convolutions(), Counting(), DATA, Recipe(epochs=1.5, batch_size=8))

    whole = fresh(0)
    losses = []
    for step in steps(whole, DATA):
        losses.append(step.losses)
        save_checkpoint(tmp_path / str(step.number), whole)
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    for number in range(1, TOTAL + 1):
        again = fresh(number)
        load_checkpoint(tmp_path / str(number), again)
        assert again.objective.calls == number + 1  # one by `start`, to try the order in memory
        assert [step.losses for step in steps(again, DATA)] == losses[number:]
        assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn


def test_what_json_cannot_hold_of_an_objective_is_refused(tmp_path: Path) -> None:
    state = start(convolutions(), Counting(), DATA, Recipe(epochs=1.5, batch_size=8))
    state.objective.calls = {1, 2}
    with pytest.raises(AerogelError, match=r"not JSON serializable.*; there is no checkpoint before it$"):
        save_checkpoint(tmp_path, state)
    assert names(tmp_path) == []


def test_the_best_one_stays_beside_the_newest(tmp_path: Path) -> None:
    state = begin()
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.1, 6: None}
    for step in steps(state, DATA):
        save_checkpoint(tmp_path, state, keep=2, best=scores[step.number])
        if step.number == 4:
            four = everything(state)
        if step.number == 2:
            two = everything(state)
    assert names(tmp_path) == ["step_0000002", "step_0000005", "step_0000006"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_0000002"
    again = begin(noise=1)
    assert load_checkpoint(tmp_path, again, best=True) == []
    assert again.step == 2
    assert_same(everything(again), two)

    save_checkpoint(tmp_path, state, best=0.95)  # saved above before it was scored
    assert best_checkpoint(tmp_path) == tmp_path / "step_0000006"
    assert names(tmp_path) == ["step_0000005", "step_0000006"]
    assert damage(tmp_path / "step_0000006") is None
    flip(tmp_path / "step_0000006" / "model.safetensors", 500)
    assert load_checkpoint(tmp_path, begin(), best=True) == [f"{tmp_path}/step_0000006/model.safetensors is corrupt"]
    assert not torch.equal(two["model 0.weight"], four["model 0.weight"])


def test_nothing_is_best_where_nothing_was_scored(tmp_path: Path) -> None:
    train(begin(), tmp_path, [1, 2, 3])
    assert best_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path / "nowhere") is None
    assert names(tmp_path) == ["step_0000002", "step_0000003"]


@pytest.mark.parametrize("bad", [{"keep": 0}, {"best": float("nan")}, {"best": float("inf")}])
def test_a_wrong_keep_or_score_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"checkpoint: keep must be >= 1 and best finite, got"):
        save_checkpoint(tmp_path, begin(), **bad)
    assert names(tmp_path) == []


def test_a_run_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    state = begin()
    save_checkpoint(run / "checkpoints", state, within=run)
    shutil.rmtree(run)
    with pytest.raises(AerogelError, match=r"checkpoint: .*run has vanished during the run; bring it back"):
        save_checkpoint(run / "checkpoints", state, within=run)
    assert not run.exists()


@pytest.mark.parametrize("kind", RUNS)
def test_the_room_that_is_asked_for_is_the_room_that_is_taken(kind: str, tmp_path: Path) -> None:
    """The estimate before the first step, when the optimizer has no memory yet, against the folder after it."""
    state = begin(kind)
    estimate = checkpoint_bytes(state)
    next(iter(steps(state, DATA)))
    path = save_checkpoint(tmp_path, state)
    taken = sum(file.stat().st_size for file in path.iterdir())
    assert taken <= estimate <= taken + 2**16 + sum(p.nbytes for p in state.model.parameters())


def test_too_little_room_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = begin()
    check_room(tmp_path / "not/there/yet", state)
    assert names(tmp_path) == []
    one = checkpoint_bytes(state)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(2.1 * one)))
    began = time.monotonic()
    with pytest.raises(
        AerogelError, match=r"checkpoints of 0\.1 MiB each need 0\.\d MiB, 0\.\d MiB are free on its disk; make room"
    ):
        check_room(tmp_path, state)
    assert time.monotonic() - began < 1.0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(2.3 * one)))
    check_room(tmp_path, state)


def test_checkpoints_that_lie_there_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = train(begin(), tmp_path, [1, 2])
    usage, one = shutil.disk_usage(tmp_path), checkpoint_bytes(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(2.1 * one)))
    check_room(tmp_path, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=one))
    with pytest.raises(AerogelError, match=r"MiB are free on its disk; make room"):
        check_room(tmp_path, state)


def test_a_place_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(AerogelError, match=r"cannot write .*Read-only file system; "):
        check_room(tmp_path, begin())


@pytest.mark.parametrize("net", OTHERS)
def test_another_network_is_refused_and_not_changed(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    train(begin(), tmp_path, [2])
    state = start(net(), lambda *_: {}, DATA, begin().recipe)
    before = everything(state)
    with pytest.raises(
        AerogelError, match=r"model.safetensors is of another network than [A-Z][a-z]+; start a new run"
    ):
        load_checkpoint(tmp_path, state)
    assert_same(everything(state), before)
    assert state.step == 0


KIND = "adamw with average, bf16"
FILES = [
    "MANIFEST.json",
    *(f"{name}.safetensors" for name in ("average", "model", "optimizer", "random")),
    "state.json",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("two")
    train(begin(KIND), folder, [3, 6])
    assert names(folder / "step_0000006") == FILES
    return folder


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def damages(path: Path) -> Iterator[Callable[[], object]]:
    """Ways to break one file: bits flipped at random, its first and last byte, cut short, emptied, gone."""
    content, dice = path.read_bytes(), random.Random(path.name)
    places = [0, len(content) - 1, *dice.sample(range(len(content)), 20)]
    yield from (lambda at=at: flip(path, at, dice.randrange(8)) for at in places)  # type: ignore[misc]
    yield from (lambda n=n: path.write_bytes(content[:n]) for n in (0, 1, len(content) // 2, len(content) - 2))  # type: ignore[misc]
    yield lambda: path.write_bytes(content + b" x")
    yield path.unlink


@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_named_and_the_checkpoint_before_is_loaded(name: str, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    path = folder / "step_0000006" / name
    content = path.read_bytes()
    again = begin(KIND, noise=1)
    for spoil in damages(path):
        path.write_bytes(content)
        assert damage(path.parent) is None
        spoil()
        again.step = 0
        (problem,) = load_checkpoint(folder, again)
        assert again.step == 3
        assert "\n" not in problem
        assert str(path) in problem
    assert_same(everything(again), everything(train(begin(KIND), tmp_path / "anew", [3])))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"files": {"state.json": 1}}',
        '{"files": {"state.json": 1}, "sha256": "0"}',
        '{"files": {"../../x": "0"}}',
        '{"files": 3}',
        "[" * 10**5,
        "\xff",
    ],
)
def test_a_manifest_that_is_none_is_damage(content: str, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "step_0000003", tmp_path / "step_0000003")
    (tmp_path / "step_0000003" / "MANIFEST.json").write_text(content, encoding="latin-1")
    with pytest.raises(AerogelError, match=r"^resume: no checkpoint in .* is whole: [^\n]*step_0000003"):
        load_checkpoint(tmp_path, begin(KIND))


def test_what_is_not_in_the_manifest_is_damage(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "step_0000003", tmp_path / "step_0000003")
    (tmp_path / "step_0000003" / "more.bin").write_bytes(b"")
    assert damage(tmp_path / "step_0000003") == f"{tmp_path}/step_0000003/more.bin is not in the manifest"


def test_when_all_are_damaged_it_says_so_and_changes_nothing(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    flip(folder / "step_0000003" / "state.json", 3)
    (folder / "step_0000006" / "model.safetensors").unlink()
    state = begin(KIND)
    before = everything(state)
    with pytest.raises(AerogelError, match=r"whole: .*6/model.safetensors is missing; .*3/state.json is corrupt$"):
        load_checkpoint(folder, state)
    assert_same(everything(state), before)


def test_going_on_from_before_a_damaged_one_replaces_it(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    flip(folder / "step_0000006" / "model.safetensors", 300)
    state = begin(KIND, noise=1)
    assert load_checkpoint(folder, state) == [f"{folder}/step_0000006/model.safetensors is corrupt"]
    train(state, folder, [4])
    assert names(folder) == ["step_0000003", "step_0000004"]
    train(state, folder, [6])
    again = begin(KIND)
    assert load_checkpoint(folder, again) == []
    assert_same(everything(again), everything(train(begin(KIND), tmp_path / "anew", [6])))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file: the write fails half-way, as it does then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 300, 2000])
def test_a_failing_write_leaves_the_checkpoint_before_and_nothing_else(size: int, tmp_path: Path) -> None:
    state = train(begin(KIND), tmp_path, [3])
    expected = everything(state)
    next(iter(steps(state, DATA)))
    with (
        pytest.raises(
            AerogelError, match=r"cannot write [^\n]*File too large; [0-9]+ MiB are free.*, .*step_0000003, is intact$"
        ),
        files_of_at_most(size),
    ):
        save_checkpoint(tmp_path, state)
    assert names(tmp_path) == ["step_0000003"]
    again = begin(KIND)
    assert load_checkpoint(tmp_path, again) == []
    assert_same(everything(again), expected)


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_at_any_file_leaves_nothing_half_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = train(begin(KIND), tmp_path, [3])
    next(iter(steps(state, DATA)))
    write_bytes, write_text = Path.write_bytes, Path.write_text

    def fills(write: Callable[..., int]) -> Callable[..., int]:
        def half(self: Path, data: Any, **options: Any) -> int:
            if name not in self.name:
                return write(self, data, **options)
            write(self, data[: len(data) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return half

    monkeypatch.setattr(Path, "write_bytes", fills(write_bytes))
    monkeypatch.setattr(Path, "write_text", fills(write_text))
    with pytest.raises(
        AerogelError, match=r"cannot write [^\n]*: No space left on device; [0-9]+ MiB are free.* is intact$"
    ):
        save_checkpoint(tmp_path, state)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_0000003"]
    assert load_checkpoint(tmp_path, begin(KIND)) == []
