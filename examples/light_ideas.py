"""The seeds of the light networks, in numbers: MACs, access bytes and measured ONNX Runtime latency, pair by pair.

    python examples/light_ideas.py

1. a standard 3x3 convolution against depthwise 3x3 + pointwise 1x1 (MobileNetV1): work falls to 1/N + 1/9;
2. the pointwise convolution is the bottleneck, groups cut its work (ShuffleNetV1), but not its memory access;
3. MobileNetV3's last stage: the expensive 1x1 convolution moves behind the average pool;
4. ShuffleNetV2: concat + shuffle + split across stacked units as one element-wise operation.
Both files of a pair are timed in turns, one thread, one image; the interval is 95 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import aerogel as ag
from aerogel.cost.latency import compare
from aerogel.export.onnx import export_onnx

CHANNELS, SIZE, GROUPS = 128, 28, 8


def standard() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.ReLU())


def separable(groups: int = 1) -> nn.Module:
    depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
    return nn.Sequential(depthwise, nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1, groups=groups, bias=False), nn.ReLU())


def pairs() -> list[tuple[str, nn.Module, nn.Module, tuple[int, ...]]]:
    """(what changes, before, after, input shape)."""
    features, image = (1, CHANNELS, SIZE, SIZE), (1, 3, 224, 224)
    build = ag.nets.build
    return [
        ("3x3 convolution -> depthwise separable", standard(), separable(), features),
        (f"pointwise -> {GROUPS} groups", separable(), separable(GROUPS), features),
        ("MobileNetV3 last stage: original -> efficient", build("mobilenet_v3_large", last_stage="original"),
         build("mobilenet_v3_large"), image),
        ("ShuffleNetV2 1x: plain -> merged unit", build("shufflenet_v2", merged=False), build("shufflenet_v2"), image),
    ]  # fmt: skip


def main(seconds: float = 4.0) -> None:
    """Prints the table; `seconds` goes to timing each pair."""
    print(f"{'':<47}{'MACs, M':>16}{'access, MiB':>16}   latency after / before")
    for title, before, after, shape in pairs():
        x = torch.zeros(shape)
        costs = [ag.cost.count(ag.capture(net, (x,))) for net in (before, after)]
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
            for net, file in zip((before, after), files, strict=True):
                export_onnx(net.eval(), (x,), file)
            ratio = compare(*files, seconds=seconds)
        macs = " -> ".join(f"{cost.macs / 1e6:.1f}" for cost in costs)
        access = " -> ".join(f"{cost.access_bytes / 2**20:.2f}" for cost in costs)
        times = f"{ratio.a.median_ms:.3f} -> {ratio.b.median_ms:.3f} ms"
        middle = ratio.ratio
        print(f"{title:<47}{macs:>16}{access:>16}   x{middle.value:.2f} [{middle.low:.2f}, {middle.high:.2f}]  {times}")


if __name__ == "__main__":
    main()
