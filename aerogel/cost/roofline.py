"""The roofline: how long each layer must take on a device, and what holds it there. Williams, Waterman, Patterson 2009,
"Roofline: an insightful visual performance model for multicore architectures", CACM 52(4).

    t = max(operations / speed of its kernel family, bytes / bandwidth) + the cost of starting a kernel

bytes are the folded view's access bytes; the bandwidth is the cache's for a layer whose bytes fit there, else the
memory's. A layer is compute-bound or memory-bound by the larger of the two, overhead-bound where starting it takes
longer than both. What an inference runtime fuses away, and what is only a view of memory, takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from aerogel.cost.count import Layer
from aerogel.cost.device import Device


class Timing(NamedTuple):
    """Predicted milliseconds of one layer."""

    ms: float
    bound: Literal["compute", "memory", "overhead", "none"]


def roofline(layer: Layer, device: Device) -> Timing:
    """The time of one layer on the device by its roofline."""
    if not layer.runs:
        return Timing(0.0, "none")
    return kernel(layer.family, layer.macs or layer.flops, layer.access_bytes, device)


def kernel(family: str, operations: float, access_bytes: float, device: Device) -> Timing:
    """The time of a kernel of that family, with so many MACs (or element-wise operations) and bytes of access."""
    compute = operations / device.speed(family)
    memory = access_bytes / device.bandwidth(int(access_bytes))
    overhead = device.overhead_us * 1e-6
    ms = 1000 * (max(compute, memory) + overhead)
    if overhead > max(compute, memory):
        return Timing(ms, "overhead")
    return Timing(ms, "compute" if compute >= memory else "memory")


def total_ms(layers: Iterable[Layer], device: Device) -> float:
    """Predicted milliseconds of all layers, one after the other."""
    return sum(roofline(layer, device).ms for layer in layers)
