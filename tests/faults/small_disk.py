"""What `test_full_disk` runs in a mount namespace of its own: a disk of 8 MiB that fills, then turns read-only.

python small_disk.py FOLDER     (prints one JSON object)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import aerogel as ag
from aerogel.errors import AerogelError
from aerogel.train import HardLabels, Recipe, State, load_checkpoint, save_checkpoint, start, steps
from aerogel.train.checkpoint import check_room, damage

MIB = 2**20


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def begin(name: str = "lenet_300_100") -> State:  # 2.1 MiB a checkpoint: weights and momentum
    return start(ag.nets.build(name), HardLabels(), DATA, Recipe(epochs=1, batch_size=128, augment="none"))


def told(action: object, *arguments: object) -> str:
    """What it says that cannot be done; empty where it is done."""
    try:
        action(*arguments)  # type: ignore[operator]
    except AerogelError as error:
        return str(error)
    return ""


DATA = ag.data.load("digits")


def main(disk: Path) -> None:
    mount("-t", "tmpfs", "-o", f"size={8 * MIB}", "none", str(disk))
    found: dict[str, object] = {}
    run, state = disk / "run", begin()
    going = steps(state, DATA)
    next(going)
    found["room for two"] = told(check_room, run, state)
    save_checkpoint(run, state)
    (first,) = run.iterdir()
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(5 * MIB))
    next(going)
    found["full"] = told(save_checkpoint, run, state)
    found["left when full"] = sorted(path.name for path in run.iterdir())
    found["first when full"] = damage(first)
    found["room when full"] = told(check_room, run, state)
    ballast.unlink()
    mount("-o", "remount,ro", str(disk))
    found["read-only"] = told(save_checkpoint, run, state)
    found["room when read-only"] = told(check_room, run, state)
    mount("-o", "remount,rw", str(disk))
    again = begin()
    found["damage"] = load_checkpoint(run, again)
    next(steps(again, DATA))
    found["same after"] = all(
        bool((ours == theirs).all())
        for ours, theirs in zip(state.model.parameters(), again.model.parameters(), strict=True)
    )
    save_checkpoint(run, again)
    found["left at the end"] = sorted(path.name for path in run.iterdir())
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
