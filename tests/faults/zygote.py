"""A warm process that has imported everything and forks children which train: to kill one costs no import.

It reads one JSON line a job on stdin ({"folder", "final", "ranks", "port"}) and writes lines on stdout, the children
theirs among them: "child RANK PID", "save RANK STEP", "saved RANK STEP", "exit RANK STATUS".
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import data
from aerogel.data import Dataset
from aerogel.export.saved import write_tensors
from aerogel.files import replacing
from aerogel.train import HardLabels, Recipe, load_checkpoint, save_checkpoint, start, steps

RECIPE = Recipe(epochs=1.2, batch_size=128, optimizer="adamw", lr=0.01, ema=0.9, augment="shift")
SLOW = 0.0005  # seconds in the middle of every file of a checkpoint


def tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = (nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(*convs, nn.LazyLinear(10))


def everything(state: Any) -> dict[str, Tensor]:
    """The weights, their average and the optimizer's memory."""
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    found |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    memory = state.optimizer.state_dict()["state"]
    return found | {f"{i}.{slot}": tensor for i, slots in memory.items() for slot, tensor in slots.items()}


def write_slowly() -> None:
    """Every file of a checkpoint is on the disk half-written for a moment, where a kill can find it."""
    write_bytes, write_text = Path.write_bytes, Path.write_text

    def slow_bytes(self: Path, content: Any) -> int:
        write_bytes(self, content[: len(content) // 2])
        time.sleep(SLOW)
        return write_bytes(self, content)

    def slow_text(self: Path, content: str, **options: Any) -> int:
        write_text(self, content[: len(content) // 2], **options)
        time.sleep(SLOW)
        return write_text(self, content, **options)

    Path.write_bytes, Path.write_text = slow_bytes, slow_text  # type: ignore[method-assign]


def train(digits: Dataset, rank: int, folder: Path, final: Path) -> None:
    """From the newest whole checkpoint to the end, a checkpoint a step."""
    model = net()
    model(torch.zeros(2, *digits.input_shape))  # the lazy layer's shape
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    state = start(model, HardLabels(), digits, RECIPE)
    for problem in load_checkpoint(folder, state):
        tell("damaged", rank, problem.replace("\n", " "))
    for step in steps(state, digits):
        if rank == 0:
            tell("save", rank, step.number)
            save_checkpoint(folder, state)
            tell("saved", rank, step.number)
    if rank == 0:
        with replacing(final) as temp:
            write_tensors(everything(state), temp)


def child(digits: Dataset, job: dict[str, Any], rank: int) -> int:
    try:
        if job["ranks"] > 1:
            from aerogel.train.distributed import join

            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
            os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            join()
        write_slowly()
        train(digits, rank, Path(job["folder"]), Path(job["final"]))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def warm() -> None:
    """What PyTorch imports at the first step of an optimizer. No backward pass: autograd does not survive a fork."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


def main() -> None:
    torch.set_num_threads(1)
    warm()
    digits = data.load("digits")
    tell("ready")
    for line in sys.stdin:
        job = json.loads(line)
        ranks: dict[int, int] = {}
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                os._exit(child(digits, job, rank))
            ranks[pid] = rank
            tell("child", rank, pid)
        while ranks:
            pid, status = os.wait()
            tell("exit", ranks.pop(pid), os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
