"""Saved models: a folder with config.json and model.safetensors, and nothing that runs code when it is read.

config.json: format version (2 where `aerogel.sparse` coded the weights, else 1), the network's name and arguments (or
the user's factory, as text), the input's shape and normalisation, the shapes, and the numbers that modules hold of
them, which differ from the freshly built network, metrics, sha256 of the weights.
Loading builds the network, gives it the saved shapes, checks every tensor and puts it in. A user's factory is
imported only when the caller passes it again, or says `trust`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.files import new_folder, read_json, refuse_device, sha256, write_json
from aerogel.graph import tensor_names
from aerogel.graph.resize import changed_numbers, resize, set_numbers
from aerogel.imports import import_factory, one_line, user_error
from aerogel.sparse import files as sparse_files
from aerogel.sparse.codec import Header
from aerogel.sparse.files import Coded

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMATS = {None: 1, "sparse": 2}  # by coding: one that does not know a coding refuses it by its number
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # a weight may be saved as any of these


Whole = Annotated[int, Field(gt=0, strict=True)]


class InputSpec(BaseModel):
    """What the network reads: uint8 images (C, H, W) scaled to [0, 1], then (x - mean) / std by channel.

    One mean or std stands for all channels.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)

    @model_validator(mode="after")
    def _by_channel(self) -> InputSpec:
        channels = self.shape[0]
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ValueError(f"mean and std must have one value or {channels}, one a channel")
        self.mean = self.mean if len(self.mean) == channels else self.mean * channels
        self.std = self.std if len(self.std) == channels else self.std * channels
        return self


