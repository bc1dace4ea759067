"""Public checkpoints: other libraries' names for the weights of our nets, and what else a checkpoint needs.

`load_weights(net, state_dict, source="torchvision")` renames every key, checks that each fits, sets the batch-norm
constants that the checkpoint was trained with, and notes its preprocessing in `net.preprocessing`. A key that is
missing, left over or of another shape is refused by name. Nothing is downloaded: the state dict is the caller's.

torchvision  0.29: mobilenet_v2, mobilenet_v3_*, shufflenet_v2_*, mnasnet*
timm         1.0: mobilenetv1_*, mobilenetv2_*, mobilenetv3_*, mnasnet_*, semnasnet_*, without the h and d variants
timm_tf      1.0: tf_mobilenetv3_*, ported from TensorFlow: SAME padding (padding="same"), eps 1e-3, mean = std = 0.5
             (minimal: minimalistic=true). timm and timm_tf share their keys: only the name tells them apart.
megvii       ShuffleNet-Series, ShuffleNetV1 and V2: see aerogel/nets/megvii.py
timm's mnasnet_small adds a residual that Google's code does not: it would load and answer wrongly, so it has no layout.
Preprocessing is that of a library's usual checkpoint. Some have their own, which the caller passes as mean and std: of
timm's mobilenetv3_large_100 ra4 was trained with 0.5 and 0.5, miil with 0 and 1. Its mobilenetv1 all have 0.5 and 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError, nearest
from aerogel.nets import megvii
from aerogel.nets.blocks import IMAGENET_FROM

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of pixels scaled to [0, 1], RGB
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

_BLOCK = re.compile(r"features\.stage(\d+)\.block(\d+)\.(.+)")
_UNITS = ("expand", "depthwise", "se", "project")  # of an inverted residual, in order


@dataclass(frozen=True)
class Layout:
    """How one library names one net: our key -> its key, None where it has none (zeros); what its checkpoints need.

    needs: arguments the net must have been built with. adapt(net, {our key: tensor}) changes tensors in the dict.
    """

    rename: Callable[[list[str]], Mapping[str, str | None]]
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    preprocessing: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: IMAGENET)
    needs: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[nn.Module, dict[str, Tensor]], None] | None = None


def load_weights(
    net: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> nn.Module:
    """Puts another library's checkpoint into our net of the same kind, in place, and returns it.

    net: of `nets.build`; its own number type and device stay. It reads R, G, B whatever the library reads.
    state_dict: {their key: tensor}. Where every key begins with "module.", as DataParallel writes, that is left out.
    source: "torchvision", "timm", "timm_tf" or "megvii".
    mean, std: by channel, of pixels scaled to [0, 1], where the checkpoint was trained with others than its source's
    usual ones. What it reads is noted in net.preprocessing, which `aerogel.save` writes into config.json; every batch
    norm gets the checkpoint's eps and momentum, in net.spec too. Sources: see aerogel/nets/weights.py.
    Raises AerogelError for a net or source without a layout, a net built otherwise than the checkpoint needs, a mean or
    std that does not fit, and naming the first key that is missing, left over or of another shape or kind of number.
    A refusal changes nothing.
    """
    name, layout = _layout(net, source)
    given = {key: value for key, value in {"mean": mean, "std": std}.items() if value is not None}
    read = {key: _by_channel(key, value) for key, value in {**layout.preprocessing, **given}.items()}
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    own = net.state_dict()
    theirs = layout.rename(list(own))
    renamed = {ours: _fitting(name, source, ours, own[ours], key, state_dict) for ours, key in theirs.items()}
    left = sorted(set(state_dict) - set(theirs.values()))
    if left:
        raise AerogelError(f"load_weights: {left[0]!r} has no place in {name}; is it another net's checkpoint?")
    if layout.adapt:
        layout.adapt(net, renamed)
    net.load_state_dict(renamed)
    _set_norms(net, layout)
    net.preprocessing = read  # type: ignore[assignment]
    return net


def _by_channel(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """The three values as floats; raises AerogelError when they are not that, or a std is not positive."""
    rule = f"three {'numbers' if name == 'mean' else 'numbers > 0'}, for R, G and B scaled to [0, 1]"
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(math.isfinite(v) and (name == "mean" or v > 0) for v in found):
        raise AerogelError(f"load_weights: {name} must be {rule}, got {values!r}")
    return found


def _layout(net: nn.Module, source: str) -> tuple[str, Layout]:
    """The net's name and its layout; raises AerogelError where there is none, or the net is built otherwise."""
    spec = getattr(net, "spec", {})
    name = spec.get("net", type(net).__name__)
    sources = LAYOUTS.get(name, {})
    if source not in sources:
        known = ", ".join(sorted(sources)) or f"none for this net; nets with layouts: {', '.join(sorted(LAYOUTS))}"
        raise AerogelError(f"load_weights: {name} has no layout for source {source!r}; known: {known}")
    args = spec["args"]
    for argument, value in sources[source].needs.items():
        if argument == "shuffle" and args["groups"] == 1:
            continue  # there is nothing to shuffle
        if args[argument] != value:
            text = str(value).lower() if isinstance(value, bool) else value
            raise AerogelError(
                f"load_weights: a {source} checkpoint of {name} needs {argument}={value!r}, "
                f"the net has {args[argument]!r}; build it with {name}:{argument}={text}"
            )
    if args["input_size"] < IMAGENET_FROM:  # its strides are others, so it would answer otherwise
        raise AerogelError(
            f"load_weights: {name} leaves out strides below {IMAGENET_FROM} pixels, a {source} checkpoint has them; "
            f"got input_size={args['input_size']}; build it larger, as with --input 3,224,224"
        )
    return name, sources[source]


