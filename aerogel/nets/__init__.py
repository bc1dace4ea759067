"""The nets: one a file, the paper's table as data.

NETS is a plain dict from name to constructor: put another in and `build` knows it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from aerogel.errors import AerogelError, nearest
from aerogel.nets.alexnet import alexnet
from aerogel.nets.densenet import densenet40, densenet121
from aerogel.nets.lenet import lenet5, lenet_300_100
from aerogel.nets.mlp import mlp
from aerogel.nets.mnasnet import mnasnet_a1, mnasnet_b1, mnasnet_small
from aerogel.nets.mobilenet_v1 import mobilenet_v1
from aerogel.nets.mobilenet_v2 import mobilenet_v2
from aerogel.nets.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from aerogel.nets.resnet import resnet18, resnet20, resnet29, resnet34, resnet50, resnet56, resnet110, resnet164
from aerogel.nets.shufflenet_v1 import shufflenet_v1
from aerogel.nets.shufflenet_v2 import shufflenet_v2
from aerogel.nets.vgg import vgg11, vgg13, vgg16, vgg19
from aerogel.nets.weights import SOURCES, load_weights

__all__ = ["NETS", "SOURCES", "build", "load_weights", "parse"]

NETS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "mlp": mlp,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet29": resnet29,
    "resnet164": resnet164,
    "densenet40": densenet40,
    "densenet121": densenet121,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3_large,
    "mobilenet_v3_small": mobilenet_v3_small,
    "mnasnet_a1": mnasnet_a1,
    "mnasnet_b1": mnasnet_b1,
    "mnasnet_small": mnasnet_small,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
}


def build(name: str, /, **kwargs: Any) -> nn.Module:
    """The net of that name, freshly initialised from PyTorch's random state, in training mode.

    Its `spec`, {"net": name, "args": every argument with its value}, is plain JSON, and
    build(spec["net"], **spec["args"]) makes the same net again.
    Raises AerogelError for an unknown name, an unknown argument, or a value out of its range.
    """
    if name not in NETS:
        raise AerogelError(f"nets.build: no net is called {name!r}; {nearest(name, NETS)}")
    parameters = inspect.signature(NETS[name]).parameters
    for argument in kwargs:
        if argument not in parameters:
            raise AerogelError(f"nets.build: {name} has no argument {argument!r}; {nearest(argument, parameters)}")
    net: Any = NETS[name](**kwargs)
    net.spec = {"net": name, "args": {key: kwargs.get(key, p.default) for key, p in parameters.items()}}
    return net


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Reads "mobilenet_v2:width=0.5,bn_eps=1e-3" as ("mobilenet_v2", {"width": 0.5, "bn_eps": 0.001}).

    A value is an integer, a float, true, false, or else a string. Whether the net exists and takes the
    arguments is for `build` to say. Raises AerogelError when the text is not NAME or NAME:KEY=VALUE,...
    """
    name, colon, text = spec.partition(":")
    arguments: dict[str, Any] = {}
    for item in text.split(",") if colon else []:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([^\s=]+)\s*", item)
        if match is None:
            raise AerogelError(
                f"nets.parse: write NAME:KEY=VALUE,KEY=VALUE, got {spec!r}, where {item!r} is not KEY=VALUE"
            )
        if match[1] in arguments:
            raise AerogelError(f"nets.parse: every argument is given once, got {match[1]!r} twice in {spec!r}")
        arguments[match[1]] = _value(match[2])
    if not name.strip():
        raise AerogelError(f"nets.parse: write NAME or NAME:KEY=VALUE,KEY=VALUE, got {spec!r}, which has no name")
    return name.strip(), arguments


def _value(text: str) -> int | float | bool | str:
    """The text as the first of integer, float, boolean that it is, or itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
