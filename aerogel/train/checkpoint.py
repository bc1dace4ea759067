"""Checkpoints: a folder a step, safetensors and JSON with a sha256 manifest, written whole or not at all.

model, average, objective: parameters and buffers (.safetensors each). optimizer.safetensors: its memory.
random.safetensors: the global generators of torch, its CUDA devices, numpy and python; the loop's own draws follow from
(seed, step). state.json: the step, from which schedule and place in the data follow, the recipe, the score, and what
modules keep by `get_extra_state`. MANIFEST.json: the sha256 of every other file, and of that list. Nothing is ever
pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from torch import Size, Tensor, dtype, nn

from aerogel.errors import AerogelError
from aerogel.export.saved import read_tensors, write_tensors
from aerogel.files import check_free, new_folder, read_json, sha256, write_json
from aerogel.graph import tensor_names
from aerogel.train.random_state import random_tensors, restore_random
from aerogel.train.recipe import Recipe
from aerogel.train.steps import State, optimizer_tensors, restore_optimizer

MANIFEST, STATE, OPTIMIZER, RANDOM = "MANIFEST.json", "state.json", "optimizer.safetensors", "random.safetensors"
KEEP = 2
ROOM = 2.2  # checkpoints that must fit on the disk before training starts: two, and what surrounds them
SLOTS = {"adamw": 2, "sgd": 1}  # numbers an optimizer keeps for each weight


def check_room(folder: Path, state: State) -> None:
    """Raises AerogelError, before anything is trained, unless 2.2 checkpoints fit on the disk of `folder`.

    Those that lie there already count. It raises too where nothing can be written. `folder` need not exist.
    """
    one = checkpoint_bytes(state)
    held = sum(file.stat().st_size for path in _steps(folder) for file in path.iterdir())
    check_free(folder, round(max(ROOM * one - held, (ROOM - 1) * one)), f"checkpoints of {one / 2**20:.1f} MiB each")


def save_checkpoint(
    folder: Path, state: State, *, keep: int = KEEP, best: float | None = None, within: Path | None = None
) -> Path:
    """Writes `folder`/step_NNNNNNN and removes all but the newest `keep` and the best one.

    best: this step's score, finite, higher is better; it is kept with the checkpoint, and of all scored ones in the
    folder that of the highest score stays (`best_checkpoint`). within: the run's folder; it is never made again.
    Raises AerogelError when it cannot be written (earlier ones are then as they were), and when the folder holds a
    whole checkpoint of a later step or of another run.
    """
    if keep < 1 or (best is not None and not math.isfinite(best)):
        raise AerogelError(f"checkpoint: keep must be >= 1 and best finite, got {keep=}, {best=}; give such numbers")
    if within is not None and not within.is_dir():
        raise AerogelError(f"checkpoint: {within} has vanished during the run; bring it back, or start a new run")
    target = folder / f"step_{state.step:07d}"
    for path in _steps(folder):
        if _number(path) < state.step:
            continue
        if damage(path):  # skipped on loading, and passed again now
            shutil.rmtree(path, ignore_errors=True)
        elif path != target or read_json(path / STATE)["run"] != _run(state):
            raise AerogelError(
                f"checkpoint: {path} is later than step {state.step} or another run's; resume or move it"
            )
    if target.exists() and best is not None and best != _score(target):  # saved before it was scored
        shutil.rmtree(target)
    if not target.exists():
        _write(target, state, best)
    unfinished = folder.glob(".step_*.tmp")  # of a run that was killed while it wrote
    for old in [*_steps(folder)[:-keep], *unfinished]:
        if old != best_checkpoint(folder):
            _remove(old)
    return target


def _remove(old: Path) -> None:
    """Out of sight first: a run that is killed meanwhile leaves no checkpoint of which a part is missing."""
    hidden = old.with_name(f".{old.name}.gone.tmp") if old.name[0] != "." else old
    with contextlib.suppress(OSError):
        old.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest score, the first of equals; None where none was scored."""
    return next(iter(_by_score(folder)), None)


