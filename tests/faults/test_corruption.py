"""Bits that flip, files that are cut short, empty or gone: all found and named, and the checkpoint before is loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aerogel.data import Dataset, Split, assemble
from aerogel.train import HardLabels, Recipe, State, load_checkpoint, save_checkpoint, start, steps

QUICK = {"bit flips": 150, "truncations": 40, "missing": 16, "empty": 16}
FULL = {"bit flips": 1000, "truncations": 200, "missing": 50, "empty": 50}
Damage = Callable[[Path, random.Random], None]


def toy() -> Dataset:
    images = torch.arange(24 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).view(24, 1, 4, 4)
    return assemble("toy", Split(images, torch.arange(24) % 3), Split(images, torch.arange(24) % 3), "abc", val=6)


def begin(seed: int) -> State:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return start(net, HardLabels(), toy(), Recipe(epochs=2, batch_size=6, optimizer="adamw", ema=0.9))


def weights(state: State) -> dict[str, Tensor]:
    assert state.average is not None
    found = {f"model.{name}": tensor.clone() for name, tensor in state.model.state_dict().items()}
    found |= {f"average.{name}": tensor.clone() for name, tensor in state.average.state_dict().items()}
    slots = state.optimizer.state_dict()["state"].items()
    return found | {f"{i}.{name}": tensor.clone() for i, held in slots for name, tensor in held.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Checkpoints of steps 3 and 6, and the weights at step 3."""
    folder = tmp_path_factory.mktemp("two")
    state = begin(0)
    before: dict[str, Tensor] = {}
    for step in steps(state, toy()):
        if step.number in (3, 6):
            save_checkpoint(folder, state)
        if step.number == 3:
            before = weights(state)
    return folder, before


def flipped(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut_short(path: Path, dice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def gone(path: Path, dice: random.Random) -> None:
    path.unlink()


def emptied(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Damage] = {"bit flips": flipped, "truncations": cut_short, "missing": gone, "empty": emptied}


def check_found(kind: str, count: int, two: tuple[Path, dict[str, Tensor]], folder: Path) -> None:
    """`count` random damages of that kind to the newest checkpoint, one at a time."""
    made, before = two
    newest = folder / "step_0000006"
    shutil.copytree(made, folder, dirs_exist_ok=True)
    dice = random.Random(kind)
    files = sorted(newest.iterdir())
    content = {file: file.read_bytes() for file in files}
    sizes = [len(content[file]) for file in files]
    state = begin(1)
    for number in range(count):
        # every file in turn where there is one way to lose it, else as often as a random byte lies in it
        file = dice.choices(files, sizes)[0] if kind == "bit flips" else files[number % len(files)]
        DAMAGES[kind](file, dice)
        state.step = 0
        (problem,) = load_checkpoint(folder, state)
        assert str(file) in problem
        assert "\n" not in problem
        assert state.step == 3
        file.write_bytes(content[file])
    now = weights(state)
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name
    assert load_checkpoint(folder, state) == []  # no false alarm
    assert state.step == 6


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_one_before_is_loaded(
    kind: str, two: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    check_found(kind, QUICK[kind], two, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGES)
def test_all_damage(
    kind: str, two: tuple[Path, dict[str, Tensor]], tmp_path: Path, faults_result: dict[str, object]
) -> None:
    check_found(kind, FULL[kind], two, tmp_path)
    faults_result.update({"kind": kind, "done": FULL[kind], "found and named": FULL[kind]})