def _fitting(
    name: str, source: str, ours: str, own: Tensor, key: str | None, state_dict: Mapping[str, Tensor]
) -> Tensor:
    """The checkpoint's tensor for one of ours. Raises AerogelError when it is missing or of another shape."""
    if key is None:
        return torch.zeros_like(own)
    if key not in state_dict:
        near = nearest(key, state_dict.keys()) if state_dict else "it is empty"
        raise AerogelError(f"load_weights: the state dict lacks {key!r} ({source}'s name of {ours}); {near}")
    tensor = state_dict[key]
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() != own.is_floating_point():
        held = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise AerogelError(f"load_weights: {key!r} holds {held}, {name}'s {ours} needs {own.dtype}; is it quantised?")
    if tensor.ndim == 4 and own.ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor.flatten(1)  # a 1x1 convolution after the pool is a linear layer
    if tensor.shape != own.shape:
        raise AerogelError(
            f"load_weights: {key!r} has shape {tuple(tensor.shape)}, {name}'s {ours} needs {tuple(own.shape)}; "
            "build the net with the checkpoint's width and num_classes"
        )
    return tensor


def _set_norms(net: nn.Module, layout: Layout) -> None:
    """The constants of the checkpoint, on every batch norm and in the spec, so that a saved net keeps them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = layout.bn_eps, layout.bn_momentum
    spec = net.spec
    assert isinstance(spec, dict)
    spec["args"] |= {"bn_eps": layout.bn_eps, "bn_momentum": layout.bn_momentum}


# ---------------------------------------------------------------- torchvision


def _torchvision_inverted(inside: str, head: dict[str, str]) -> Callable[[list[str]], dict[str, str]]:
    """Blocks numbered through all stages: features.N.conv.J or features.N.block.J, units counted from 0.

    In V2 (inside = "conv") the projection is not a unit of its own: conv.J and conv.J+1.
    """

    def rename(keys: list[str]) -> dict[str, str]:
        number = {
            block: i for i, block in enumerate(dict.fromkeys(m.group(1, 2) for m in map(_parse, keys) if m), start=1)
        }
        units = _units(keys)
        fixed = {"features.stem": "features.0", "features.last": f"features.{len(number) + 1}"}
        names = {}
        for key in keys:
            match = _parse(key)
            if match is None:
                names[key] = _with_prefix(key, fixed, head)
                continue
            unit, _, rest = match[3].removeprefix("body.").partition(".")
            place = units[match.group(1, 2)].index(unit)
            path = f"features.{number[match.group(1, 2)]}.{inside}"
            if unit == "se":
                rest = rest.replace("reduce", "fc1").replace("expand", "fc2")
                names[key] = f"{path}.{place}.{rest}"
            elif unit == "project" and inside == "conv":
                part, _, leaf = rest.partition(".")
                names[key] = f"{path}.{place + (part == 'bn')}.{leaf}"
            else:
                names[key] = f"{path}.{place}.{_numbered(rest)}"
        return names

    return rename


def _torchvision_mnasnet(keys: list[str]) -> dict[str, str]:
    """layers.N: the stem and the first block lie flat, later stages hold their blocks, a block its layers."""
    names = {}
    flat = {"depthwise.conv": 3, "depthwise.bn": 4, "project.conv": 6, "project.bn": 7}
    deep = {"expand.conv": 0, "expand.bn": 1, **flat}
    fixed = {"features.stem.conv": "layers.0", "features.stem.bn": "layers.1",
             "features.last.conv": "layers.14", "features.last.bn": "layers.15"}  # fmt: skip
    for key in keys:
        match = _parse(key)
        if match is None:
            names[key] = _with_prefix(key, fixed, {"classifier.fc": "classifier.1"}, numbered=False)
            continue
        layer, _, leaf = match[3].removeprefix("body.").rpartition(".")
        stage, block = int(match[1]), int(match[2])
        if stage == 1:
            names[key] = f"layers.{flat[layer]}.{leaf}"
        else:
            names[key] = f"layers.{stage + 6}.{block - 1}.layers.{deep[layer]}.{leaf}"
    return names


def _torchvision_shufflenet_v2(keys: list[str]) -> dict[str, str]:
    """stageS.B.branch1 (the shortcut) and branch2 (the body), layers counted with their activations."""
    layers = {
        "shortcut": {"depthwise.conv": 0, "depthwise.bn": 1, "project.conv": 2, "project.bn": 3},
        "body": {"reduce.conv": 0, "reduce.bn": 1, "depthwise.conv": 3, "depthwise.bn": 4,
                 "expand.conv": 5, "expand.bn": 6},
    }  # fmt: skip
    fixed = {"features.stem.conv1": "conv1", "features.last": "conv5"}
    names = {}
    for key in keys:
        match = _parse(key)
        if match is None:
            names[key] = _with_prefix(key, fixed, {"classifier.fc": "fc"})
            continue
        branch, _, rest = match[3].partition(".")
        layer, _, leaf = rest.rpartition(".")
        number = {"shortcut": 1, "body": 2}[branch]
        names[key] = f"stage{match[1]}.{int(match[2]) - 1}.branch{number}.{layers[branch][layer]}.{leaf}"
    return names


# ---------------------------------------------------------------- timm


def _timm(head: dict[str, str]) -> Callable[[list[str]], dict[str, str]]:
    """blocks.S.B with conv_pw/conv_dw/conv_pwl and bn1..bn3; without an expansion conv_dw/conv_pw and bn1, bn2."""

    def rename(keys: list[str]) -> dict[str, str]:
        units = _units(keys)
        fixed = {"features.stem.conv": "conv_stem", "features.stem.bn": "bn1"}
        names = {}
        for key in keys:
            match = _parse(key)
            if match is None:
                names[key] = _with_prefix(key, fixed, head, numbered=False)
                continue
            path = f"blocks.{int(match[1]) - 1}.{int(match[2]) - 1}"
            unit, _, rest = match[3].removeprefix("body.").partition(".")
            if unit == "se":
                names[key] = f"{path}.se.conv_{rest}"
                continue
            convolutions = [u for u in units[match.group(1, 2)] if u != "se"]
            part, _, leaf = rest.partition(".")
            if part == "bn":
                names[key] = f"{path}.bn{convolutions.index(unit) + 1}.{leaf}"
            else:
                narrow = "conv_pwl" if "expand" in convolutions else "conv_pw"
                name = {"expand": "conv_pw", "depthwise": "conv_dw", "project": narrow, "pointwise": "conv_pw"}[unit]
                names[key] = f"{path}.{name}.{leaf}"
        return names

    return rename


# ---------------------------------------------------------------- shared


def _parse(key: str) -> re.Match[str] | None:
    return _BLOCK.fullmatch(key)


def _units(keys: list[str]) -> dict[tuple[str, ...], list[str]]:
    """{(stage, block): its units in order}."""
    found: dict[tuple[str, ...], list[str]] = {}
    for match in filter(None, map(_parse, keys)):
        unit = match[3].removeprefix("body.").partition(".")[0]
        held = found.setdefault(match.group(1, 2), [])
        if unit not in held:
            held.append(unit)
    return found


def _numbered(rest: str) -> str:
    """conv.weight -> 0.weight, bn.bias -> 1.bias."""
    part, _, leaf = rest.partition(".")
    return f"{ {'conv': 0, 'bn': 1}[part] }.{leaf}"


def _with_prefix(key: str, fixed: dict[str, str], head: dict[str, str], numbered: bool = True) -> str:
    """A key outside the blocks, under its library's name."""
    for ours, theirs in head.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    ours, theirs = next((o, t) for o, t in fixed.items() if key.startswith(f"{o}."))
    rest = key.removeprefix(f"{ours}.")
    return f"{theirs}.{_numbered(rest) if numbered else rest}"


