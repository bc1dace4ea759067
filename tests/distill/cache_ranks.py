"""What `test_cache` runs in one process and in two: two epochs of distillation from a cache of the teacher's answers.

python cache_ranks.py FOLDER     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them)
FOLDER/answers is the cache; FOLDER/NAME-rank0.json the losses, and how often the teacher was asked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from distil_ranks import Net, some_digits

from aerogel.data import Dataset
from aerogel.distill import Distil, Teacher, TeacherCache
from aerogel.train import Recipe, fit, join, start

RECIPE = Recipe(epochs=2, batch_size=21, warmup=0, lr=0.01, augment="none")


class Asked(Net):
    """A teacher that counts its forward passes."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(6, seed=seed)
        self.passes = self.images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes, self.images = self.passes + 1, self.images + len(x)
        return super().forward(x)


def trained(
    folder: Path | None,
    recipe: Recipe,
    data: Dataset,
    losses: dict[str, float] | None = None,
    seed: int = 1,
    **kept: Any,
) -> tuple[list[dict[str, float]], Net, Asked, TeacherCache | None]:
    """The losses of each step, the student, the teacher and the cache; live where there is no folder."""
    teacher, student, told = Asked(seed), Net(), list[dict[str, float]]()
    cache = None if folder is None else TeacherCache(folder, data, recipe, **kept)
    made = Distil(Teacher(teacher, cache=cache), losses or {"kd": 0.9, "hard": 0.1, "dist": 1.0}, 3.0)
    fit(start(student, made, data, recipe), data, on_step=lambda step: told.append(step.losses))
    return told, student, teacher, cache


def main() -> None:
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), join()
    told, _, teacher, _ = trained(folder / "answers", RECIPE, some_digits())
    found = {"losses": told, "images": teacher.images}
    (folder / f"ranks{world.ranks}-rank{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
