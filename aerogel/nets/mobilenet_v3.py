"""MobileNetV3. Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le, Adam 2019, "Searching for
MobileNetV3", arXiv:1905.02244, Tables 1 and 2.

Block: MobileNetV2's, with squeeze-and-excite (SE) between the depthwise convolution's activation and the linear
projection: to a quarter of the expansion, in multiples of 8, ReLU, back, hard sigmoid, ReLU6(x + 3) / 6.
Activations are ReLU (RE) or h-swish, x ReLU6(x + 3) / 6 (HS).
Net: conv3x3 16 HS stride 2, the blocks of the table, conv1x1 to the last expansion HS, global average pool,
linear HS, dropout, linear. Blocks with the same number of output channels make a stage.

| net                                      | params    | MACs        | the paper's top-1, params, MACs |
| mobilenet_v3_large                       | 5,483,032 | 216,589,760 | 75.2 %, 5.4M, 219M |
| mobilenet_v3_large, width 0.75           | 3,993,528 | 154,560,624 | 73.3 %, 4.0M, 155M |
| mobilenet_v3_large, minimalistic         | 3,924,288 | 209,136,704 |                    |
| mobilenet_v3_large, original last stage  | 4,983,512 | 250,907,520 |                    |
| mobilenet_v3_small                       | 2,542,856 | 56,510,400  | 67.4 %, 2.5M, 56M  |
| mobilenet_v3_small, width 0.75           | 2,041,872 | 43,399,344  | 65.4 %, 2.0M, 44M  |
| mobilenet_v3_small, width 0.5            | 1,593,224 | 24,188,688  |                    |
| mobilenet_v3_small, minimalistic         | 2,044,736 | 52,288,448  |                    |
| mobilenet_v3_small, last_channels 1280   | 2,946,568 | 56,913,856  | 67.4 %, 2.9M, 66M  |
(3 x 224 x 224 inputs, 1000 classes: the defaults.)

width multiplies the channels, to multiples of 8, and leaves each block its ratio of expansion; the stem and the last
hidden layer (last_channels) do not shrink below width 1. minimalistic, of the official code: no SE, ReLU everywhere,
3x3 instead of 5x5. last_stage="original" is the layout before section 5.1: the last expansion runs on through a
3x3 depthwise convolution and a projection to 320 channels, and the 1280 features are made, with BN, before the
pooling; the redesign saves 34.3M MACs (the paper: 30M). The paper draws it for the large net; the small one has,
by analogy, twice its last channels in the place of 320.
Below 64 pixels the stem and the first strided row keep stride 1, so that 32 pixels end at 4x4.
Differs: Table 2 ends in 1280 channels, the official code and the paper's later numbers in 1024, as here. The paper's
dropout of 0.8 is what is kept; here 0.2, what is dropped. BN momentum 0.01 is the paper's decay of 0.99, epsilon 1e-3
the code's. In the code the last hidden layer shrinks unless told not to, and the stem always. He initialisation
instead of a truncated normal. The code pads strided convolutions as TensorFlow does (padding="same"), here by half the
kernel on every side.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    Act,
    Net,
    Norm,
    SqueezeExcite,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    inverted_residual,
    make_divisible,
    named,
    pooled_linear,
    scaled,
    set_padding,
    strides_for,
)


class Row(NamedTuple):
    """One bottleneck: kernel, expansion size, output channels, squeeze-and-excite, non-linearity, stride."""

    kernel: int
    exp: int
    out: int
    SE: bool
    NL: str
    s: int


TABLE_1 = (  # large
    Row(3, 16, 16, False, "RE", 1),
    Row(3, 64, 24, False, "RE", 2),
    Row(3, 72, 24, False, "RE", 1),
    Row(5, 72, 40, True, "RE", 2),
    Row(5, 120, 40, True, "RE", 1),
    Row(5, 120, 40, True, "RE", 1),
    Row(3, 240, 80, False, "HS", 2),
    Row(3, 200, 80, False, "HS", 1),
    Row(3, 184, 80, False, "HS", 1),
    Row(3, 184, 80, False, "HS", 1),
    Row(3, 480, 112, True, "HS", 1),
    Row(3, 672, 112, True, "HS", 1),
    Row(5, 672, 160, True, "HS", 2),
    Row(5, 960, 160, True, "HS", 1),
    Row(5, 960, 160, True, "HS", 1),
)
TABLE_2 = (  # small
    Row(3, 16, 16, True, "RE", 2),
    Row(3, 72, 24, False, "RE", 2),
    Row(3, 88, 24, False, "RE", 1),
    Row(5, 96, 40, True, "HS", 2),
    Row(5, 240, 40, True, "HS", 1),
    Row(5, 240, 40, True, "HS", 1),
    Row(5, 120, 48, True, "HS", 1),
    Row(5, 144, 48, True, "HS", 1),
    Row(5, 288, 96, True, "HS", 2),
    Row(5, 576, 96, True, "HS", 1),
    Row(5, 576, 96, True, "HS", 1),
)
NL: dict[str, Act] = {"RE": nn.ReLU, "HS": nn.Hardswish}
STEM = 16


def _mobilenet_v3(name: str, table: tuple[Row, ...], features_out: int) -> Callable[..., Net]:
    """The constructor of the net of one table; features_out is its default last_channels."""

    def construct(
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        input_size: int = 224,
        width: float = 1.0,
        minimalistic: bool = False,
        last_stage: str = "efficient",
        last_channels: int = features_out,
        dropout: float = 0.2,
        padding: str = "symmetric",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> Net:
        check(name, num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
        check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum, padding=padding)
        check(name, minimalistic=minimalistic, last_stage=last_stage, last_channels=last_channels)
        norm, act = batch_norm_of(bn_eps, bn_momentum), nn.ReLU if minimalistic else nn.Hardswish
        stem_stride, *strides = strides_for(input_size, (2, *(row.s for row in table)))
        rows = [row._replace(s=stride) for row, stride in zip(table, strides, strict=True)]
        if minimalistic:
            rows = [row._replace(kernel=3, SE=False, NL="RE") for row in rows]
        channels = scaled(STEM, max(1.0, width))
        features = named(stem=conv_unit(in_channels, channels, 3, stride=stem_stride, norm=norm, act=act))
        channels = _add_stages(features, rows, channels, width, norm)
        expanded, last = scaled(rows[-1].exp, width), scaled(last_channels, max(1.0, width))
        if last_stage == "original":
            out = scaled(2 * rows[-1].out, width)
            bottleneck = inverted_residual(channels, expanded, out, stride=1, norm=norm, act=act)
            features.add_module("bottleneck", bottleneck)
            features.add_module("last", conv_unit(out, last, 1, norm=norm, act=act))
            classifier = pooled_linear(last, num_classes, dropout)
        else:
            features.add_module("last", conv_unit(channels, expanded, 1, norm=norm, act=act))
            classifier = _two_layers(expanded, last, num_classes, dropout, act)
        net = Net(features, classifier)
        initialise(net)
        set_padding(net, padding)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: the paper's net; input_size from 8; see aerogel/nets/mobilenet_v3.py."
    return construct


def _add_stages(features: nn.Sequential, rows: list[Row], channels: int, width: float, norm: Norm) -> int:
    """Adds stage1, stage2, ... to features, one for each run of rows with equal `out`; the channels at their end."""
    before = STEM
    for number, (_, run) in enumerate(groupby(rows, key=lambda row: row.out), start=1):
        stage = nn.Sequential()
        for index, row in enumerate(run, start=1):
            hidden, out = make_divisible(channels * row.exp / before), scaled(row.out, width)
            se = SqueezeExcite(hidden, make_divisible(hidden / 4), nn.Hardsigmoid) if row.SE else None
            stage.add_module(
                f"block{index}",
                inverted_residual(channels, hidden, out, row.kernel, stride=row.s, norm=norm, act=NL[row.NL], se=se),
            )
            channels, before = out, row.out
        features.add_module(f"stage{number}", stage)
    return channels


def _two_layers(channels: int, hidden: int, num_classes: int, dropout: float, act: Act) -> nn.Sequential:
    """Global average pool, linear, activation, dropout, linear: (n, channels, h, w) -> (n, num_classes)."""
    return named(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        last=nn.Linear(channels, hidden),
        act=act(),
        dropout=nn.Dropout(dropout),
        fc=nn.Linear(hidden, num_classes),
    )


mobilenet_v3_large = _mobilenet_v3("mobilenet_v3_large", TABLE_1, 1280)
mobilenet_v3_small = _mobilenet_v3("mobilenet_v3_small", TABLE_2, 1024)