_FC = {"classifier.fc": "classifier"}
_TIMM_HEAD = {"features.last.conv": "conv_head", "features.last.bn": "bn2", **_FC}
_PLAIN = {"padding": "symmetric"}
_FULL = _PLAIN | {"minimalistic": False, "last_stage": "efficient"}
_V3 = Layout(
    _torchvision_inverted("block", {"classifier.last": "classifier.0", "classifier.fc": "classifier.3"}),
    1e-3,
    0.01,
    needs=_FULL,
)


def _timm_v3(stage: int, **needed: Any) -> Layout:
    """timm holds the last convolution as a stage of its own, and the layer after the pool as a convolution."""
    last = {"features.last.conv": f"blocks.{stage}.0.conv", "features.last.bn": f"blocks.{stage}.0.bn1"}
    return Layout(_timm(last | {"classifier.last": "conv_head"} | _FC), **needed)


_TF: dict[str, Any] = {
    "bn_eps": 1e-3, "preprocessing": HALF, "needs": {"padding": "same", "last_stage": "efficient"}
}  # fmt: skip
_V1 = _PLAIN | {"activation": "relu6", "depthwise": True}
_SHUFFLE_V2 = {"layout": "mobile", "se": False, "residual": False}
_MEGVII_IMAGES = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # 0 to 255 as they are; adapt turns BGR into RGB

