"""ShuffleNet. Zhang, Zhou, Lin, Sun 2017, "ShuffleNet: An extremely efficient convolutional neural network for
mobile devices", arXiv:1707.01083, Table 1.

Unit: grouped 1x1 to a quarter of the output channels, ReLU; channel shuffle; 3x3 depthwise, no activation;
grouped 1x1, no activation; the input is added; ReLU. With stride 2: the input, average-pooled 3x3, is put before
the other channels instead, and the last 1x1 makes only those that are missing.
Net: conv3x3 24 stride 2, max pooling 3x3 stride 2, stages of 4, 8, 4 units, global average pool, linear. Channels
double from stage to stage. The first 1x1 of stage 2 is not grouped: it has few input channels.

| groups, width | stage 2 | params    | MACs        | top-1 error, the paper's |
| 1, 1x         | 144     | 1,531,936 | 143,078,976 | 33.6 |
| 2, 1x         | 200     | 1,733,848 | 140,836,512 | 32.7 |
| 3, 1x         | 240     | 1,865,728 | 137,460,672 | 32.6 (34.5 without shuffle) |
| 4, 1x         | 272     | 1,968,344 | 134,339,776 | 32.8 |
| 8, 1x         | 384     | 2,434,768 | 138,365,952 | 32.4 (37.6 without shuffle) |
| 1, 0.5x       | 72      | 534,484   | 38,517,408  | 45.1 |
| 3, 0.5x       | 120     | 718,324   | 37,589,856  | 43.2 |
| 1, 0.25x      | 36      | 209,746   | 11,003,184  | 57.1 |
| 3, 0.25x      | 60      | 305,902   | 11,009,808  | 55.0 |
| 3, 1.5x       | 360     | 3,442,168 | 292,443,552 | 28.5 |
| 3, 2x         | 480     | 5,450,776 | 524,045,184 | 26.3 |
(3 x 224 x 224 inputs, 1000 classes, groups 3, width 1: the defaults. Table 1's 143, 140, 137, 133, 137 MFLOPs
at 1x are these MACs without the linear layer.)

Widths. Stage 2 has the multiple of 4 * groups nearest to width times the table's number, so that every group is
whole. The paper does not say how it rounded. The stem has 24 * width channels below width 1, above it 24 times the
whole part (24 at 1.5x, which gives the paper's 292M), to the nearest multiple of groups. The paper's 13 MFLOPs at
0.25x fit a stem of 12, not this one of 6.
Below 64 pixels the stem has stride 1 and no pooling, so that 32 pixels end at 4x4.
se: squeeze-and-excite before the sum. The paper does not give its reduction; the usual 16 makes 526M at 2x, its 527M.
Differs: megvii's code shuffles after the depthwise, by the inverse permutation (equal only where a group has as
many channels as there are groups), and its linear layer has no bias. Here the shuffle is the paper's;
shuffle="inverse" takes that permutation, for its checkpoints. The pooled input comes first, and the ReLU before the
concatenation, as in megvii's code; the pooled input is not negative.
"""

from __future__ import annotations

import torch
from torch import nn

from aerogel.nets.blocks import (
    IMAGENET_FROM,
    Net,
    Norm,
    Residual,
    SqueezeExcite,
    batch_norm_of,
    check,
    conv_unit,
    initialise,
    named,
    nearest_multiple,
    pooled_linear,
)

STAGE_2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # groups -> output channels
UNITS = (4, 8, 4)
STEM = 24
BOTTLENECK = 4
REDUCTION = 16  # of squeeze-and-excite


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels (groups, c) become (c, groups): channel k of group g goes to place k * groups + g. x is (n, c, h, w)."""
    _, channels, height, width = x.shape
    split = x.reshape(-1, groups, channels // groups, height, width)
    return split.transpose(1, 2).reshape(-1, channels, height, width)


class ChannelShuffle(nn.Module):
    """`channel_shuffle` as a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> the same shape."""
        return channel_shuffle(x, self.groups)


class Concatenated(nn.Module):
    """The channels of shortcut(x), then those of body(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> (n, channels of both, h', w')."""
        return torch.cat((self.shortcut(x), self.body(x)), dim=1)


def shufflenet_v1(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    groups: int = 3,
    width: float = 1.0,
    shuffle: bool | str = True,
    se: bool = False,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """ShuffleNet; groups 1, 2, 3, 4 or 8; shuffle true, false (the paper's ablation) or inverse; input_size from 8."""
    name = "shufflenet_v1"
    check(name, num_classes=num_classes, in_channels=in_channels, groups=groups, width=width, shuffle=shuffle, se=se)
    check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum)
    norm = batch_norm_of(bn_eps, bn_momentum)
    small = input_size < IMAGENET_FROM
    channels = nearest_multiple(STEM * (width if width < 1 else int(width)), groups)
    stem = conv_unit(in_channels, channels, 3, stride=1 if small else 2, norm=norm)
    if not small:
        stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
    features = named(stem=stem)
    out = nearest_multiple(STAGE_2[groups] * width, BOTTLENECK * groups)
    for number, units in enumerate(UNITS, start=2):
        stage = nn.Sequential()
        for index in range(1, units + 1):
            first = number == 2 and index == 1
            body = bottleneck(
                channels,
                out,
                stride=2 if index == 1 else 1,
                groups=(1 if first else groups, groups),
                shuffle=shuffle,
                se=se,
                norm=norm,
            )
            stage.add_module(f"block{index}", unit(body, strided=index == 1))
            channels = out
        features.add_module(f"stage{number}", stage)
        out *= 2
    net = Net(features, pooled_linear(channels, num_classes))
    initialise(net)
    return net


def bottleneck(
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    groups: tuple[int, int],
    shuffle: bool | str,
    se: bool,
    norm: Norm,
) -> nn.Sequential:
    """All of a unit but its shortcut and last ReLU; groups of the first 1x1 and of the last.

    (n, in, h, w) -> (n, out, h, w), or with stride 2 (n, out - in, h / 2, w / 2).
    """
    middle = out_channels // BOTTLENECK
    made = out_channels if stride == 1 else out_channels - in_channels
    body = named(reduce=conv_unit(in_channels, middle, 1, groups=groups[0], norm=norm))
    if shuffle and groups[1] > 1:
        inverse = shuffle == "inverse"  # is the shuffle of as many groups as a group has channels
        body.add_module("shuffle", ChannelShuffle(middle // groups[1] if inverse else groups[1]))
    body.add_module("depthwise", conv_unit(middle, middle, 3, stride=stride, groups=middle, norm=norm, act=None))
    body.add_module("expand", conv_unit(middle, made, 1, groups=groups[1], norm=norm, act=None))
    if se:
        body.add_module("se", SqueezeExcite(made, max(1, made // REDUCTION), nn.Sigmoid))
    return body


def unit(body: nn.Sequential, *, strided: bool) -> nn.Module:
    """The body joined with its input: ReLU of the sum, or after the pooled input where the body has stride 2."""
    if not strided:
        return Residual(body, act=nn.ReLU())
    body.add_module("act", nn.ReLU())
    return Concatenated(body, nn.AvgPool2d(3, stride=2, padding=1))
