"""LeNet-300-100 and LeNet-5. LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to
document recognition".

Both as pruned by Han, Pool, Tran, Dally 2015, arXiv:1506.02626; its LeNet-5 is Caffe's `lenet.prototxt`.

| net           | layers                                           | params  | MACs      |
| lenet_300_100 | fc 300, ReLU, fc 100, ReLU, fc 10                | 266,610 | 266,200   |
| lenet5        | the table CAFFE below, then fc 500, ReLU, fc 10  | 431,080 | 2,293,000 |
(1 x 28 x 28 inputs, 10 classes: these are the defaults. Biases are counted.)

Caffe's LeNet-5 has one ReLU, after fc 500; none follows a convolution. That is the default here;
conv_relu=True adds them, as many ports do. Weights are Caffe's "xavier": U(-a, a), a = sqrt(3 / fan_in).
Biases start at 0.
Differs: LeCun's own LeNet-5 (6-16-120-84-10, tanh, trained sub-sampling) is another, smaller net. At odd
sizes PyTorch's pooling rounds down where Caffe's rounds up; at 28 the two agree.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from aerogel.nets.blocks import Net, check, named

HIDDEN = (300, 100)


class Row(NamedTuple):
    """One convolution and the max pooling after it, named as in the prototxt."""

    num_output: int
    kernel_size: int
    pool: int


CAFFE = (Row(20, 5, 2), Row(50, 5, 2))
IP1 = 500


def lenet_300_100(*, num_classes: int = 10, in_channels: int = 1, input_size: int = 28) -> Net:
    """The multilayer perceptron; the image is flattened first, so any size and number of channels will do."""
    check("lenet_300_100", num_classes=num_classes, in_channels=in_channels, input_size=input_size)
    features = named(flatten=nn.Flatten())
    fan_in = in_channels * input_size * input_size
    for number, units in enumerate(HIDDEN, start=1):
        features.add_module(f"fc{number}", nn.Linear(fan_in, units))
        features.add_module(f"relu{number}", nn.ReLU())
        fan_in = units
    net = Net(features, named(fc=nn.Linear(fan_in, num_classes)))
    _xavier(net)
    return net


def lenet5(*, num_classes: int = 10, in_channels: int = 1, input_size: int = 28, conv_relu: bool = False) -> Net:
    """Caffe's convolutional net; conv_relu puts a ReLU after each pooling. input_size from 16."""
    check("lenet5", num_classes=num_classes, in_channels=in_channels, conv_relu=conv_relu)
    check("lenet5", smallest=16, input_size=input_size)
    features = nn.Sequential()
    channels, side = in_channels, input_size
    for number, row in enumerate(CAFFE, start=1):
        features.add_module(f"conv{number}", nn.Conv2d(channels, row.num_output, row.kernel_size))
        features.add_module(f"pool{number}", nn.MaxPool2d(row.pool))
        if conv_relu:
            features.add_module(f"relu{number}", nn.ReLU())
        channels, side = row.num_output, (side - row.kernel_size + 1) // row.pool
    classifier = named(
        flatten=nn.Flatten(),
        ip1=nn.Linear(channels * side * side, IP1),
        relu=nn.ReLU(),
        ip2=nn.Linear(IP1, num_classes),
    )
    net = Net(features, classifier)
    _xavier(net)
    return net


def _xavier(net: nn.Module) -> None:
    """In place: Caffe's xavier filler; it looks at fan_in alone, as PyTorch's kaiming with gain 1 does."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
