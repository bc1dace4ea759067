"""AlexNet. Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep convolutional neural networks", as
Caffe's `bvlc_alexnet`, the net that Han, Pool, Tran, Dally 2015, arXiv:1506.02626, pruned.

Five convolutions with ReLU (CAFFE), three of them in two groups; local response normalisation (LRN) after the first
two, x / (1 + 1e-4 / 5 * the sum of squares over five channels)^0.75; 3x3 max pooling stride 2 after the first two
and the last; then fc 4096, 4096, 1000, ReLU and dropout 0.5 after the first two.

| params     | MACs        | Han's params, FLOPs, top-1               |
| 60,965,224 | 724,406,816 | 61M, 1.5G, 57.2 %, as much with 6.7M left |
(3 x 227 x 227 inputs, 1000 classes: the defaults. Biases are counted.)

fc6 has an input for every pixel of the last image, so its size follows input_size. width multiplies the channels,
fc6 and fc7, to multiples of 8. lrn=False leaves LRN out: its five-channel window keeps the channels of conv1 and
conv2 from being cut away.
Below 64 pixels conv1 is 5x5 stride 1 with padding, so that 32 pixels end at 4x4.
Weights start from N(0, 0.01), fc6 and fc7 from N(0, 0.005); the biases of conv2, conv4, conv5, fc6 and fc7 from 0.1.
Differs from the paper, as the prototxt does: those biases start from 1 there, LRN has 2 in the place of 1 and does
not divide by 5, and 227 pixels are needed for its 55x55. Torchvision's alexnet (61,100,840) is another net, without
groups and LRN.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import IMAGENET_FROM, Net, check, named, scaled


class Row(NamedTuple):
    """One convolution, named as in the prototxt; the bias it starts from; whether LRN and pooling follow."""

    num_output: int
    kernel_size: int
    stride: int
    pad: int
    group: int
    bias: float
    norm: bool
    pool: bool


CAFFE = (
    Row(96, 11, 4, 0, 1, 0.0, True, True),
    Row(256, 5, 1, 2, 2, 0.1, True, True),
    Row(384, 3, 1, 1, 1, 0.0, False, False),
    Row(384, 3, 1, 1, 2, 0.1, False, False),
    Row(256, 3, 1, 1, 2, 0.1, False, True),
)
SMALL_CONV1 = CAFFE[0]._replace(kernel_size=5, stride=1, pad=2)
FC = 4096


def alexnet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 227,
    width: float = 1.0,
    lrn: bool = True,
    dropout: float = 0.5,
) -> Net:
    """Caffe's AlexNet; lrn=False leaves its two local response normalisations out. input_size from 8."""
    check("alexnet", num_classes=num_classes, in_channels=in_channels, width=width, lrn=lrn, dropout=dropout)
    check("alexnet", smallest=8, input_size=input_size)
    rows = CAFFE if input_size >= IMAGENET_FROM else (SMALL_CONV1, *CAFFE[1:])
    features = nn.Sequential()
    channels, side = in_channels, input_size
    for number, row in enumerate(rows, start=1):
        out = scaled(row.num_output, width)
        conv = nn.Conv2d(channels, out, row.kernel_size, row.stride, row.pad, groups=row.group)
        stage = named(conv=_fill(conv, 0.01, row.bias), relu=nn.ReLU())
        channels, side = out, (side + 2 * row.pad - row.kernel_size) // row.stride + 1
        if row.norm and lrn:
            stage.add_module("norm", nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0))
        if row.pool:
            stage.add_module("pool", nn.MaxPool2d(3, stride=2, ceil_mode=True))
            side = side // 2  # 3x3 windows, the last of which may hang over
        features.add_module(f"conv{number}", stage)
    hidden = scaled(FC, width)
    classifier = named(
        flatten=nn.Flatten(),
        fc6=_fill(nn.Linear(channels * side * side, hidden), 0.005, 0.1),
        relu6=nn.ReLU(),
        dropout6=nn.Dropout(dropout),
        fc7=_fill(nn.Linear(hidden, hidden), 0.005, 0.1),
        relu7=nn.ReLU(),
        dropout7=nn.Dropout(dropout),
        fc8=_fill(nn.Linear(hidden, num_classes), 0.01, 0.0),
    )
    return Net(features, classifier)


def _fill(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> nn.Module:
    """The layer with the prototxt's fillers: weights N(0, std), every bias the same."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer
