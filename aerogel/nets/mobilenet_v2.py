"""MobileNetV2. Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: Inverted residuals and linear
bottlenecks", arXiv:1801.04381, Table 2.

Block: 1x1 expansion to t times the channels, ReLU6; 3x3 depthwise, ReLU6; 1x1 projection with no activation
(the linear bottleneck). The input is added where the stride is 1 and the channels are equal. No expansion
at t = 1.
Net: conv3x3 32 stride 2, the blocks of TABLE_2, conv1x1 1280, global average pool, dropout, linear.

| width | params    | MACs        | the paper's top-1, params, MACs |
| 0.35  | 1,677,128 | 59,285,808  |                                 |
| 0.5   | 1,968,680 | 97,131,840  |                                 |
| 0.75  | 2,636,424 | 209,069,792 |                                 |
| 1.0   | 3,504,872 | 300,774,272 | 72.0 %, 3.4M, 300M              |
| 1.4   | 6,108,776 | 582,195,824 | 74.7 %, 6.9M, 585M              |
(3 x 224 x 224 inputs, 1000 classes: the defaults.)

width multiplies the channels, to multiples of 8 (`make_divisible`); the 1280 does not shrink below width 1.
Below 64 pixels the stem and the first strided stage (c = 24) keep stride 1, so that 32 pixels end at 4x4.
Differs: the paper says 6.9M parameters at width 1.4, its own code builds 6.11M, as here; 3.4M at width 1.0 is
the count without normalisations (3,470,760), cut short (see aerogel/nets/paper.py). Dropout 0.2 is
that code's; its BN epsilon is 1e-3, here 1e-5 (bn_eps). He initialisation instead of a truncated normal.
The code pads strided convolutions as TensorFlow does (padding="same"), here by half the kernel on every side.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    Net,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    inverted_residual,
    named,
    pooled_linear,
    scaled,
    set_padding,
    strides_for,
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
STEM, LAST = 32, 1280


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    width: float = 1.0,
    dropout: float = 0.2,
    padding: str = "symmetric",
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """MobileNetV2 of Table 2; input_size from 8."""
    check("mobilenet_v2", num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
    check("mobilenet_v2", smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum, padding=padding)
    norm = batch_norm_of(bn_eps, bn_momentum)
    stem_stride, *strides = strides_for(input_size, (2, *(row.s for row in TABLE_2)))
    channels = scaled(STEM, width)
    features = named(stem=conv_unit(in_channels, channels, 3, stride=stem_stride, norm=norm, act=nn.ReLU6))
    for number, (row, stride) in enumerate(zip(TABLE_2, strides, strict=True), start=1):
        stage = nn.Sequential()
        out = scaled(row.c, width)
        for index in range(1, row.n + 1):
            s = stride if index == 1 else 1
            block = inverted_residual(channels, channels * row.t, out, stride=s, norm=norm, act=nn.ReLU6)
            stage.add_module(f"block{index}", block)
            channels = out
        features.add_module(f"stage{number}", stage)
    last = scaled(LAST, max(1.0, width))
    features.add_module("last", conv_unit(channels, last, 1, norm=norm, act=nn.ReLU6))
    net = Net(features, pooled_linear(last, num_classes, dropout))
    initialise(net)
    set_padding(net, padding)
    return net