class Config(BaseModel):
    """config.json. Either `net` with `args`, or `factory`, says how the network is built."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    coding: Literal["sparse"] | None = None
    net: str | None = None
    args: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    factory: str | None = None
    input: InputSpec | None = None
    classes: list[str] = Field(default_factory=list)
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    numbers: dict[str, Whole | list[Whole]] = Field(default_factory=dict)
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
    sparse: bool = False,
) -> Path:
    """Writes config.json and model.safetensors into a new folder, whole or not at all.

    factory: "file.py:build" or "package.module:build", for a network that `aerogel.nets.build` did not make. It is
    called once, to check that it builds this network. input: None takes what `aerogel.nets.load_weights` noted.
    sparse: codes the weights so that zeros cost almost nothing and shared values a few bits; every bit comes back.
    Raises AerogelError when the folder exists, the disk is full, or nothing builds the network again.
    """
    built_by = {"factory": factory} if factory is not None else spec_of(model)
    if built_by is None:
        raise AerogelError(
            f"save: nothing says how to build {type(model).__name__} again; "
            "pass factory='file.py:function', or build it with aerogel.nets.build"
        )
    input = input or input_of_checkpoint(model)
    try:
        known = {"input": input, "classes": list(classes), "metrics": dict(metrics or {})}
        config = Config.model_validate(built_by | known)
    except ValidationError as error:
        raise AerogelError(f"save: {_first(error)}; a saved model holds plain numbers and texts") from error
    base = _fresh("save", config, import_factory(factory) if factory is not None else None)
    own, tensors = _tensors(base), _tensors(model)
    _check_unshared(tensors)
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise AerogelError(
            f"save: {factory or config.net} builds another network than this one: they differ in {odd[0]}"
        )
    config.shapes = {name: list(t.shape) for name, t in tensors.items() if t.shape != own[name].shape}
    check_fit("save", own, tensors, config.shapes)
    resized = resize(base, {name: torch.empty(shape, device="meta") for name, shape in config.shapes.items()})
    if config.shapes:  # of a network that was not cut, numbers that moved are its own affair
        numbers = {name: list(n) if isinstance(n, tuple) else n for name, n in changed_numbers(base, model).items()}
        config.numbers = {name: n for name, n in numbers.items() if min(n if isinstance(n, list) else [n]) > 0}
        set_numbers(base, config.numbers)
    _check_same_modules(factory or config.net, resized, model)
    with new_folder(Path(folder), "save") as temp:
        config.coding = "sparse" if sparse else None
        config.format = FORMATS[config.coding]
        (sparse_files.write if sparse else write_tensors)(tensors, temp / WEIGHTS)
        config.sha256 = sha256(temp / WEIGHTS)
        empty = None if config.numbers else {"numbers"}
        write_json(temp / CONFIG, config.model_dump(exclude_none=True, exclude=empty))
    return Path(folder)


def load(folder: str | Path, *, factory: Callable[[], nn.Module] | None = None, trust: bool = False) -> nn.Module:
    """The saved network, in eval mode. Never unpickles; imports no code named in the file unless `trust`.

    factory: the callable that built the user's own network. trust: import the one that config.json names.
    Raises AerogelError naming the file and what is wrong with it.
    """
    config, path = read_config(folder), Path(folder) / WEIGHTS
    if config.net is None and factory is None:
        if not trust:
            raise AerogelError(
                f"load: {folder} was built by {config.factory!r}, which is code; "
                "pass that factory, or --trust to import it"
            )
        factory = import_factory(config.factory or "")
    tensors = _verified(path, config)
    model = _fresh(f"load: {Path(folder) / CONFIG}", config, factory)
    check_fit(f"load: {path}", _tensors(model), tensors, config.shapes)
    resize(model, _decoded(tensors))
    try:
        set_numbers(model, config.numbers)
    except AerogelError as error:
        raise AerogelError(f"load: {Path(folder) / CONFIG}: {error}") from error
    return model.eval()


def read_config(folder: str | Path) -> Config:
    """config.json of a saved folder, checked. Raises AerogelError naming the file and the field."""
    path = Path(folder) / CONFIG
    raw = read_json(path)
    known = list(FORMATS.values())
    if isinstance(raw, dict) and raw.get("format") not in known:
        rule = f"this aerogel reads formats {' and '.join(map(str, known))}, so update aerogel"
        raise AerogelError(f"{path} has format {raw.get('format')!r}; {rule}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise AerogelError(f"{path}: {_first(error)}; it is corrupt or not a saved model") from error
    if config.format != FORMATS[config.coding]:
        raise AerogelError(f"{path}: format {config.format} and coding {config.coding} disagree; it is corrupt")
    if (config.net is None) == (config.factory is None):
        raise AerogelError(f"{path} must name either a net or a factory; it is corrupt or not a saved model")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file. Raises AerogelError when it is absent or corrupt."""
    try:
        refuse_device(path)
        # Cloned, because what load_file gives is the mapped file itself: it would change when the file does.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        reason = one_line(error) if os.path.exists(path) else "no such file"
        raise AerogelError(f"cannot read {path}: {reason}; it is absent, corrupt or not safetensors") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a .safetensors file. Raises OSError when the disk is full or the folder cannot be written."""
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    path.write_bytes(safetensors.torch.save(plain, metadata={"format": "pt"}))  # save_file would make it mode 600


def load_weights(model: nn.Module, source: str | Path) -> nn.Module:
    """Puts the weights of a saved folder, a .safetensors file or a .pt/.pth state dict into `model`, in place.

    Every name and shape must fit; number types become the model's. A .pt file is read by weights_only, which runs no
    code of its own. Raises AerogelError naming the first tensor that is missing, left over or of another shape.
    """
    path, caller = Path(source), f"--weights {source}"
    tensors = _verified(path / WEIGHTS, read_config(path)) if path.is_dir() else _state(path, nested=False)
    own, names = _tensors(model), tensor_names(model)
    first = {key: names[id(tensor)] for key, tensor in model.state_dict(keep_vars=True).items()}
    if isinstance(tensors, Coded):  # before anything is allotted
        headers: dict[str, Header] = {}
        for key, header in tensors.items():
            if headers.setdefault(name := first.get(key, key), header) != header:
                raise AerogelError(_tied_differ(caller, name, key))
        check_fit(caller, own, headers)
    found: dict[str, Tensor] = {}
    for key, tensor in _decoded(tensors).items():
        name = first.get(key, key)
        if name in found and not torch.equal(found[name], tensor):
            raise AerogelError(_tied_differ(caller, name, key))
        found[name] = tensor
    check_fit(caller, own, found)
    return resize(model, {name: tensor.to(own[name]) for name, tensor in found.items()})


def _tied_differ(caller: str, name: str, key: str) -> str:
    return f"{caller}: {name!r} and {key!r} are one tensor in the network, and differ in the file"


def read_state(path: Path, *, nested: bool = False) -> dict[str, Tensor]:
    """A .safetensors file, or a .pt/.pth/.pth.tar state dict by weights_only. Raises AerogelError naming the file.

    nested: it may lie under "state_dict" beside other things, as training scripts write it.
    """
    return _decoded(_state(path, nested))


def check_fit(
    caller: str,
    own: Mapping[str, Tensor],
    got: Mapping[str, Tensor] | Mapping[str, Header],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Raises AerogelError naming the first tensor that is missing, left over, or of another shape or type.

    own: the network's. shapes: those that differ from its own, with as many dimensions.
    """
    shapes = shapes or {}
    for name in shapes:
        if name not in own or len(shapes[name]) != own[name].ndim:
            raise AerogelError(f"{caller}: the table of shapes has {name!r} {tuple(shapes[name])}, the network has not")
    for name, tensor in own.items():
        shape = tuple(shapes.get(name, tensor.shape))
        if name not in got:
            raise AerogelError(
                f"{caller}: the network needs {name} {shape}, which is missing; is it another network's?"
            )
        given = got[name]
        if tuple(given.shape) != shape:
            raise AerogelError(
                f"{caller}: {name} has shape {tuple(given.shape)}, the network needs {shape}; "
                "is it another network's, or a cut one's?"
            )
        if given.dtype != tensor.dtype and not (given.dtype in FLOATS and tensor.dtype in FLOATS):
            raise AerogelError(
                f"{caller}: {name} holds {given.dtype}, the network needs {tensor.dtype}; is it corrupt?"
            )
    if left := sorted(got.keys() - own.keys()):
        raise AerogelError(f"{caller}: {left[0]!r} is left over, the network lacks it; is it another network's?")


