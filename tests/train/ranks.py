"""What `test_distributed` runs in every process: trains some networks and writes their weights.

python ranks.py FOLDER [CASE ...]     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aerogel import data as datasets
from aerogel.data import Batch, Dataset, assemble
from aerogel.distill import SoftTargets
from aerogel.errors import AerogelError, Interrupted
from aerogel.prune.slimming import Slimming
from aerogel.train import HardLabels, Recipe, Signals, State, Step, fit, join, save_checkpoint, start
from aerogel.train.distributed import World

PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 50, "warmup": 0, "augment": "shift"}


class Net(nn.Module):
    """In double precision, where the order of sums does not show."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), *middle, nn.ReLU(), *head).double()
        self.spare = nn.Parameter(torch.zeros(1).double())  # which no loss reads

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


class Act(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Weighed(nn.Module):
    """An objective with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()).double())

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {name: loss * self.scale for name, loss in HardLabels()(student, batch).items()} | {
            "own": (self.scale - 2).square()
        }


def some_digits() -> Dataset:
    """203 training images: batches of 41 and 40, odd and even."""
    digits = datasets.load("digits")
    train, test = digits.train.subset(slice(0, 233)), digits.test.subset(slice(0, 100))
    return assemble("some digits", train, test, digits.classes, val=30, augment="shift")


def cases(name: str, data: Dataset) -> State:
    norm, plan = nn.BatchNorm2d(8), Recipe(**PLAN)
    if name == "plain":
        return start(Net(), HardLabels(), data, plan)
    if name == "norms":
        return start(Net(norm), HardLabels(), data, plan)
    if name == "cumulative norms":
        return start(Net(nn.BatchNorm2d(8, momentum=None, affine=False)), HardLabels(), data, plan)
    if name == "own statistics":
        return start(Net(norm), HardLabels(), data, plan.model_copy(update={"sync_norms": False}))
    if name == "average, adamw, clipped":
        changes = {"ema": 0.9, "optimizer": "adamw", "lr": 0.01, "clip": 0.1}
        return start(Net(norm), HardLabels(), data, plan.model_copy(update=changes))
    if name == "in parts":
        return start(Net(), HardLabels(), data, plan.model_copy(update={"accumulate": 3}))
    if name == "in more parts than rows":  # shares of 14, 14 and 13 rows; a norm's sums must be as many everywhere
        return start(Net(norm), HardLabels(), data, plan.model_copy(update={"accumulate": 14, "epochs": 0.4}))
    if name == "a norm of its own":
        return start(Net(Act(8)), HardLabels(), data, plan)
    if name == "teacher and penalty":
        return start(Net(norm), Slimming(SoftTargets(Net(nn.BatchNorm2d(8)).eval()), 0.01), data, plan)
    if name == "objective's own weight":
        return start(Net(), Weighed(), data, plan)
    raise KeyError(name)


def trained(name: str, data: Dataset, folder: Path, world: World) -> dict[str, Any]:
    state, losses = cases(name, data), list[dict[str, float]]()
    net = fit(state, data, on_step=lambda step: losses.append(step.losses))
    if world.rank == 0:
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / f"{name}.safetensors")
    return {"losses": losses}


def stopped(data: Dataset, world: World) -> dict[str, Any]:
    """SIGTERM comes to the last rank alone: all stop at the same step."""

    def hear(step: Step) -> None:
        if step.number == 3 and world.rank == world.ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    state = cases("plain", data)
    with Signals() as signals:
        try:
            fit(state, data, on_step=hear, signals=signals)
        except Interrupted as stop:
            return {"stopped": state.step, "signal": stop.signal}
    return {"stopped": state.step}


def rolled_back(data: Dataset, world: World, folder: Path | None = None) -> dict[str, Any]:
    """A loss of one rank is no number at step 6, once: all go back and on together, to what rank 0 saved last."""
    calls = [0]

    def ill(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        calls[0] += 1
        loss = HardLabels()(student, batch)["hard"]
        return {"hard": loss * float("nan") if calls[0] == 6 and world.rank == world.ranks - 1 else loss}

    said: list[str] = []
    state = start(Net(), ill, data, Recipe(**PLAN))
    calls[0] = 0
    save = (lambda s: save_checkpoint(folder / "c", s)) if folder else None
    fit(state, data, on_trouble=said.append, save=save, every_seconds=0.0)
    return {"said": said, "lr_scale": state.lr_scale, "steps": state.step, "calls": calls[0]}


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    world, data = join(), some_digits()
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = (
                stopped(data, world) if name == "stopped"
                else rolled_back(data, world) if name == "rolled back"
                else rolled_back(data, world, folder) if name == "rolled back to a save"
                else trained(name, data, folder, world)
            )  # fmt: skip
        except AerogelError as error:
            found[name] = {"error": str(error)}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
