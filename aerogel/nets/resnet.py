"""ResNet. He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", arXiv:1512.03385; resnet164: the
same authors 2016, "Identity mappings in deep residual networks", arXiv:1603.05027.

y = ReLU(F(x) + shortcut(x)); the shortcut is x, or, where the shape changes, a 1x1 convolution with BN
(option B). resnet164: y = F(x) + x, BN and ReLU before each convolution of F and before the classifier; where the
shape changes, y = G(a) + conv1x1(a), a = ReLU(BN(x)), G the rest of F.

| net       | table             | params     | MACs          | the papers' errors  |
| resnet18  | Table 1           | 11,689,512 | 1,814,073,344 | 27.88 % (ten crops) |
| resnet34  | Table 1           | 21,797,672 | 3,663,761,408 | 24.52 % (ten crops) |
| resnet50  | Table 1           | 25,557,032 | 4,089,184,256 | 22.85 % (ten crops) |
| resnet20  | section 4.2, n=3  | 272,474    | 40,813,184    | 8.75 %              |
| resnet56  | section 4.2, n=9  | 855,770    | 125,747,840   | 6.97 %              |
| resnet110 | section 4.2, n=18 | 1,730,714  | 253,149,824   | 6.43 %              |
| resnet164 | 2016, n=18        | 1,703,258  | 247,646,720   | 5.46 %              |
| resnet29  | 2016, n=3         | 312,218    | 47,106,560    | not in the papers   |
(Table 1: 3 x 224 x 224, 1000 classes; section 4.2: 3 x 32 x 32, 10 classes. These are the defaults. Errors: top-1 on
ImageNet, on CIFAR-10.)

Stems. Table 1: 7x7 stride 2 and 3x3 max pooling stride 2; below 64 pixels, where that would throw the image
away, 3x3 stride 1 and no pooling, so that 32 pixels end at 4x4. Section 4.2: always 3x3 stride 1.
width multiplies all channels, to multiples of 8.
Differs: in bottlenecks the 3x3 convolution carries the stride, not the 1x1 before it ("v1.5": same parameters,
6 % more MACs in resnet50). The paper's CIFAR nets have option A, zero-padded shortcuts; here option B, so that
channels can be cut (resnet20: 272,474 parameters where option A has 269,722). resnet164 is that of network slimming
(Liu et al. 2017, arXiv:1708.06519: 1.70M) but for its three strided or widening shortcuts, which read x there.
"""

from __future__ import annotations

from collections.abc import Callable
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
    preact_unit,
    scaled,
)


class Row(NamedTuple):
    """One stage: its channels, the stride of its first block, and its blocks in each of the nets."""

    layer: str
    channels: int
    stride: int
    blocks: dict[str, int]


TABLE_1 = (
    Row("conv2_x", 64, 1, {"resnet18": 2, "resnet34": 3, "resnet50": 3}),
    Row("conv3_x", 128, 2, {"resnet18": 2, "resnet34": 4, "resnet50": 4}),
    Row("conv4_x", 256, 2, {"resnet18": 2, "resnet34": 6, "resnet50": 6}),
    Row("conv5_x", 512, 2, {"resnet18": 2, "resnet34": 3, "resnet50": 3}),
)
SECTION_4_2 = (
    Row("32x32", 16, 1, {"resnet20": 3, "resnet56": 9, "resnet110": 18, "resnet29": 3, "resnet164": 18}),
    Row("16x16", 32, 2, {"resnet20": 3, "resnet56": 9, "resnet110": 18, "resnet29": 3, "resnet164": 18}),
    Row("8x8", 64, 2, {"resnet20": 3, "resnet56": 9, "resnet110": 18, "resnet29": 3, "resnet164": 18}),
)
EXPANSION = 4  # a bottleneck block ends with this many times the channels of its row
Block = Callable[[int, int, int, Norm], nn.Module]  # (input channels, channels, stride, norm)


def basic_block(in_channels: int, channels: int, stride: int, norm: Norm) -> Residual:
    """Two 3x3 convolutions: (n, in_channels, h, w) -> (n, channels, h / stride, w / stride)."""
    body = named(
        conv1=conv_unit(in_channels, channels, 3, stride=stride, norm=norm),
        conv2=conv_unit(channels, channels, 3, norm=norm, act=None),
    )
    return Residual(body, _shortcut(in_channels, channels, stride, norm), nn.ReLU())