def load_checkpoint(folder: Path, state: State, *, best: bool = False) -> list[str]:
    """Puts the newest checkpoint that is whole into `state`; returns what was wrong with those skipped.

    best: the one of the highest score instead, and the next best where that is damaged; only scored ones are read.

    A folder without checkpoints leaves the state at its start. Raises AerogelError when there are some and none is
    whole, or when they are of another recipe, data set or network; the state is then as it was.
    """
    for gone in folder.glob(".step_*.gone.tmp"):  # of a run that was killed while it removed them
        shutil.rmtree(gone, ignore_errors=True)
    problems: list[str] = []
    for path in _by_score(folder) if best else reversed(_steps(folder)):
        problem = damage(path)
        if problem is None:
            _restore(path, state)
            return problems
        problems.append(problem)
    if problems:
        raise AerogelError(f"resume: no checkpoint in {folder} is whole: {'; '.join(problems)}")
    return problems


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every file is as it was written."""
    try:
        held = read_json(path / MANIFEST)
        manifest = held.get("files") if isinstance(held, dict) else None
        if not isinstance(manifest, dict) or STATE not in manifest or held.get("sha256") != _digest(manifest):
            return f"{path / MANIFEST} is corrupt"
        files = {file.name for file in path.iterdir()} - {MANIFEST}
        if odd := sorted(manifest.keys() ^ files):
            return f"{path / odd[0]} is {'not in the manifest' if odd[0] in files else 'missing'}"
        for name, digest in manifest.items():
            if sha256(path / name) != digest:
                return f"{path / name} is corrupt"
    except (AerogelError, OSError) as error:
        return str(error)
    return None


def _restore(path: Path, state: State) -> None:
    held, own = read_json(path / STATE), _run(state)
    theirs = {**Recipe().model_dump(mode="json"), **held["run"]}  # an older one lacks what has come since
    changed = [f"{key} {theirs.get(key)}, now {value}" for key, value in own.items() if theirs.get(key) != value]
    if changed:
        raise AerogelError(f"resume: {path} is of another recipe or data set ({'; '.join(changed)}); start a new run")
    modules = {name: _tensors(module) for name, module in _modules(state).items()}
    saved = {name: read_tensors(path / name) for name in modules}
    for name, tensors in modules.items():
        if _types(tensors) != _types(saved[name]):
            raise AerogelError(
                f"resume: {path / name} is of another network than {type(state.model).__name__}; start a new run"
            )
    for name, tensors in modules.items():
        for key, tensor in tensors.items():
            tensor.copy_(saved[name][key])  # in place: the optimizer goes on holding the same parameters
    set_extras(state, held.get("extras", {}))
    restore_optimizer(state, read_tensors(path / OPTIMIZER))
    restore_random(read_tensors(path / RANDOM))
    state.set_numbers(held.get("numbers", {}))
    state.step = held["step"]


def _write(target: Path, state: State, best: float | None) -> None:
    try:
        with new_folder(target, "checkpoint") as temp:
            for name, module in _modules(state).items():
                write_tensors(_tensors(module), temp / name)
            write_tensors(optimizer_tensors(state), temp / OPTIMIZER)
            write_tensors(random_tensors(), temp / RANDOM)
            write_json(temp / STATE, {"step": state.step, "score": best, "run": _run(state), "extras": extras_of(state),
                                       "numbers": state.numbers()})  # fmt: skip
            files = {file.name: sha256(file) for file in sorted(temp.iterdir())}
            write_json(temp / MANIFEST, {"files": files, "sha256": _digest(files)})
    except AerogelError as error:
        whole = next((path for path in reversed(_steps(target.parent)) if damage(path) is None), None)
        kept = f"the checkpoint before, {whole}, is intact" if whole else "there is no checkpoint before it"
        raise AerogelError(f"{error}; {kept}") from error


def _by_score(folder: Path) -> list[Path]:
    """Scored checkpoints, the best first, the earlier of equals first."""
    scored = [(score, path) for path in _steps(folder) if (score := _score(path)) is not None]
    return [path for _, path in sorted(scored, key=lambda pair: -pair[0])]


def _score(path: Path) -> float | None:
    """None where it was not scored, or cannot be read."""
    try:
        held = read_json(path / STATE)
    except AerogelError:
        return None
    score = held.get("score") if isinstance(held, dict) else None
    return score if isinstance(score, float | int) else None


def checkpoint_bytes(state: State) -> int:
    """About how large a checkpoint is once the optimizer has its memory."""
    tensors = [tensor for module in _modules(state).values() for tensor in _tensors(module).values()]
    weights = [p for group in state.optimizer.param_groups for p in group["params"]]
    return sum(t.nbytes for t in tensors) + SLOTS[state.recipe.optimizer] * sum(p.nbytes for p in weights) + 2**16


def _digest(files: dict[str, Any]) -> str:
    """Of a manifest's own content: a bit that flips in it accuses no other file."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _run(state: State) -> dict[str, Any]:
    """What must be the same for a run to continue exactly."""
    recipe = state.recipe.model_dump(mode="json", exclude={"workers"})
    return {**recipe, "steps_per_epoch": state.steps_per_epoch}


def _modules(state: State) -> dict[str, nn.Module]:
    """What holds trained tensors, by the file they go to."""
    found = {"model": state.model, "average": state.average, "objective": state.objective}
    return {f"{name}.safetensors": module for name, module in found.items() if isinstance(module, nn.Module)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those a state dict leaves out; tied ones once."""
    names = tensor_names(module)
    return {names[id(t)]: t.detach() for t in [*module.parameters(), *module.buffers()]}


def extras_of(state: State) -> dict[str, Any]:
    """{file: {module: what it keeps beside tensors}}, by PyTorch's own hook; JSON must be able to hold it."""
    found = {
        file: {name: part.get_extra_state() for name, part in module.named_modules() if _has_extra(part)}
        for file, module in _modules(state).items()
    }
    return {file: held for file, held in found.items() if held}


def set_extras(state: State, extras: dict[str, Any]) -> None:
    """Puts back what `extras_of` gave."""
    for file, module in _modules(state).items():
        for name, extra in extras.get(file, {}).items():
            module.get_submodule(name).set_extra_state(extra)


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def tensors_of(state: State) -> dict[tuple[str, str], Tensor]:
    """{(file, name): tensor} of all modules of the state, themselves and not copies."""
    return {(file, name): t for file, module in _modules(state).items() for name, t in _tensors(module).items()}


def _types(tensors: dict[str, Tensor]) -> dict[str, tuple[Size, dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, the newest last."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), key=_number)


def _number(path: Path) -> int:
    return int(path.name[5:])
