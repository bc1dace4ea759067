"""DenseNet. Huang, Liu, van der Maaten, Weinberger 2016, "Densely connected convolutional networks",
arXiv:1608.06993, Table 1 and section 3.

Layer: y = [x, F(x)], the k new channels of F behind those of x. F is BN, ReLU, conv3x3 k; in a bottleneck (B) BN,
ReLU, conv1x1 4k, BN, ReLU, conv3x3 k. Transition between blocks: BN, ReLU, conv1x1 to `compression` times the
channels (C), 2x2 average pooling.
Net: stem, blocks and transitions, BN, ReLU, global average pool, linear.

| net         | design         | params    | MACs          | the paper's error                    |
| densenet40  | k=12           | 1,019,722 | 264,812,928   | 5.24 % on CIFAR-10 with augmentation |
| densenet121 | k=32, B, C=0.5 | 7,978,856 | 2,834,161,664 | 25.02 % on ImageNet, top-1, one crop |
(densenet40: 3 x 32 x 32, 10 classes; densenet121: 3 x 224 x 224, 1000 classes. These are the defaults.)

Stems. densenet40: conv3x3 16. densenet121: 7x7 stride 2, BN, ReLU and 3x3 max pooling stride 2; below 64 pixels the
paper's for CIFAR, conv3x3 2k, so that 32 pixels end at 4x4.
growth is k, the paper's own width. dropout follows every convolution but the stem's; the paper has 0.2 on CIFAR
without augmentation. He initialisation, as the paper.
Differs: network slimming (Liu et al. 2017, arXiv:1708.06519) prunes a DenseNet-40 of 1.02M, as here; its PyTorch
code builds one of 1.06M, with a stem of 24 channels. The linear layer starts from N(0, 0.01).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
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
    preact_unit,
)


class Design(NamedTuple):
    """The layers of each dense block, the growth rate k, whether layers are bottlenecks (B), the compression (C)."""

    blocks: tuple[int, ...]
    k: int
    bottleneck: bool
    compression: float


DENSENET_40 = Design((12, 12, 12), k=12, bottleneck=False, compression=1.0)  # depth 3 * 12 + 4
DENSENET_121 = Design((6, 12, 24, 16), k=32, bottleneck=True, compression=0.5)  # Table 1
CIFAR_STEM = 16
BOTTLENECK = 4  # the 1x1 convolution of a bottleneck layer makes this many times k channels


class DenseLayer(nn.Module):
    """x and, behind it, the new channels body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, c, h, w) -> (n, c + k, h, w)."""
        return torch.cat([x, self.body(x)], 1)


def dense_layer(channels: int, k: int, bottleneck: bool, dropout: float, norm: Norm) -> DenseLayer:
    """(n, channels, h, w) -> (n, channels + k, h, w)."""
    body = nn.Sequential()
    for number, (out, kernel) in enumerate([(BOTTLENECK * k, 1), (k, 3)] if bottleneck else [(k, 3)], start=1):
        body.add_module(f"conv{number}", _unit(channels, out, kernel, dropout, norm))
        channels = out
    return DenseLayer(body)


def _unit(channels: int, out: int, kernel: int, dropout: float, norm: Norm) -> nn.Sequential:
    """BN, ReLU, convolution, dropout if any: (n, channels, h, w) -> (n, out, h, w)."""
    unit = preact_unit(channels, out, kernel, norm=norm)
    if dropout:
        unit.add_module("dropout", nn.Dropout(dropout))
    return unit


def _densenet(name: str, design: Design, classes: int, size: int) -> Callable[..., Net]:
    """The constructor of one design; classes and size are its default num_classes and input_size."""

    def construct(
        *,
        num_classes: int = classes,
        in_channels: int = 3,
        input_size: int = size,
        growth: int = design.k,
        dropout: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> Net:
        check(name, num_classes=num_classes, in_channels=in_channels, growth=growth, dropout=dropout)
        check(name, smallest=8, input_size=input_size, bn_eps=bn_eps, bn_momentum=bn_momentum)
        norm = batch_norm_of(bn_eps, bn_momentum)
        channels = 2 * growth if design.bottleneck else CIFAR_STEM
        if design is DENSENET_121 and input_size >= IMAGENET_FROM:
            stem = conv_unit(in_channels, channels, 7, stride=2, norm=norm)
            stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        else:
            stem = named(conv=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
        features = named(stem=stem)
        for number, layers in enumerate(design.blocks, start=1):
            stage = nn.Sequential()
            for index in range(1, layers + 1):
                stage.add_module(f"layer{index}", dense_layer(channels, growth, design.bottleneck, dropout, norm))
                channels += growth
            features.add_module(f"stage{number}", stage)
            if number < len(design.blocks):
                out = int(channels * design.compression)
                transition = _unit(channels, out, 1, dropout, norm)
                transition.add_module("pool", nn.AvgPool2d(2))
                features.add_module(f"transition{number}", transition)
                channels = out
        features.add_module("last", named(bn=norm(channels), act=nn.ReLU()))
        net = Net(features, pooled_linear(channels, num_classes))
        initialise(net)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: the paper's net of that depth; input_size from 8; see aerogel/nets/densenet.py."
    return construct


densenet40 = _densenet("densenet40", DENSENET_40, 10, 32)
densenet121 = _densenet("densenet121", DENSENET_121, 1000, 224)
