"""VGG. Simonyan, Zisserman 2014, "Very deep convolutional networks", arXiv:1409.1556, Table 1.

Five stages of 3x3 convolutions with ReLU (TABLE_1), a 2x2 max pooling after each, then fc 4096, 4096, 1000.

| net (configuration) | params (batch_norm=False) | MACs           |
| vgg11 (A)           | 132,863,336               | 7,609,090,048  |
| vgg13 (B)           | 133,047,848               | 11,308,466,176 |
| vgg16 (D)           | 138,357,544               | 15,470,264,320 |
| vgg19 (E)           | 143,667,240               | 19,632,062,464 |
(3 x 224 x 224 inputs, 1000 classes: the defaults but for batch_norm.)

Heads. `imagenet`, the default from 64 pixels up: average pool to 7x7 (the identity at 224), fc6 and fc7
with dropout 0.5, fc8. `cifar`, the default below: the one of network slimming (Liu et al. 2017,
arXiv:1708.06519): no fifth max pooling, global average pool, one linear layer. With it vgg19 for 10 classes
has 20,035,018 parameters (slimming's paper: 20.04M) and 398,136,320 MACs at 32 pixels.
width multiplies the channels, fc6 and fc7, to multiples of 8. batch_norm=False ignores the bn_ options.
Differs: batch normalisation, with bias-free convolutions, is on by default; the paper has none.
Convolutions start from He's initialisation instead of N(0, 0.01), so the deep nets need no pre-trained A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    IMAGENET_FROM,
    Net,
    Norm,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    named,
    pooled_linear,
    scaled,
)


class Row(NamedTuple):
    """One stage: the channels of its conv3 layers, and how many of them each configuration has."""

    channels: int
    A: int
    B: int
    D: int
    E: int


TABLE_1 = (
    Row(64, 1, 2, 2, 2),
    Row(128, 1, 2, 2, 2),
    Row(256, 2, 2, 3, 4),
    Row(512, 2, 2, 3, 4),
    Row(512, 2, 2, 3, 4),
)
FC = 4096
SMALLEST = {"cifar": 16, "imagenet": 32}  # pixels that leave one after four, five poolings


def _vgg(name: str, configuration: str) -> Callable[..., Net]:
    """The constructor of one configuration of TABLE_1."""

    def construct(
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        input_size: int = 224,
        width: float = 1.0,
        dropout: float | None = None,
        batch_norm: bool = True,
        head: str | None = None,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> Net:
        check(name, num_classes=num_classes, in_channels=in_channels, input_size=input_size, width=width)
        check(name, batch_norm=batch_norm, bn_eps=bn_eps, bn_momentum=bn_momentum)
        if head is None:
            head = "imagenet" if input_size >= IMAGENET_FROM else "cifar"
        check(name, head=head)
        if dropout is None:
            dropout = 0.5 if head == "imagenet" else 0.0
        check(name, smallest=SMALLEST[head], input_size=input_size, dropout=dropout)

        norm = batch_norm_of(bn_eps, bn_momentum) if batch_norm else None
        features, channels = _features(configuration, in_channels, width, norm, last_pool=head == "imagenet")
        if head == "imagenet":
            classifier = _imagenet_head(channels, scaled(FC, width), num_classes, dropout)
        else:
            classifier = pooled_linear(channels, num_classes, dropout)
        net = Net(features, classifier)
        initialise(net)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: configuration {configuration} of the paper's Table 1; see aerogel/nets/vgg.py."
    return construct


def _features(
    configuration: str, in_channels: int, width: float, norm: Norm | None, *, last_pool: bool
) -> tuple[nn.Sequential, int]:
    """The stages of TABLE_1, and the channels they end with; last_pool ends the last with its max pooling."""
    features = nn.Sequential()
    channels = in_channels
    for number, row in enumerate(TABLE_1, start=1):
        stage = nn.Sequential()
        for layer in range(1, getattr(row, configuration) + 1):
            out = scaled(row.channels, width)
            stage.add_module(f"conv{layer}", conv_unit(channels, out, 3, norm=norm))
            channels = out
        if last_pool or number < len(TABLE_1):
            stage.add_module("pool", nn.MaxPool2d(2))
        features.add_module(f"stage{number}", stage)
    return features, channels


def _imagenet_head(channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """(n, channels, h, w) -> logits (n, num_classes)."""
    return named(
        pool=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        fc6=nn.Linear(channels * 7 * 7, hidden),
        relu6=nn.ReLU(),
        dropout6=nn.Dropout(dropout),
        fc7=nn.Linear(hidden, hidden),
        relu7=nn.ReLU(),
        dropout7=nn.Dropout(dropout),
        fc8=nn.Linear(hidden, num_classes),
    )


vgg11 = _vgg("vgg11", "A")
vgg13 = _vgg("vgg13", "B")
vgg16 = _vgg("vgg16", "D")
vgg19 = _vgg("vgg19", "E")
