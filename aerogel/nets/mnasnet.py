"""MnasNet. Tan, Chen, Pang, Vasudevan, Sandler, Howard, Le 2018, "MnasNet: Platform-aware neural architecture search
for mobile", arXiv:1807.11626, Figure 7; the tables are the block strings of its official code.

Block: MobileNetV2's with ReLU, 3x3 or 5x5, and in some stages squeeze-and-excite between the depthwise
convolution's activation and the linear projection: to a quarter of the block's input channels, ReLU, back, sigmoid.
Net: conv3x3 stride 2 to 32 channels (small: 8), the blocks, conv1x1 1280, global average pool, dropout, linear.

| net                    | params    | MACs        | the paper's top-1, params, MACs |
| mnasnet_a1             | 3,887,038 | 311,579,072 | 75.2 %, 3.9M, 312M |
| mnasnet_a1, width 0.35 | 1,747,018 | 61,681,920  | 64.1 %, 1.7M, 63M  |
| mnasnet_a1, width 1.4  | 6,105,992 | 586,317,952 |                    |
| mnasnet_b1             | 4,383,312 | 314,415,872 |                    |
| mnasnet_small          | 2,030,264 | 68,339,184  | 66.0 %, 2.0M, 68M  |
(3 x 224 x 224 inputs, 1000 classes: the defaults. B1 is found without squeeze-and-excite in the search space.)

width multiplies the channels, to multiples of 8, but not the 1280. An input is added where stride and channels
allow it and the table does not forbid it (`noskip`).
Below 64 pixels the stem and the first strided stage keep stride 1, so that 32 pixels end at 4x4.
BN has the code's epsilon 1e-3 and momentum 0.01; dropout is 0.2, none in the small net. Its README's MACs are 1 to
2.5 % above what it builds (315.2M for A1, where the paper says 312M). Differs: it starts depthwise
convolutions from He over k * k, here from He over k * k * channels; linear layers from U(-a, a), a = 1 / sqrt(classes),
here from N(0, 0.01). The code pads strided convolutions as TensorFlow does (padding="same"), here by half the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import (
    Net,
    SqueezeExcite,
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
    """r blocks: kernel k, stride s of the first, expansion e, o output channels, se ratio, skip connection."""

    r: int
    k: int
    s: int
    e: int
    o: int
    se: float = 0
    skip: bool = True


A1 = (
    Row(1, 3, 1, 1, 16, skip=False),
    Row(2, 3, 2, 6, 24),
    Row(3, 5, 2, 3, 40, se=0.25),
    Row(4, 3, 2, 6, 80),
    Row(2, 3, 1, 6, 112, se=0.25),
    Row(3, 5, 2, 6, 160, se=0.25),
    Row(1, 3, 1, 6, 320),
)
B1 = (
    Row(1, 3, 1, 1, 16, skip=False),
    Row(3, 3, 2, 3, 24),
    Row(3, 5, 2, 3, 40),
    Row(3, 5, 2, 6, 80),
    Row(2, 3, 1, 6, 96),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320, skip=False),
)
SMALL = (
    Row(1, 3, 1, 1, 8, skip=False),  # declared as 16 -> 8 channels, so its code adds no input, though the stem has 8
    Row(1, 3, 2, 3, 16),
    Row(2, 3, 2, 6, 16),
    Row(4, 5, 2, 6, 32, se=0.25),
    Row(3, 3, 1, 6, 32, se=0.25),
    Row(3, 5, 2, 6, 88, se=0.25),
    Row(1, 3, 1, 6, 144),
)
LAST = 1280


def _mnasnet(name: str, table: tuple[Row, ...], stem: int, drop: float) -> Callable[..., Net]:
    """The constructor of the net of one table, with its stem's channels and its default dropout."""

    def construct(
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        input_size: int = 224,
        width: float = 1.0,
        dropout: float = drop,
        padding: str = "symmetric",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> Net:
        check(name, num_classes=num_classes, in_channels=in_channels, width=width, dropout=dropout)
        check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum, padding=padding)
        norm = batch_norm_of(bn_eps, bn_momentum)
        stem_stride, *strides = strides_for(input_size, (2, *(row.s for row in table)))
        channels = scaled(stem, width)
        features = named(stem=conv_unit(in_channels, channels, 3, stride=stem_stride, norm=norm))
        for number, (row, stride) in enumerate(zip(table, strides, strict=True), start=1):
            stage = nn.Sequential()
            out = scaled(row.o, width)
            for index in range(1, row.r + 1):
                hidden, s = channels * row.e, stride if index == 1 else 1
                se = SqueezeExcite(hidden, max(1, int(channels * row.se)), nn.Sigmoid) if row.se else None
                stage.add_module(
                    f"block{index}",
                    inverted_residual(
                        channels, hidden, out, row.k, stride=s, norm=norm, act=nn.ReLU, se=se, skip=row.skip
                    ),
                )
                channels = out
            features.add_module(f"stage{number}", stage)
        features.add_module("last", conv_unit(channels, LAST, 1, norm=norm))
        net = Net(features, pooled_linear(LAST, num_classes, dropout))
        initialise(net)
        set_padding(net, padding)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: the paper's net; input_size from 8; see aerogel/nets/mnasnet.py."
    return construct


mnasnet_a1 = _mnasnet("mnasnet_a1", A1, 32, 0.2)
mnasnet_b1 = _mnasnet("mnasnet_b1", B1, 32, 0.2)
mnasnet_small = _mnasnet("mnasnet_small", SMALL, 8, 0.0)
