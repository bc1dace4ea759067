"""Checkpoints of megvii-model/ShuffleNet-Series, by the ShuffleNets' authors: ShuffleNetV1 (groups 3 and 8) and V2.

What differs from the papers' form, and what is done about it:
V1  the shuffle is the inverse permutation and follows the depthwise. The depthwise works channel by channel, so its
    weights are put in the shuffled order and the shuffle goes before it; the net must have shuffle="inverse".
V2  a unit starts by keeping the even channels and taking the odd ones, and ends by putting what it made behind; the
    shortcut of a down-sampling unit has as many channels as its input, not half of the output. At 1x and above these
    two parts are unequal, so no re-indexing of channels turns one wiring into the other: the net must have
    wiring="even_odd".
Both read B, G, R from 0 to 255: the first convolution's input channels are turned round, so that our net reads R, G, B.
Their linear layer has no bias: ours becomes zero.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from aerogel.nets.shufflenet_v1 import ChannelShuffle

_BLOCK = re.compile(r"features\.stage(\d+)\.block(\d+)\.(body|shortcut)\.(\w+\.\w+)\.(\w+)")
_V1 = {"body": {"reduce.conv": "branch_main_1.0", "reduce.bn": "branch_main_1.1",
                "depthwise.conv": "branch_main_1.3", "depthwise.bn": "branch_main_1.4",
                "expand.conv": "branch_main_2.0", "expand.bn": "branch_main_2.1"}}  # fmt: skip
_V2 = {"body": {"reduce.conv": "branch_main.0", "reduce.bn": "branch_main.1",
                "depthwise.conv": "branch_main.3", "depthwise.bn": "branch_main.4",
                "expand.conv": "branch_main.5", "expand.bn": "branch_main.6"},
       "shortcut": {"depthwise.conv": "branch_proj.0", "depthwise.bn": "branch_proj.1",
                    "project.conv": "branch_proj.2", "project.bn": "branch_proj.3"}}  # fmt: skip
_OUTSIDE = {
    "features.stem.conv": "first_conv.0",
    "features.stem.bn": "first_conv.1",
    "features.stem.conv1.conv": "first_conv.0",
    "features.stem.conv1.bn": "first_conv.1",
    "features.last.conv": "conv_last.0",
    "features.last.bn": "conv_last.1",
    "classifier.fc": "classifier.0",
}


def shufflenet_v1(keys: list[str]) -> dict[str, str | None]:
    """{our key: megvii's}, None for the bias that it lacks."""
    return _rename(keys, _V1)


def shufflenet_v2(keys: list[str]) -> dict[str, str | None]:
    """{our key: megvii's}, None for the bias that it lacks."""
    return _rename(keys, _V2)


def _rename(keys: list[str], layers: dict[str, dict[str, str]]) -> dict[str, str | None]:
    """Units are numbered through all stages, from 0."""
    matches = {key: _BLOCK.fullmatch(key) for key in keys}
    units = {unit: i for i, unit in enumerate(dict.fromkeys(m.group(1, 2) for m in matches.values() if m))}
    names: dict[str, str | None] = {}
    for key, match in matches.items():
        if match:
            side, layer, leaf = match.group(3, 4, 5)
            names[key] = f"features.{units[match.group(1, 2)]}.{layers[side][layer]}.{leaf}"
        else:
            layer, _, leaf = key.rpartition(".")
            names[key] = f"{_OUTSIDE[layer]}.{leaf}"
    return names | {"classifier.fc.bias": None}


def rgb(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The first convolution's input channels from B, G, R to R, G, B."""
    first = next(key for key in tensors if key.startswith("features.stem."))
    tensors[first] = tensors[first].flip(1)


def shuffled_depthwise(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """As `rgb`; and every depthwise after a shuffle gets its channels in the shuffled order."""
    rgb(net, tensors)
    shuffles = {name: module for name, module in net.named_modules() if isinstance(module, ChannelShuffle)}
    for name, shuffle in shuffles.items():
        depthwise = name.removesuffix("shuffle") + "depthwise."
        channels = tensors[f"{depthwise}conv.weight"].shape[0]
        order = shuffle(torch.arange(channels).view(1, -1, 1, 1)).flatten()
        for key in [key for key in tensors if key.startswith(depthwise) and tensors[key].ndim]:
            tensors[key] = tensors[key][order]
