"""What `test_objective` runs in one process and in two: every loss of `Distil`, trained for two epochs.

python distil_ranks.py FOLDER     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aerogel import data as datasets
from aerogel.data import Dataset, assemble
from aerogel.distill import LOSSES, Distil
from aerogel.train import Recipe, fit, join, start

TAPS = {"one": "one", "two": "two"}
EVERY = {name: 0.5 for name in LOSSES if name not in ("at", "hint")} | {"hint": 1.0, "at": 10.0}
OPTIONS = {"crd": {"size": 64, "dim": 8, "tau": 0.5}}


class Net(nn.Module):
    """In double precision, where the order of sums does not show; sigmoids have no kinks."""

    def __init__(self, wide: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Sequential(nn.Conv2d(1, wide, 3, 2), nn.BatchNorm2d(wide), nn.Sigmoid())
        self.two = nn.Sequential(nn.Conv2d(wide, 2 * wide, 2), nn.Sigmoid())
        self.head = nn.Linear(2 * wide, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x.double())).mean((2, 3)))


def some_digits() -> Dataset:
    """63 training images: batches of 21, shared out as 11 and 10."""
    digits = datasets.load("digits")
    train, test = digits.train.subset(slice(0, 83)), digits.test.subset(slice(0, 40))
    return assemble("some digits", train, test, digits.classes, val=20)


def objective(student: nn.Module, losses: dict[str, float] = EVERY, teacher: nn.Module | None = None) -> Distil:
    taps = {
        name: TAPS for name in ("hint", "vid", "crd", "review", "exits", "at", "sp", "rkd", "pkt") if name in losses
    }
    options = {name: given for name, given in OPTIONS.items() if name in losses}
    example = torch.zeros(2, 1, 8, 8)
    return Distil(teacher or Net(6, seed=1), losses, 3.0, taps, options, student=student, example=example)


def main() -> None:
    torch.set_num_threads(1)
    folder, world, data = Path(sys.argv[1]), join(), some_digits()
    student = Net()
    made, told = objective(student), list[dict[str, float]]()
    state = start(student, made, data, Recipe(epochs=2, batch_size=21, warmup=0, lr=0.01))
    fit(state, data, on_step=lambda step: told.append(step.losses))
    tensors: dict[str, Any] = {**student.state_dict(), **{f"own.{k}": v for k, v in made.state_dict().items()}}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"rank{world.rank}.safetensors")
    (folder / f"rank{world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
