"""P4, P5: what the memory and the runtime make slow. Practice, not the paper's.

P4-peak   Where three kernels or fewer, of at least four times as many, need over 1.5 times the memory that any other
          needs, they alone decide how much is kept. In bands of rows they compute the same with less: patch-based
          inference, MCUNetV2, Lin et al. 2021, arXiv:2110.15352. At stake are the bytes above, and the time that is
          saved where these move at the cache's bandwidth: none for a kernel that is bound by its MACs, or on a device
          without a cache.
P5-onnx   What PyTorch's exporter has no ONNX function for stops the whole export: the whole predicted time is at stake.
          What ONNX Runtime's CPU provider runs in more kernels than counted reads and writes its tensor once more for
          each. Both tables were read off files that torch 2.13 exported and onnxruntime 1.32 optimised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import Network, plural
from aerogel.cost.ops import ACTIVATIONS

STANDS_OUT, FEW = 1.5, 3

# Kernels over the tensor beyond those that the folded view counts, and what costs fewer.
SLOW: dict[str, tuple[int, str]] = {
    "silu": (1, "hardswish, which is computed inside the convolution"),
    "gelu": (1, "relu or hardswish, which is computed inside the convolution"),
    "elu": (1, "leaky_relu, which is computed inside the convolution"),
    "selu": (1, "leaky_relu, which is computed inside the convolution"),
    "celu": (1, "leaky_relu, which is computed inside the convolution"),
    "mish": (3, "hardswish, which is computed inside the convolution"),
    "softplus": (2, "relu, which is computed inside the convolution"),
    "threshold": (2, "relu, which is computed inside the convolution"),
    "group_norm": (2, "batch_norm, which folds; or instance_norm, one kernel"),
    "rms_norm": (2, "layer_norm, which is one kernel"),
    "glu": (2, "one half times a hardsigmoid"),
    "roll": (1, "no cyclic shift: a slice and a pad"),
}
UNSUPPORTED: dict[str, str] = {
    "adaptive_max_pool2d": "max_pool2d with the kernel that the size asks for",
    "cdist": "the square root of |x|^2 + |y|^2 - 2 x y",
    "cummax": "a fixed number of maximum ops",
    "cumprod": "exp of a cumsum of log",
    "kthvalue": "topk",
    "lgamma": "a polynomial",
    "linalg_cholesky": "compute it outside the network",
    "linalg_inv": "compute it outside the network",
    "linalg_svdvals": "compute it outside the network",
    "median": "topk of half the size",
    "special_erfinv": "a polynomial",
}


def slow_ops(net: Network) -> Iterator[Finding]:
    """One finding a kind of op."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(net.layers):
        if layer.op in SLOW.keys() | UNSUPPORTED.keys() and not net.allowed("P5-onnx", layer):
            kinds.setdefault(layer.op, []).append(i)
    for kind, indices in kinds.items():
        if kind in UNSUPPORTED:
            lost = Amount(net.total_bytes, net.total_ms)
            rewrite = Rewrite(UNSUPPORTED[kind], Amount(0, 0.0), needs_retraining=False)
            yield net.finding(
                "P5-onnx", indices, lost, f"{kind} has no ONNX function: the network cannot be exported", rewrite,
                note="the whole network's time is at stake; the gain is that it runs at all",
            )  # fmt: skip
            continue
        more, instead = SLOW[kind]
        # An activation that runs by itself is counted once already.
        extra = {i: more - (kind in ACTIVATIONS and net.layers[i].runs) for i in indices}
        extra = {i: passes for i, passes in extra.items() if passes}
        if not extra:
            continue
        costs = [_passes(net, i, passes) for i, passes in extra.items()]
        stake = Amount(sum(cost.bytes for cost in costs), sum(cost.ms for cost in costs))
        kernels = plural(max(extra.values()), "more kernel")
        what = f"{kind} {plural(len(extra), 'time')}: each {kernels} in ONNX Runtime than counted"
        yield net.finding("P5-onnx", extra, stake, what, Rewrite(instead, stake, needs_retraining=True))


def _passes(net: Network, i: int, number: int) -> Amount:
    """What it costs to read and write the result of op i so many times."""
    out = net.graph.values[net.graph.ops[i].outputs[0]]
    return Amount(2 * out.bytes * number, net.time("elementwise", out.numel, 2 * out.bytes) * number)


def peak_layer(net: Network) -> Iterator[Finding]:
    kernels = [i for i, layer in enumerate(net.layers) if layer.runs]
    peak = max((net.layers[i].alive_bytes for i in kernels), default=0)
    near = [i for i in kernels if STANDS_OUT * net.layers[i].alive_bytes > peak]
    second = max((net.layers[i].alive_bytes for i in kernels if i not in near), default=0)
    at = [i for i in near if net.layers[i].alive_bytes == peak][:1]
    chosen = [*net.judged("P4-peak", at)]
    if not chosen or not second or len(near) > min(FEW, len(kernels) // 4):
        return
    name = net.layers[chosen[0]].name
    stake = Amount(peak - second, sum(net.ms[i] - _cached(net, i, peak - second) for i in near))
    words = f"compute {name} and its neighbours in {math.ceil(peak / second)} bands of rows, the same numbers"
    yield net.finding(
        "P4-peak",
        chosen,
        stake,
        f"sets the peak of {peak:,} bytes, {peak / second:.1f} times what all but {plural(len(near), 'kernel')} need",
        Rewrite(f"{words}: at best {second:,} bytes", stake, needs_retraining=False),
        peak / second,
        "rows at the seams of the bands are computed twice: some MACs more, not in the gain",
    )


def _cached(net: Network, i: int, bytes_: int) -> float:
    """The time of kernel i where so many bytes of its access move at the cache's bandwidth."""
    layer, device = net.layers[i], net.device
    saved = min(bytes_, layer.access_bytes) * (1 - device.bandwidth(layer.access_bytes) / (1e9 * device.cache_gb_s))
    return net.time(layer.family, layer.macs or layer.flops, layer.access_bytes - max(0.0, saved))
