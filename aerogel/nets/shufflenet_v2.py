"""ShuffleNetV2. Ma, Zhang, Zheng, Sun 2018, "ShuffleNet V2: Practical guidelines for efficient CNN architecture
design", arXiv:1807.11164, Table 5 and appendix.

Unit: the channels are split in two halves. One is kept; the other goes through 1x1, ReLU, 3x3 depthwise, 1x1, ReLU.
Both are concatenated and their channels shuffled. With stride 2 (and at the head of every stage) nothing is split:
the kept side is 3x3 depthwise, 1x1, ReLU of all channels, so that the channels double.
Net: conv3x3 24 stride 2, max pooling 3x3 stride 2, stages 2 to 4 of 4, 8, 4 units, conv1x1, global average pool,
linear. Channels double from stage to stage.

| net                        | stage 2 | last | params     | MACs           | top-1 error, the paper's |
| 0.5x                       | 48      | 1024 | 1,366,792  | 40,476,448     | 39.7 |
| 1x                         | 116     | 1024 | 2,278,604  | 144,907,992    | 30.6 |
| 1.5x                       | 176     | 1024 | 3,503,624  | 295,759,392    | 27.4 |
| 2x                         | 244     | 2048 | 7,393,996  | 583,253,464    | 25.1 (24.6 with se) |
| layout=50                  | 244     | 2048 | 16,573,534 | 2,304,152,672  | 22.8 |
| layout=164, se, residual   | 340     | 2048 | 75,717,922 | 12,541,354,352 | 18.56 |
(3 x 224 x 224 inputs, 1000 classes, the mobile layout at width 1: the defaults. The paper counts about 1 % more: 41,
146, 299, 591 MFLOPs; its 2.3G and 12.7G are those of the last two.)

Another width has its share of the next published one above it (beyond the widest, of the widest): stage 2 at 0.75 is
0.75 * 116, to the nearest multiple of 4. The last 1x1 has 2048 channels where stage 2 has 244 or more.
Layouts 50 and 164 begin with a stage at stride 1; the stem of 164 is three convolutions.
Below 64 pixels the stem has stride 1 and no pooling, so that 32 pixels end at 4x4.
se: squeeze-and-excite ends the computed side. The paper does not give its reduction; here the usual 16.
residual: the half that is computed on is added before the last ReLU, for nets over 100 layers.
Follows torchvision: halves are split at a unit's start, the kept one comes first, the shuffle ends the unit, the
linear layer has a bias. megvii's code takes even and odd channels at the start instead, gives the shortcut of a
down-sampling unit as many channels as its input (wiring="even_odd", for its checkpoints; `merged` means nothing there),
has no such bias, and drops out 0.2 at 2x.

The merged unit. The paper (section 4) calls concatenation, shuffle and the next split one element-wise operation.
Plain: concatenate, copy transposed, split. Merged: one concatenation along a new axis writes the two sides interleaved,
which is the shuffled tensor; the next split is a view. `merged` chooses, in training and inference; weights, results
and gradients are the same, bit by bit. A copy less in every unit: at 1x 33.3 MB of access instead of 39.8.
Time of merged over plain with its 95 % interval (2026-11-23, benchmarks/merged_shuffle.py, one thread of a busy
two-core AMD EPYC, batch 1, 224 x 224, onnxruntime 1.32, torch 2.13): ONNX Runtime, which copies the split,
0.970 [0.931, 0.996] at 1x, 0.997 [0.961, 1.012] at 0.5x; PyTorch 0.958 [0.929, 1.002] at 1x; no difference found
in training (1.016 [0.954, 1.049]) and under torch.compile (1.028 [0.902, 1.093], 0.5x, 96 x 96).
The other way to merge, to split first so that a unit hands on the two halves, was not faster: ONNX Runtime
0.992 [0.981, 1.002] at 1x. It would need even halves too, which a cut need not leave.
"""

from __future__ import annotations

from typing import NamedTuple

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
from aerogel.nets.shufflenet_v1 import channel_shuffle


class Layout(NamedTuple):
    """Stem: output channels of its convolutions. stage2: width -> channels. Units and first stride by stage."""

    stem: tuple[int, ...]
    stage2: dict[float, int]
    units: tuple[int, ...]
    strides: tuple[int, ...]


LAYOUTS = {
    "mobile": Layout((24,), {0.5: 48, 1: 116, 1.5: 176, 2: 244}, (4, 8, 4), (2, 2, 2)),
    "50": Layout((64,), {1: 244}, (3, 4, 6, 3), (1, 2, 2, 2)),
    "164": Layout((64, 64, 128), {1: 340}, (10, 10, 23, 10), (1, 2, 2, 2)),
}
LAST, WIDE_LAST, WIDE_FROM = 1024, 2048, 244  # channels of the last 1x1; the wide one from that stage 2 on
REDUCTION = 16  # of squeeze-and-excite


