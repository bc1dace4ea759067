"""Saved models: a folder with config.json and model.safetensors, and nothing that runs code when it is read.

config.json: format version, the network's name and arguments (or the user's factory, as text), the input's shape and
normalisation, the table of shapes that differ from the freshly built network, metrics, sha256 of the weights.
Loading builds the network, gives it the saved shapes, checks every tensor and puts it in. A user's factory is
imported only when the caller passes it again, or says `trust`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.files import new_folder, read_json, sha256, write_json
from aerogel.graph import tensor_names
from aerogel.graph.resize import resize
from aerogel.imports import import_factory, user_error

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class InputSpec(BaseModel):
    """What the network reads: uint8 images scaled to [0, 1], then (x - mean) / std by channel."""

    model_config = ConfigDict(extra="forbid")
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Config(BaseModel):
    """config.json. Either `net` with `args`, or `factory`, says how the network is built."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    net: str | None = None
    args: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    factory: str | None = None
    input: InputSpec | None = None
    classes: list[str] = Field(default_factory=list)
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    sha256: str = ""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    factory: str | None = None,
    input: InputSpec | None = None,
    classes: tuple[str, ...] = (),
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config.json and model.safetensors into a new folder, whole or not at all.

    factory: "file.py:build" or "package.module:build", for a network that `aerogel.nets.build` did not make.
    Raises AerogelError when the folder exists, the disk is full, or nothing says how to build the network.
    """
    spec = getattr(model, "spec", None)
    if factory is None and spec is None:
        raise AerogelError(
            f"save: nothing says how to build {type(model).__name__} again; pass factory='file.py:function' or build it with aerogel.nets.build"
        )
    config = Config(factory=factory, input=input, classes=list(classes), metrics=dict(metrics or {}))
    if factory is None:
        config.net, config.args = spec["net"], spec["args"]
    base = _tensors(_fresh(config, import_factory(factory) if factory else None))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    if set(base) != set(tensors):
        odd = sorted(set(base) ^ set(tensors))[0]
        raise AerogelError(
            f"save: {factory or config.net} builds another network than this one: they differ in {odd}"
        )
    config.shapes = {name: list(t.shape) for name, t in tensors.items() if t.shape != base[name].shape}
    with new_folder(Path(folder), "save") as temp:
        try:
            save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        config.sha256 = sha256(temp / WEIGHTS)
        write_json(temp / CONFIG, config.model_dump(exclude_none=True))
    return Path(folder)


def load(
    folder: str | Path, *, factory: Callable[[], nn.Module] | None = None, trust: bool = False
) -> nn.Module:
    """The saved network, in eval mode. Never unpickles; imports no code named in the file unless `trust`.

    factory: the callable that built the user's own network. trust: import the one that config.json names.
    Raises AerogelError naming the file and what is wrong with it.
    """
    config, path = read_config(folder), Path(folder) / WEIGHTS
    if config.net is None and factory is None:
        if not trust:
            raise AerogelError(
                f"load: {folder} was built by {config.factory!r}, which is code; pass that factory, or --trust to import it"
            )
        factory = import_factory(config.factory or "")
    tensors = read_tensors(path)
    if sha256(path) != config.sha256:
        raise AerogelError(
            f"load: {path} does not match the sha256 in {CONFIG}; it is corrupt or was replaced"
        )
    model = _fresh(config, factory)
    expected = {name: tuple(t.shape) for name, t in _tensors(model).items()}
    expected |= {name: tuple(shape) for name, shape in config.shapes.items() if name in expected}
    check_fit(f"load: {path}", expected, tensors)
    return resize(model, tensors).eval()


def read_config(folder: str | Path) -> Config:
    """config.json of a saved folder, checked. Raises AerogelError naming the file and the field."""
    path = Path(folder) / CONFIG
    raw = read_json(path)
    if isinstance(raw, dict) and raw.get("format", 1) != 1:
        raise AerogelError(
            f"{path} has format {raw['format']!r}; this aerogel reads format 1, so update aerogel"
        )
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AerogelError(f"{path}: {where}: {first['msg']}; it is corrupt or not a saved model") from error
    if (config.net is None) == (config.factory is None):
        raise AerogelError(f"{path} must name either a net or a factory; it is corrupt or not a saved model")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file. Raises AerogelError when it is absent or corrupt."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise AerogelError(
            f"cannot read {path}: {reason}; it is absent, corrupt or not safetensors"
        ) from error


def load_weights(model: nn.Module, source: str | Path) -> nn.Module:
    """Puts the weights of a saved folder, a .safetensors file or a .pt/.pth state dict into `model`, in place.

    Every name and shape must fit. A .pt file is read by weights_only, which runs no code of its own.
    Raises AerogelError naming the first tensor that is missing, left over or of another shape.
    """
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if path.suffix in (".pt", ".pth"):
        tensors = _read_torch(path)
    else:
        tensors = read_tensors(path)
    own = _tensors(model)
    aliases = {name: tensor_names(model)[id(t)] for name, t in model.state_dict(keep_vars=True).items()}
    tensors = {aliases.get(name, name): tensor for name, tensor in tensors.items()}
    check_fit(f"--weights {source}", {name: tuple(t.shape) for name, t in own.items()}, tensors)
    return resize(model, tensors)


def check_fit(caller: str, expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Tensor]) -> None:
    """Raises AerogelError naming the first tensor that is missing, left over, or of another shape."""
    for name, shape in expected.items():
        if name not in got:
            raise AerogelError(
                f"{caller}: the network needs {name} {shape}, which the file lacks; is it another network's?"
            )
        if tuple(got[name].shape) != shape:
            raise AerogelError(
                f"{caller}: {name} has shape {tuple(got[name].shape)}, the network needs {shape}; is it another network's, or a cut one's?"
            )
    left = sorted(set(got) - set(expected))
    if left:
        raise AerogelError(
            f"{caller}: the file holds {left[0]}, which the network lacks; is it another network's?"
        )


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything for a file that is not its own
        reason = "no such file" if not path.exists() else "it is corrupt or holds more than plain tensors"
        raise AerogelError(
            f"cannot read {path}: {reason}; save a state_dict, best as .safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise AerogelError(
            f"{path} is not a state_dict of tensors; save model.state_dict(), best as .safetensors"
        )
    return state


def _fresh(config: Config, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """The network as built. Ours on the meta device: nothing is allotted; a user's may hold tensors of its own."""
    if factory is None:
        with torch.device("meta"):
            return nets.build(config.net or "", **config.args)
    return call_factory(factory, config.factory or getattr(factory, "__name__", "factory"))


def call_factory(factory: Callable[..., Any], name: str) -> nn.Module:
    """The user's network. Raises AerogelError when the factory fails or returns something else."""
    try:
        model = factory()
    except Exception as error:
        raise user_error(name, error) from error
    if not isinstance(model, nn.Module):
        raise AerogelError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved: parameters and persistent buffers, tied ones once."""
    names = tensor_names(model)
    return {names[id(tensor)]: tensor for tensor in model.state_dict(keep_vars=True).values()}
