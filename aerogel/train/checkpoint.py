"""Checkpoints: a folder a step, safetensors and JSON with a sha256 manifest, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.files import new_folder, read_json, sha256, write_json
from aerogel.graph import tensor_names
from aerogel.train.steps import State, optimizer_tensors, restore_optimizer

MANIFEST = "MANIFEST.json"
KEEP = 2


def save_checkpoint(folder: Path, state: State) -> Path:
    """Writes `folder`/step_NNNNNNN and removes all but the newest two. Raises AerogelError when it cannot."""
    target = folder / f"step_{state.step:07d}"
    if target.exists():
        return target
    with new_folder(target, "checkpoint") as temp:
        save_file(_tensors(state.model), temp / "model.safetensors")
        save_file(optimizer_tensors(state), temp / "optimizer.safetensors")
        if state.average is not None:
            save_file(_tensors(state.average), temp / "average.safetensors")
        if isinstance(state.objective, nn.Module):
            save_file(_tensors(state.objective), temp / "objective.safetensors")
        write_json(temp / "state.json", {"step": state.step, "recipe": state.recipe.model_dump()})
        write_json(temp / MANIFEST, {file.name: sha256(file) for file in sorted(temp.iterdir())})
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, state: State) -> list[str]:
    """Puts the newest checkpoint that is whole into `state`; returns what was wrong with those skipped.

    A folder without checkpoints leaves the state at its start. Raises AerogelError when there are some and none is
    whole, or when they are another recipe's.
    """
    problems = []
    for path in reversed(_steps(folder)):
        problem = damage(path)
        if problem:
            problems.append(problem)
            continue
        held = read_json(path / "state.json")
        if held["recipe"] != state.recipe.model_dump(mode="json"):
            raise AerogelError(f"resume: {path} belongs to another recipe; start a new run")
        _put(state.model, load_file(path / "model.safetensors"))
        restore_optimizer(state, load_file(path / "optimizer.safetensors"))
        if state.average is not None:
            _put(state.average, load_file(path / "average.safetensors"))
        if isinstance(state.objective, nn.Module):
            _put(state.objective, load_file(path / "objective.safetensors"))
        state.step = held["step"]
        return problems
    if problems:
        raise AerogelError(f"resume: no checkpoint in {folder} is whole: {'; '.join(problems)}")
    return problems


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every byte is as written."""
    try:
        manifest = read_json(path / MANIFEST)
        for name, digest in manifest.items():
            if sha256(path / name) != digest:
                return f"{path / name} is corrupt"
    except (AerogelError, OSError, AttributeError) as error:
        return f"{path}: {error}"
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    names = tensor_names(module)
    return {names[id(t)]: t.detach().contiguous() for t in [*module.parameters(), *module.buffers()]}


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies in place, so that the optimizer goes on holding the same parameters."""
    own = _tensors(module)
    if own.keys() != tensors.keys():
        raise AerogelError(f"resume: the checkpoint is another network's than {type(module).__name__}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