def bottleneck_block(in_channels: int, channels: int, stride: int, norm: Norm) -> Residual:
    """1x1, 3x3, 1x1: (n, in_channels, h, w) -> (n, 4 * channels, h / stride, w / stride)."""
    out = EXPANSION * channels
    body = named(
        conv1=conv_unit(in_channels, channels, 1, norm=norm),
        conv2=conv_unit(channels, channels, 3, stride=stride, norm=norm),
        conv3=conv_unit(channels, out, 1, norm=norm, act=None),
    )
    return Residual(body, _shortcut(in_channels, out, stride, norm), nn.ReLU())


def preact_block(in_channels: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    """1x1, 3x3, 1x1, BN and ReLU before each: (n, in_channels, h, w) -> (n, 4 * channels, h / stride, w / stride).

    Where the shape changes, the shortcut too reads what the first BN and ReLU make.
    """
    out = EXPANSION * channels
    conv2 = preact_unit(channels, channels, 3, stride=stride, norm=norm)
    conv3 = preact_unit(channels, out, 1, norm=norm)
    if stride == 1 and in_channels == out:
        return Residual(named(conv1=preact_unit(in_channels, channels, 1, norm=norm), conv2=conv2, conv3=conv3))
    body = named(conv1=nn.Conv2d(in_channels, channels, 1, bias=False), conv2=conv2, conv3=conv3)
    shortcut = nn.Conv2d(in_channels, out, 1, stride, bias=False)
    return named(bn=norm(in_channels), act=nn.ReLU(), residual=Residual(body, shortcut))


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module | None:
    """Option B: a 1x1 convolution where the shape changes, else None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return conv_unit(in_channels, out_channels, 1, stride=stride, norm=norm, act=None)


def _resnet(name: str, table: tuple[Row, ...], block: Block, classes: int, size: int) -> Callable[..., Net]:
    """The constructor of one net of a table; classes and size are its default num_classes and input_size."""

    def construct(
        *,
        num_classes: int = classes,
        in_channels: int = 3,
        input_size: int = size,
        width: float = 1.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> Net:
        check(name, num_classes=num_classes, in_channels=in_channels, width=width)
        check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum)
        norm = batch_norm_of(bn_eps, bn_momentum)
        channels = scaled(table[0].channels, width)
        if table is TABLE_1 and input_size >= IMAGENET_FROM:
            stem = conv_unit(in_channels, channels, 7, stride=2, norm=norm)
            stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        elif block is preact_block:
            stem = named(conv=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
        else:
            stem = conv_unit(in_channels, channels, 3, norm=norm)
        features = named(stem=stem)
        for number, row in enumerate(table, start=1):
            stage = nn.Sequential()
            inner = scaled(row.channels, width)
            for index in range(1, row.blocks[name] + 1):
                stride = row.stride if index == 1 else 1
                stage.add_module(f"block{index}", block(channels, inner, stride, norm))
                channels = inner if block is basic_block else inner * EXPANSION
            features.add_module(f"stage{number}", stage)
        if block is preact_block:
            features.add_module("last", named(bn=norm(channels), act=nn.ReLU()))
        net = Net(features, pooled_linear(channels, num_classes))
        initialise(net)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: the paper's net of that depth; input_size from 8; see aerogel/nets/resnet.py."
    return construct


resnet18 = _resnet("resnet18", TABLE_1, basic_block, 1000, 224)
resnet34 = _resnet("resnet34", TABLE_1, basic_block, 1000, 224)
resnet50 = _resnet("resnet50", TABLE_1, bottleneck_block, 1000, 224)
resnet20 = _resnet("resnet20", SECTION_4_2, basic_block, 10, 32)
resnet56 = _resnet("resnet56", SECTION_4_2, basic_block, 10, 32)
resnet110 = _resnet("resnet110", SECTION_4_2, basic_block, 10, 32)
resnet29 = _resnet("resnet29", SECTION_4_2, preact_block, 10, 32)
resnet164 = _resnet("resnet164", SECTION_4_2, preact_block, 10, 32)