def spec_of(model: nn.Module) -> dict[str, Any] | None:
    """{"net": name, "args": {...}} of a network that `aerogel.nets.build` made, else None."""
    spec = getattr(model, "spec", None)
    return spec if isinstance(spec, dict) and spec.keys() == {"net", "args"} else None


def input_of_checkpoint(model: nn.Module) -> InputSpec | None:
    """What the network's public checkpoint was trained to read, as `aerogel.nets.load_weights` noted it."""
    noted, spec = getattr(model, "preprocessing", None), spec_of(model)
    if not isinstance(noted, dict) or spec is None:
        return None
    args = spec["args"]
    if args["in_channels"] != len(noted["mean"]):
        return None
    return InputSpec(shape=(args["in_channels"], args["input_size"], args["input_size"]), **noted)


def _verified(path: Path, config: Config) -> dict[str, Tensor] | Coded:
    """The tensors of a saved folder. Raises AerogelError when a byte is not as it was written."""
    tensors = sparse_files.read(path) if config.coding else read_tensors(path)
    if sha256(path) != config.sha256:
        raise AerogelError(f"load: {path} does not match the sha256 in {CONFIG}; it is corrupt or was replaced")
    return tensors


def _state(path: Path, nested: bool) -> dict[str, Tensor] | Coded:
    if path.name.endswith((".pt", ".pth", ".pth.tar")):
        return _read_torch(path, nested)
    return sparse_files.read(path) if sparse_files.is_sparse(path) else read_tensors(path)


def _decoded(tensors: dict[str, Tensor] | Coded) -> dict[str, Tensor]:
    return tensors.decode() if isinstance(tensors, Coded) else tensors


def _read_torch(path: Path, nested: bool) -> dict[str, Tensor]:
    try:
        refuse_device(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything for a file that is not its own
        reason = "no such file" if not os.path.exists(path) else "it is corrupt or holds more than plain tensors"
        raise AerogelError(f"cannot read {path}: {reason}; save a state_dict, best as .safetensors") from error
    if nested and isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise AerogelError(f"{path} is not a state_dict of tensors; save model.state_dict(), best as .safetensors")
    return state


def _fresh(caller: str, config: Config, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """The network as built. Ours on the meta device: nothing is allotted; a user's may hold tensors of its own."""
    try:
        with torch.random.fork_rng(devices=[]):  # what the caller draws next does not depend on our building
            if factory is not None:
                return call_factory(factory, config.factory or str(getattr(factory, "__name__", "factory")))
            with torch.device("meta"), _Unfilled():
                return nets.build(config.net or "", **config.args)
    except AerogelError as error:
        raise AerogelError(f"{caller}: {error}") from error
    except Exception as error:  # numbers from a file may be too large for anything
        raise AerogelError(f"{caller}: {config.net} cannot be built with {config.args}: {one_line(error)}") from error


class _Unfilled(TorchFunctionMode):
    """Skips initialisation: the meta device holds no numbers, yet the first fill there costs PyTorch two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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
    names, found = tensor_names(model), {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in names:
            raise AerogelError(f"{key!r} of {type(model).__name__} is neither a parameter nor a buffer; make it one")
        found[names[id(tensor)]] = tensor
    return found


def _check_unshared(tensors: Mapping[str, Tensor]) -> None:
    """Raises AerogelError for two tensors in the same memory: loading would part them."""
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise AerogelError(f"save: {one} and {other} share memory; tie them as one Parameter, a.weight = b.weight")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one after its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _check_same_modules(what: str | None, built: nn.Module, model: nn.Module) -> None:
    """Raises AerogelError naming the first layer that `what` builds otherwise: it would load as another network."""
    ours, theirs = (
        {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in one.named_modules()} for one in (model, built)
    )
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise AerogelError(
                f"save: {what} builds another network than this one: {name or 'it'} is {ours.get(name)}, "
                f"built as {theirs.get(name)}; pass a factory that builds it so"
            )


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'!r}: {one_line(ValueError(first['msg']))}"
