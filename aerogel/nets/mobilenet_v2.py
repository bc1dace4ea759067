"""MobileNetV2. Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: Inverted residuals and linear
bottlenecks", arXiv:1801.04381, Table 2.

Block: 1x1 expansion to t times the channels, ReLU6; 3x3 depthwise, ReLU6; 1x1 projection with no activation
(the linear bottleneck). The input is added where the stride is 1 and the channels are equal. No expansion
at t = 1.
Net: conv3x3 32 stride 2, the blocks of TABLE_2, conv1x1 1280, global average pool, dropout, linear.

| width | params    | MACs        |
| 0.35  | 1,677,128 | 59,285,808  |
| 0.5   | 1,968,680 | 97,131,840  |
| 0.75  | 2,636,424 | 209,069,792 |
| 1.0   | 3,504,872 | 300,774,272 |
| 1.4   | 6,108,776 | 582,195,824 |
(3 x 224 x 224 inputs, 1000 classes: the defaults.)

width multiplies the channels, to multiples of 8 (`make_divisible`); the 1280 does not shrink below width 1.
Below 64 pixels the stem and the first strided stage (c = 24) keep stride 1, so that 32 pixels end at 4x4.
Differs: the paper says 6.9M parameters at width 1.4, its own code builds 6.11M, as here. Dropout 0.2 is
that code's; its BN epsilon is 1e-3, here 1e-5 (bn_eps). He initialisation instead of a truncated normal.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    IMAGENET_FROM,
    Net,
    Norm,
    Residual,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    named,
    pooled_linear,
    scaled,
)


class Row(NamedTuple):
    """n blocks: expansion factor t, c output channels, stride s of the first."""

    t: int
    c: int
    n: int
    s: int


TABLE_2 = (
    Row(1, 16, 1, 1),
    Row(6, 24, 2, 2),
    Row(6, 32, 3, 2),
    Row(6, 64, 4, 2),
    Row(6, 96, 3, 1),
    Row(6, 160, 3, 2),
    Row(6, 320, 1, 1),
)
SMALL_S = (1, 1, 2, 2, 1, 2, 1)  # the column s for small images, whose stem has stride 1 too
STEM, LAST = 32, 1280


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    width: float = 1.0,
    dropout: float = 0.2,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """MobileNetV2 of Table 2; input_size from 8."""
    check("mobilenet_v2", num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
    check("mobilenet_v2", smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum)
    norm = batch_norm_of(bn_eps, bn_momentum)
    small = input_size < IMAGENET_FROM
    channels = scaled(STEM, width)
    stem = conv_unit(in_channels, channels, 3, stride=1 if small else 2, norm=norm, act=nn.ReLU6)
    features = named(stem=stem)
    for number, (row, small_s) in enumerate(zip(TABLE_2, SMALL_S, strict=True), start=1):
        stage = nn.Sequential()
        out = scaled(row.c, width)
        first_stride = small_s if small else row.s
        for block in range(1, row.n + 1):
            stride = first_stride if block == 1 else 1
            stage.add_module(f"block{block}", inverted_residual(channels, out, row.t, stride, norm))
            channels = out
        features.add_module(f"stage{number}", stage)
    last = scaled(LAST, max(1.0, width))
    features.add_module("last", conv_unit(channels, last, 1, norm=norm, act=nn.ReLU6))
    net = Net(features, pooled_linear(last, num_classes, dropout))
    initialise(net)
    return net


def inverted_residual(in_channels: int, out_channels: int, t: int, stride: int, norm: Norm) -> nn.Module:
    """(n, in, h, w) -> (n, out, h / stride, w / stride); a Residual where the input is added."""
    hidden = in_channels * t
    body = OrderedDict[str, nn.Module]()
    if t > 1:
        body["expand"] = conv_unit(in_channels, hidden, 1, norm=norm, act=nn.ReLU6)
    body["depthwise"] = conv_unit(hidden, hidden, 3, stride=stride, groups=hidden, norm=norm, act=nn.ReLU6)
    body["project"] = conv_unit(hidden, out_channels, 1, norm=norm, act=None)
    block = nn.Sequential(body)
    return Residual(block) if stride == 1 and in_channels == out_channels else named(body=block)
