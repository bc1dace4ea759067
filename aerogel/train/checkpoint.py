"""Checkpoints: a folder a step, safetensors and JSON with a sha256 manifest, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.export.saved import read_tensors, write_tensors
from aerogel.files import new_folder, read_json, sha256, write_json
from aerogel.graph import tensor_names
from aerogel.train.steps import State, optimizer_tensors, restore_optimizer

MANIFEST, STATE = "MANIFEST.json", "state.json"
KEEP = 2


def save_checkpoint(folder: Path, state: State) -> Path:
    """Writes `folder`/step_NNNNNNN and removes all but the newest two. Raises AerogelError when it cannot.

    Raises AerogelError too when the folder holds a whole checkpoint of a later step or of another run.
    """
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
    if not target.exists():
        with new_folder(target, "checkpoint") as temp:
            for name, module in _modules(state).items():
                write_tensors(_tensors(module), temp / name)
            write_tensors(optimizer_tensors(state), temp / "optimizer.safetensors")
            write_json(temp / STATE, {"step": state.step, "run": _run(state)})
            write_json(temp / MANIFEST, {file.name: sha256(file) for file in sorted(temp.iterdir())})
    unfinished = folder.glob(".step_*.tmp")  # of a run that was killed while it wrote
    for old in [*_steps(folder)[:-KEEP], *unfinished]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path, state: State) -> list[str]:
    """Puts the newest checkpoint that is whole into `state`; returns what was wrong with those skipped.

    A folder without checkpoints leaves the state at its start. Raises AerogelError when there are some and none is
    whole, or when they are of another recipe, data set or network; the state is then as it was.
    """
    problems: list[str] = []
    for path in reversed(_steps(folder)):
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
        manifest = read_json(path / MANIFEST)
        if not isinstance(manifest, dict) or STATE not in manifest:
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
    changed = [
        f"{key} {held['run'].get(key)}, now {value}" for key, value in own.items() if held["run"].get(key) != value
    ]
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
    restore_optimizer(state, read_tensors(path / "optimizer.safetensors"))
    state.step = held["step"]


def _run(state: State) -> dict[str, Any]:
    """What must be the same for a run to continue exactly."""
    return {**state.recipe.model_dump(mode="json"), "steps_per_epoch": state.steps_per_epoch}


def _modules(state: State) -> dict[str, nn.Module]:
    """What holds trained tensors, by the file they go to."""
    found = {"model": state.model, "average": state.average, "objective": state.objective}
    return {f"{name}.safetensors": module for name, module in found.items() if isinstance(module, nn.Module)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those a state dict leaves out; tied ones once."""
    names = tensor_names(module)
    return {names[id(t)]: t.detach() for t in [*module.parameters(), *module.buffers()]}


def _types(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, the newest last."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), key=_number)


def _number(path: Path) -> int:
    return int(path.name[5:])
