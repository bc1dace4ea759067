"""MobileNetV1. Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam 2017, "MobileNets: Efficient
convolutional neural networks for mobile vision applications", arXiv:1704.04861, Table 1.

Pair: 3x3 depthwise convolution, 1x1 (pointwise) convolution, each followed by BN and an activation. It costs
1/c + 1/9 of a full 3x3 convolution to c channels. The depthwise one carries the stride.
Net: conv3x3 32 stride 2, the thirteen pairs of TABLE_1, global average pool, linear.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    Act,
    Net,
    Norm,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    named,
    pooled_linear,
    scaled,
    strides_for,
)


class Row(NamedTuple):
    """n pairs with c output channels, stride s in the first."""

    c: int
    n: int
    s: int


TABLE_1 = (
    Row(64, 1, 1),
    Row(128, 2, 2),
    Row(256, 2, 2),
    Row(512, 6, 2),
    Row(1024, 2, 2),
)
STEM = 32
ACTIVATIONS: dict[str, Act] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def mobilenet_v1(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    width: float = 1.0,
    activation: str = "relu6",
    depthwise: bool = True,
    dropout: float = 0.0,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """MobileNetV1 of Table 1; input_size from 8."""
    name = "mobilenet_v1"
    check(name, num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
    check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum)
    check(name, activation=activation, depthwise=depthwise)
    norm, act = batch_norm_of(bn_eps, bn_momentum), ACTIVATIONS[activation]
    stem_stride, *strides = strides_for(input_size, (2, *(row.s for row in TABLE_1)))
    channels = scaled(STEM, width)
    features = named(stem=conv_unit(in_channels, channels, 3, stride=stem_stride, norm=norm, act=act))
    for number, (row, stride) in enumerate(zip(TABLE_1, strides, strict=True), start=1):
        stage = nn.Sequential()
        out = scaled(row.c, width)
        for index in range(1, row.n + 1):
            s = stride if index == 1 else 1
            if depthwise:
                block = separable(channels, out, s, norm, act)
            else:
                block = conv_unit(channels, out, 3, stride=s, norm=norm, act=act)
            stage.add_module(f"block{index}", block)
            channels = out
        features.add_module(f"stage{number}", stage)
    net = Net(features, pooled_linear(channels, num_classes, dropout))
    initialise(net)
    return net


def separable(in_channels: int, out_channels: int, stride: int, norm: Norm, act: Act) -> nn.Sequential:
    """The modules `depthwise`, `pointwise`: (n, in, h, w) -> (n, out, h / stride, w / stride)."""
    return named(
        depthwise=conv_unit(in_channels, in_channels, 3, stride=stride, groups=in_channels, norm=norm, act=act),
        pointwise=conv_unit(in_channels, out_channels, 1, norm=norm, act=act),
    )
