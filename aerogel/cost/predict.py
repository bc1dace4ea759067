"""Latency predicted from single kernels. After Zhang et al. 2021, "nn-Meter: towards accurate latency prediction of
deep-learning model inference on diverse edge devices", MobiSys: a network takes as long as its fused kernels take
one after the other.

    latency = a * sum of kernels + b * number of kernels + c

nn-Meter detects what a runtime fuses by probing it and predicts each kernel by a random forest. Here the runtime says
what it fused (`aerogel.cost.runtime`), a kernel's time is looked up by its exact shapes in a table that is measured
once (`aerogel.cost.kernels`), and what cannot be run by itself, or was not measured, is estimated by the device's
roofline.
a, b and c belong to the device: `aerogel.cost.calibrate` fits them on a few networks.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from aerogel.cost.device import Device
from aerogel.cost.kernels import KernelTable
from aerogel.cost.roofline import kernel as kernel_roofline
from aerogel.cost.runtime import Kernel, Runtime


@dataclass(frozen=True)
class Prediction:
    """`estimated`: {op: how many of its kernels were not in the table and come from the roofline}. `unread`: nodes that
    the runtime's profiler says nothing of, whose time is missing."""

    ms: float
    kernels: int
    estimated: dict[str, int]
    unread: tuple[str, ...]
    kernel_ms: tuple[tuple[str, float], ...]  # (module, milliseconds) in order, less the part that no kernel has


def predict(runtime: Runtime, table: KernelTable, device: Device, *, measure: bool = True) -> Prediction:
    """The latency of one run of a network as the runtime runs it, on the machine that the table and the device are of.

    measure: kernels that the table lacks are measured and kept; else they are estimated.
    """
    held = table.measure(runtime) if measure else table.look_up(runtime)
    kernel_ms = []
    estimated: Counter[str] = Counter()
    for one in runtime.kernels:
        ms = held[one.name]
        if ms is None:
            estimated[one.op] += 1
            ms = estimate(one, device)
        kernel_ms.append((one.module, device.kernel_scale * ms + device.kernel_us / 1000))
    total = sum(ms for _, ms in kernel_ms) + device.run_us / 1000
    return Prediction(total, len(runtime.kernels), dict(estimated), runtime.unread, tuple(kernel_ms))


def estimate(one: Kernel, device: Device) -> float:
    """Milliseconds of a kernel by the device's roofline."""
    return kernel_roofline(family_of(one), operations(one), one.bytes, device).ms


def family_of(one: Kernel) -> str:
    """The family of a kernel of ONNX Runtime, in the words of `aerogel.cost.ops.family`."""
    if one.op in ("Conv", "FusedConv"):
        channels, weight = one.inputs[0][1][1], one.inputs[1][1]
        groups = channels // weight[1]
        if groups <= 1:
            return "pointwise" if math.prod(weight[2:]) == 1 else "conv"
        return "depthwise" if weight[1] == 1 else "grouped"
    return next((family for family, ops in _FAMILIES.items() if one.op in ops), "elementwise")


def operations(one: Kernel) -> int:
    """Its MACs; for a kernel without any, its operations as `aerogel.cost.ops.ELEMENTWISE` counts them: none where
    numbers only move."""
    family = family_of(one)
    if family == "move" or not one.outputs:
        return 0
    numel = math.prod(one.outputs[0][1])
    if one.op in ("Conv", "FusedConv"):
        return numel * math.prod(one.inputs[1][1][1:])
    if one.op == "ConvTranspose":
        return math.prod(one.inputs[0][1]) * math.prod(one.inputs[1][1][1:])
    if family == "matmul":
        return numel * one.inputs[0][1][-1]
    if family == "reduce" or one.op.startswith("Global"):
        numel = math.prod(one.inputs[0][1])
    elif family == "pool":
        numel *= math.prod(next((a.ints for a in one.node.attribute if a.name == "kernel_shape"), ()))
    return numel * _EACH.get(one.op, 1)


_EACH = {
    **dict.fromkeys(["Softmax", "LogSoftmax"], 5),
    **dict.fromkeys(["LayerNormalization", "SkipLayerNormalization", "InstanceNormalization"], 7),
    "BatchNormalization": 2,
    **dict.fromkeys(["Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Pow", "Elu", "Mish",
                     "Softplus", "Gelu", "BiasGelu", "QuickGelu", "FastGelu"], 4),
}  # fmt: skip
_FAMILIES = {
    "transposed": {"ConvTranspose"},
    "matmul": {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"},
    "recurrent": {"LSTM", "GRU", "RNN"},
    "norm": {"LayerNormalization", "SkipLayerNormalization", "InstanceNormalization", "BatchNormalization"},
    "pool": {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"},
    "reduce": {"ReduceMean", "ReduceSum", "ReduceMax", "Softmax", "LogSoftmax", "ArgMax", "TopK"},
    "move": {"ReorderInput", "ReorderOutput", "Transpose", "Concat", "Split", "Slice", "Gather", "Reshape", "Unsqueeze",
             "Squeeze", "Flatten", "Expand", "Pad", "Tile", "Identity", "Cast", "Resize", "ScatterND"},
}  # fmt: skip
