"""MODEL as a user types it: a zoo network, a saved folder, one of Hugging Face's, or the user's own factory."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import AerogelError, nearest
from aerogel.export.hf import PREFIX, hf_inputs, open_hf, parse_size
from aerogel.export.saved import (
    CONFIG,
    InputSpec,
    call_factory,
    input_of_checkpoint,
    load,
    load_weights,
    read_config,
    read_state,
    spec_of,
)
from aerogel.files import read_json
from aerogel.imports import import_factory, one_line


@dataclass(frozen=True)
class Opened:
    """A network and what is known of it. factory: the text of the user's own factory, None for a zoo network."""

    model: nn.Module
    factory: str | None
    trained: bool  # it came with weights
    input: InputSpec | None = None
    weightless: bool = False  # it lies on the meta device: it can be counted, not run


def open_model(
    text: str,
    *,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    trust: bool = False,
    counting: bool = False,
) -> Opened:
    """Builds or loads what `text` names.

    "lenet5", "mobilenet_v2:width=0.5" (input_shape and num_classes fill in what the text leaves open),
    a saved folder, "file.py:build" or "package.module:build".
    weights: a saved folder, a file, or SOURCE:FILE for another library's checkpoint (`split_source`), whose
    preprocessing becomes the input's; where timm's own config.json lies beside FILE, that says it.
    A name of the zoo means the zoo, also where a folder has that name: write ./lenet5 for the folder.
    "hf:vit", "hf:config.json" (`aerogel.export.hf`): a network without weights, and only for a caller that does no more
    than count it, and says so by `counting`.
    Raises AerogelError for an unknown name, arguments that contradict the data, or weights that do not fit.
    """
    name, colon, rest = text.partition(":")
    if text.startswith(PREFIX):
        return _from_hugging_face(text, weights, counting)
    if name in nets.NETS:
        opened = Opened(_from_zoo(text, input_shape, num_classes), None, False)
    elif os.path.isdir(text):
        opened = _from_folder(text, trust)
    elif colon and "=" not in rest:
        opened = Opened(call_factory(import_factory(text), text), text, False)
    else:
        raise AerogelError(
            f"model {text!r} is no net and no folder; {nearest(name, nets.NETS)}; "
            "your own is file.py:factory or package.module:factory"
        )
    if weights is None:
        return opened
    source, file = split_source(weights)
    if source is None:
        load_weights(opened.model, file)
        return replace(opened, trained=True)
    cfg = _pretrained_cfg(source, Path(file))
    nets.load_weights(opened.model, read_state(Path(file), nested=True), source, **cfg)
    return replace(opened, trained=True, input=input_of_checkpoint(opened.model))


def split_source(weights: str) -> tuple[str | None, str]:
    """("timm", "model.pt") of "timm:model.pt", for the sources of aerogel.nets; (None, the text) of a path.

    A file whose name begins so is written ./timm:model.pt. Raises AerogelError for a source without a file, and for
    another word before the colon unless there is a file of that name; a single letter is a drive.
    """
    source, colon, file = weights.partition(":")
    known = ", ".join(nets.SOURCES)
    if colon and source in nets.SOURCES:
        if not file:
            raise AerogelError(f"--weights {weights} names no file; write {source}:model.safetensors")
        return source, file
    if colon and re.fullmatch(r"\w\w+", source) and not os.path.exists(weights):
        raise AerogelError(
            f"--weights {weights}: {source!r} is no source, and there is no file of that name; sources: {known}"
        )
    return None, weights


def _pretrained_cfg(source: str, file: Path) -> dict[str, Any]:
    """mean and std of timm's own config.json beside the weights; nothing when there is none.

    Raises AerogelError when it says that the file belongs to the other of timm and timm_tf: their keys are the same.
    """
    path = file.parent / CONFIG
    if not source.startswith("timm") or not path.exists():
        return {}
    found = read_json(path)
    held = found.get("pretrained_cfg") if isinstance(found, dict) else None
    if not isinstance(held, dict):
        return {}  # another config.json
    name = str(found.get("architecture", ""))
    right = "timm_tf" if name.startswith("tf_") else "timm"
    if name and right != source:
        raise AerogelError(f"--weights {source}:{file}: {path} calls it {name}; write {right}:{file}")
    return {key: held[key] for key in ("mean", "std") if key in held}


def _from_hugging_face(text: str, weights: str | None, counting: bool) -> Opened:
    if weights is not None or not counting:
        what = "takes no --weights" if weights is not None else "has no weights"
        raise AerogelError(
            f"model {text!r} {what}: an architecture of Hugging Face's can be counted, by `aerogel cost`; "
            "to train or cut it, write a file.py:factory that returns it"
        )
    return Opened(open_hf(text), None, False, weightless=True)


def saved_folder(source: str | Path) -> Path | None:
    """The saved folder that these words are, or that a run folder has as its result."""
    return next((path for path in (Path(source), Path(source) / "model") if (path / CONFIG).is_file()), None)


def _from_folder(text: str, trust: bool) -> Opened:
    folder = saved_folder(text) or text
    config = read_config(folder)
    return Opened(load(folder, trust=trust), config.factory, True, config.input)


def _from_zoo(text: str, input_shape: tuple[int, int, int] | None, num_classes: int | None) -> nn.Module:
    name, args = nets.parse(text)
    known: dict[str, Any] = {}
    if input_shape is not None:
        channels, height, width = input_shape
        if height != width:
            raise AerogelError(
                f"model {text!r} reads square images, the data's are {height} x {width}; pass --input C,S,S"
            )
        known = {"in_channels": channels, "input_size": height}
    if num_classes is not None:
        known["num_classes"] = num_classes
    takes = inspect.signature(nets.NETS[name]).parameters
    known = {key: value for key, value in known.items() if key in takes}
    for key, value in known.items():
        if args.get(key, value) != value:
            raise AerogelError(f"model {text!r}: {key} must be {value} for this data, got {args[key]}; leave it out")
    try:
        return nets.build(name, **(known | args))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that this machine cannot hold
        raise AerogelError(f"model {text!r} cannot be built: {one_line(error)}; give smaller numbers") from error


def open_counted(
    text: str, given: str | None, weights: str | None, trust: bool
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """MODEL to be counted, as a user types it, with its example inputs; given: what was typed for --input."""
    shape = None if text.startswith(PREFIX) else parse_size(given)
    opened = open_model(text, input_shape=shape, weights=weights, trust=trust, counting=True)
    return opened.model, *example_inputs(opened, given)


def example_inputs(opened: Opened, given: str | None = None) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """args and kwargs to call an opened network with: zeros, a batch of one, on the network's device.

    given: --input as the user typed it: C,H,W, or for `hf:` text a number of tokens. None: what the network says it
    takes. Raises AerogelError where that is malformed, or nobody says.
    """
    if opened.weightless:
        return (), hf_inputs(opened.model, given)
    shape = parse_size(given) or input_of(opened.model, opened.input)
    device = next((tensor.device for tensor in opened.model.parameters()), None)
    return (torch.zeros(1, *shape, device=device),), {}


def input_of(model: nn.Module, known: InputSpec | None = None) -> tuple[int, int, int]:
    """(C, H, W) that a network says it takes. Raises AerogelError when only the user knows."""
    if known is not None:
        return known.shape
    args = (spec_of(model) or {}).get("args", {})
    if "input_size" not in args:
        raise AerogelError(f"--input C,H,W is needed: nothing says which input {type(model).__name__} takes")
    return args["in_channels"], args["input_size"], args["input_size"]