LAYOUTS: dict[str, dict[str, Layout]] = {
    "mobilenet_v1": {"timm": Layout(_timm(_FC), preprocessing=HALF, needs=_V1)},
    "mobilenet_v2": {
        "torchvision": Layout(_torchvision_inverted("conv", {"classifier.fc": "classifier.1"}), needs=_PLAIN),
        "timm": Layout(_timm(_TIMM_HEAD), needs=_PLAIN),
    },
    "mobilenet_v3_large": {"torchvision": _V3, "timm": _timm_v3(6, needs=_FULL), "timm_tf": _timm_v3(6, **_TF)},
    "mobilenet_v3_small": {"torchvision": _V3, "timm": _timm_v3(5, needs=_FULL), "timm_tf": _timm_v3(5, **_TF)},
    "mnasnet_b1": {
        "torchvision": Layout(_torchvision_mnasnet, 1e-5, 3e-4, needs=_PLAIN),
        "timm": Layout(_timm(_TIMM_HEAD), needs=_PLAIN),
    },
    "mnasnet_a1": {"timm": Layout(_timm(_TIMM_HEAD), needs=_PLAIN)},
    "shufflenet_v1": {
        "megvii": Layout(
            megvii.shufflenet_v1,
            preprocessing=_MEGVII_IMAGES,
            needs={"shuffle": "inverse", "se": False},
            adapt=megvii.shuffled_depthwise,
        )
    },
    "shufflenet_v2": {
        "torchvision": Layout(_torchvision_shufflenet_v2, needs=_SHUFFLE_V2 | {"wiring": "halves"}),
        "megvii": Layout(
            megvii.shufflenet_v2,
            preprocessing=_MEGVII_IMAGES,
            needs=_SHUFFLE_V2 | {"wiring": "even_odd"},
            adapt=megvii.rgb,
        ),
    },
}
SOURCES = tuple(sorted({source for held in LAYOUTS.values() for source in held}))