class Unit(nn.Module):
    """shuffle(concatenate(kept, body(taken))), where kept and taken are the two halves of x.

    With a shortcut, kept is shortcut(x) and taken is x. `merged` may be switched at any time.
    Wired even_odd: concatenate(kept, body(taken)), where kept are the even channels of x and taken the odd ones.
    """

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, *, merged: bool = True, wiring: str = "halves"
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.body = body
        self.merged = merged
        self.wiring = wiring

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> (n, 2 * channels of the body, h', w')."""
        if self.shortcut is not None:
            kept, taken = self.shortcut(x), x
        elif self.wiring == "even_odd":
            kept, taken = x[:, ::2], x[:, 1::2]
        else:
            kept, taken = x.chunk(2, dim=1)
        made = self.body(taken)
        if self.wiring == "even_odd":
            return torch.cat((kept, made), dim=1)
        return interleave(kept, made) if self.merged else channel_shuffle(torch.cat((kept, made), dim=1), 2)


def interleave(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a0, b0, a1, b1, ...: channel_shuffle(concatenated, 2) in one copy. (n, c, h, w) twice -> (n, 2c, h, w)."""
    return torch.cat((a.unsqueeze(2), b.unsqueeze(2)), dim=2).flatten(1, 2)


def shufflenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    width: float = 1.0,
    se: bool = False,
    residual: bool = False,
    layout: str | int = "mobile",
    merged: bool = True,
    wiring: str = "halves",
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> Net:
    """ShuffleNetV2; layout mobile, or 50 or 164 of the appendix; wiring halves or even_odd; input_size from 8."""
    name = "shufflenet_v2"
    check(name, num_classes=num_classes, in_channels=in_channels, width=width, se=se, residual=residual)
    check(name, smallest=8, input_size=input_size, layout=layout, merged=merged, wiring=wiring)
    check(name, bn_eps=bn_eps, bn_momentum=bn_momentum)
    norm = batch_norm_of(bn_eps, bn_momentum)
    table = LAYOUTS[str(layout)]
    features = named(stem=_stem(in_channels, table.stem, norm, small=input_size < IMAGENET_FROM))
    channels, out = table.stem[-1], _stage2(table.stage2, width)
    last = WIDE_LAST if out >= WIDE_FROM else LAST
    for number, (units, stride) in enumerate(zip(table.units, table.strides, strict=True), start=2):
        half = out // 2
        through = half if wiring == "halves" else channels  # channels of the first unit's shortcut
        shortcut = named(
            depthwise=conv_unit(channels, channels, 3, stride=stride, groups=channels, norm=norm, act=None),
            project=conv_unit(channels, through, 1, norm=norm),
        )
        body = _body(channels, half, out - through, stride=stride, se=se, residual=False, norm=norm)
        stage = named(block1=Unit(body, shortcut, merged=merged, wiring=wiring))
        for index in range(2, units + 1):
            body = _body(half, half, half, stride=1, se=se, residual=residual, norm=norm)
            stage.add_module(f"block{index}", Unit(body, merged=merged, wiring=wiring))
        features.add_module(f"stage{number}", stage)
        channels, out = out, 2 * out
    features.add_module("last", conv_unit(channels, last, 1, norm=norm))
    net = Net(features, pooled_linear(last, num_classes))
    initialise(net)
    return net


def _stage2(table: dict[float, int], width: float) -> int:
    """The channels at a published width; at another one their share of the next above (of the widest, beyond it)."""
    published = min((known for known in table if known >= width), default=max(table))
    return nearest_multiple(table[published] * width / published, 4)


def _stem(in_channels: int, table: tuple[int, ...], norm: Norm, *, small: bool) -> nn.Sequential:
    """3x3 convolutions, the first with stride 2, and max pooling; for small images stride 1 and no pooling."""
    stem = nn.Sequential()
    channels = in_channels
    for number, out in enumerate(table, start=1):
        stride = 2 if number == 1 and not small else 1
        stem.add_module(f"conv{number}", conv_unit(channels, out, 3, stride=stride, norm=norm))
        channels = out
    if not small:
        stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
    return stem


def _body(in_channels: int, half: int, made: int, *, stride: int, se: bool, residual: bool, norm: Norm) -> nn.Module:
    """The side of a unit that computes, `half` channels inside: (n, in, h, w) -> (n, made, h / stride, w / stride)."""
    body = named(
        reduce=conv_unit(in_channels, half, 1, norm=norm),
        depthwise=conv_unit(half, half, 3, stride=stride, groups=half, norm=norm, act=None),
        expand=conv_unit(half, made, 1, norm=norm, act=None if residual else nn.ReLU),
    )
    if se:
        body.add_module("se", SqueezeExcite(made, max(1, made // REDUCTION), nn.Sigmoid))
    return Residual(body, act=nn.ReLU()) if residual else body
