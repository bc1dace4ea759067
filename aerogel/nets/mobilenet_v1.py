"""MobileNetV1. Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam 2017, "MobileNets: Efficient
convolutional neural networks for mobile vision applications", arXiv:1704.04861, Table 1.

Pair: 3x3 depthwise convolution, 1x1 (pointwise) convolution, BN and activation after each. It costs 1 / c + 1 / 9
of a full 3x3 convolution to c channels. The depthwise one carries the stride.
Net: conv3x3 32 stride 2, the thirteen pairs of TABLE_1, global average pool, dropout, linear.

| width              | params     | MACs at 224   | 192         | 160         | 128         | the paper's top-1 |
| 1.0                | 4,231,976  | 568,740,352   | 418,121,728 | 290,675,200 | 186,400,768 | 70.6 %            |
| 0.75               | 2,585,560  | 325,400,448   | 239,273,472 | 166,396,800 | 106,770,432 | 68.4 %            |
| 0.5                | 1,331,592  | 149,497,088   | 109,970,432 | 76,524,800  | 49,160,192  | 63.7 %            |
| 0.25               | 470,072    | 41,030,272    | 30,212,608  | 21,059,200  | 13,570,048  | 50.6 %            |
| 1.0, not depthwise | 29,294,088 | 4,867,293,184 |             |             |             | 71.7 %            |
(3 x 224 x 224 inputs, 1000 classes: the defaults; top-1 at 224. The paper's own counts are in aerogel/nets/paper.py.)

width multiplies the channels, to multiples of 8; at the paper's widths nothing needs rounding.
depthwise=False puts one full 3x3 convolution in the place of each pair: the paper's baseline of Table 4.
Below 64 pixels the stem and the first strided stage (c = 128) keep stride 1, so that 32 pixels end at 4x4.
Differs: the paper's text has ReLU, its code ReLU6, the default here (activation="relu" for the text). Table 1 prints
the last depthwise with stride 2, though from 7x7 to 7x7; stride 1 here, as in the code. The code's README has lower
MACs at width 0.75 (317M, 233M, 162M, 104M) and higher ones at 0.25 and 192 pixels (34M) than the net makes. The code
has BN epsilon 1e-3 and momentum 3e-4, here 1e-5 and 0.1 (bn_eps, bn_momentum), a dropout of 0.001, here 0, and
starts from a truncated normal of 0.09, here He. It pads strided convolutions as TensorFlow does (padding="same"),
here by half the kernel on every side. The paper wants little or no weight decay on depthwise filters.
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
    set_padding,
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
    padding: str = "symmetric",
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """MobileNetV1 of Table 1; input_size from 8."""
    name = "mobilenet_v1"
    check(name, num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
    check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum, padding=padding)
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
    set_padding(net, padding)
    return net


def separable(in_channels: int, out_channels: int, stride: int, norm: Norm, act: Act) -> nn.Sequential:
    """The modules `depthwise`, `pointwise`: (n, in, h, w) -> (n, out, h / stride, w / stride)."""
    return named(
        depthwise=conv_unit(in_channels, in_channels, 3, stride=stride, groups=in_channels, norm=norm, act=act),
        pointwise=conv_unit(in_channels, out_channels, 1, norm=norm, act=act),
    )
