"""What the nets share: their shape, units of convolution, blocks, strides, widths, initialisation, checks.

make_divisible is the rule of Sandler et al. 2018, arXiv:1801.04381, as in its official code: the nearest
multiple of 8, at least 8, and never more than 10 % below what was asked.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from aerogel.errors import AerogelError

Norm = Callable[[int], nn.Module]  # channels -> the normalisation over them
Act = Callable[[], nn.Module]
IMAGENET_FROM = 64  # pixels; below, a net takes its stem, strides or head for small images


class Net(nn.Module):
    """Features, then a classifier: (n, in_channels, input_size, input_size) -> logits (n, num_classes).

    The children of both carry names (`features.stem`, `features.stage1`, `classifier.fc`), so any of them can
    be tapped. `spec` is set by `nets.build`: the net's name and all its arguments, enough to build it again.
    """

    spec: dict[str, Any]

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, in_channels, input_size, input_size) -> logits (n, num_classes)."""
        return self.classifier(self.features(x))


class Residual(nn.Module):
    """act(body(x) + shortcut(x)); by default the shortcut is the input itself and nothing follows the sum."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = nn.Identity() if act is None else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, c, h, w) -> the shape of body(x)."""
        return self.act(self.body(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """x * gate(expand(ReLU(reduce(the mean of x over its pixels)))), Hu, Shen, Sun 2017, arXiv:1709.01507.

    Both 1x1 convolutions have a bias. How far `squeezed` goes and what gates is for the net to say.
    """

    def __init__(self, channels: int, squeezed: int, gate: Act) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, channels, h, w) -> the same shape."""
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


def named(**modules: nn.Module) -> nn.Sequential:
    """The modules in the order given, each under its name."""
    return nn.Sequential(OrderedDict(modules))


def batch_norm_of(eps: float, momentum: float) -> Norm:
    """Batch normalisation with these constants; momentum is PyTorch's, the weight of the new batch."""
    return partial(nn.BatchNorm2d, eps=eps, momentum=momentum)


def conv_unit(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: Norm | None,
    act: Act | None = nn.ReLU,
) -> nn.Sequential:
    """The modules `conv`, `bn`, `act`: (n, in, h, w) -> (n, out, h / stride, w / stride).

    The padding is kernel // 2, so h / stride rounds up. A bias is there only where no normalisation follows.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=norm is None)
    unit = named(conv=conv)
    if norm is not None:
        unit.add_module("bn", norm(out_channels))
    if act is not None:
        unit.add_module("act", act())
    return unit


def preact_unit(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, norm: Norm) -> nn.Sequential:
    """The modules `bn`, `act` (ReLU), `conv`: (n, in, h, w) -> (n, out, h / stride, w / stride).

    The padding is kernel // 2, and there is no bias: the next unit's normalisation follows.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return named(bn=norm(in_channels), act=nn.ReLU(), conv=conv)


def inverted_residual(
    in_channels: int,
    hidden: int,
    out_channels: int,
    kernel: int = 3,
    *,
    stride: int,
    norm: Norm,
    act: Act,
    se: nn.Module | None = None,
    skip: bool = True,
) -> nn.Module:
    """The modules `expand`, `depthwise`, `se` if any, `project`: (n, in, h, w) -> (n, out, h / stride, w / stride).

    The projection is linear. There is no expansion where it would not expand. A Residual where the input is
    added: skip, stride 1, in == out.
    """
    body = nn.Sequential()
    if hidden != in_channels:
        body.add_module("expand", conv_unit(in_channels, hidden, 1, norm=norm, act=act))
    body.add_module("depthwise", conv_unit(hidden, hidden, kernel, stride=stride, groups=hidden, norm=norm, act=act))
    if se is not None:
        body.add_module("se", se)
    body.add_module("project", conv_unit(hidden, out_channels, 1, norm=norm, act=None))
    return Residual(body) if skip and stride == 1 and in_channels == out_channels else named(body=body)


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding: ceil(size / stride) outputs, an odd total's larger half at the right and bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, in, h, w) -> (n, out, ceil(h / stride), ceil(w / stride))."""
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def set_padding(net: nn.Module, padding: str) -> None:
    """In place. "same": every strided convolution of an odd kernel pads as TensorFlow does; at stride 1 both agree."""
    if padding == "symmetric":
        return
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d and max(child.stride) > 1 and max(child.kernel_size) > 1:
                kernel, stride = child.kernel_size[0], child.stride[0]
                same = SameConv2d(child.in_channels, child.out_channels, kernel, stride, groups=child.groups)
                same.weight, same.bias = child.weight, child.bias
                setattr(module, name, same)


def strides_for(input_size: int, strides: Iterable[int]) -> list[int]:
    """The strides, stem first, as they are from 64 pixels up; below, the first two 2s are 1s."""
    result = list(strides)
    if input_size < IMAGENET_FROM:
        for index in [i for i, stride in enumerate(result) if stride == 2][:2]:
            result[index] = 1
    return result


def pooled_linear(channels: int, num_classes: int, dropout: float | None = None) -> nn.Sequential:
    """Global average pool, dropout if any, one linear layer: (n, channels, h, w) -> (n, num_classes)."""
    head = named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    if dropout is not None:
        head.add_module("dropout", nn.Dropout(dropout))
    head.add_module("fc", nn.Linear(channels, num_classes))
    return head


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least one, one more where it would lose over 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def nearest_multiple(channels: float, of: int) -> int:
    """The nearest multiple of `of`, halves up, at least one."""
    return of * max(1, int(channels / of + 0.5))


def scaled(channels: int, width: float) -> int:
    """The channels times the width, made divisible by 8; at width 1 the paper's number untouched."""
    return channels if width == 1 else make_divisible(channels * width)


def initialise(net: nn.Module) -> None:
    """In place: convolutions He normal (fan out), linear layers N(0, 0.01), biases 0; norms stay as built."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1  # bool is an int too, and is not meant


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # false for nan too


_Rule = tuple[Callable[[Any], bool], str]
_FLAG: _Rule = (lambda value: type(value) is bool, "true or false")
_RULES: dict[str, _Rule] = {
    "num_classes": (_is_count, "an integer >= 1"),
    "in_channels": (_is_count, "an integer >= 1"),
    "input_size": (_is_count, "an integer >= 1, the side of the image in pixels"),
    "width": (lambda value: _is_number(value) and value > 0, "a number > 0"),
    "dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "bn_eps": (lambda value: _is_number(value) and value > 0, "a number > 0"),
    "bn_momentum": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "head": (lambda value: value in ("cifar", "imagenet"), "cifar or imagenet"),
    "batch_norm": _FLAG,
    "conv_relu": _FLAG,
    "depthwise": _FLAG,
    "activation": (lambda value: value in ("relu", "relu6"), "relu or relu6"),
    "minimalistic": _FLAG,
    "last_stage": (lambda value: value in ("efficient", "original"), "efficient or original"),
    "last_channels": (_is_count, "an integer >= 1"),
    "growth": (_is_count, "an integer >= 1"),
    "lrn": _FLAG,
    "input_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "limit": (lambda value: _is_number(value) and value > 0, "a number > 0"),
    "max_norm": (lambda value: value is None or (_is_number(value) and value > 0), "a number > 0, or none"),
    "groups": (lambda value: type(value) is int and value in (1, 2, 3, 4, 8), "1, 2, 3, 4 or 8"),
    "shuffle": (lambda value: type(value) is bool or value == "inverse", "true, false or inverse"),
    "wiring": (lambda value: value in ("halves", "even_odd"), "halves or even_odd"),
    "padding": (lambda value: value in ("symmetric", "same"), "symmetric or same"),
    "se": _FLAG,
    "residual": _FLAG,
    "merged": _FLAG,
    "layout": (lambda value: str(value) in ("mobile", "50", "164"), "mobile, 50 or 164"),
}


def check(net: str, /, *, smallest: int = 1, **arguments: Any) -> None:
    """Raises AerogelError for the first argument that breaks its rule; `smallest` is the least input_size."""
    for name, value in arguments.items():
        holds, rule = _RULES[name]
        if not holds(value):
            raise AerogelError(f"{net}: {name} must be {rule}, got {value!r}")
    size = arguments.get("input_size", smallest)
    if size < smallest:
        raise AerogelError(f"{net}: input_size must be >= {smallest}, got {size}; enlarge the images")
