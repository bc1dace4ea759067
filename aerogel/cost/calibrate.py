"""Measures this machine as a device profile, in about a minute.

1. Speed of each family of kernels: all MACs (or operations) over all time of its kernels, out of a network made of one
   of each (`Families`) and the anchors. Each is timed by itself, as ONNX Runtime runs it.
2. Bandwidth: copying arrays that fit in half the last cache, and arrays eight times as large as it.
3. What starting a kernel costs: the median of those kernels of the anchors that touch next to nothing.
4. The constants of `aerogel.cost.predict`: the anchors, a few networks of the zoo, are timed whole, and
   a * sum of kernels + b * kernels + c is fitted to them by least squares of relative errors, none below zero.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from aerogel import nets
from aerogel.cost.device import THIS, Device
from aerogel.cost.kernels import KernelTable
from aerogel.cost.latency import last_cache_bytes, measure
from aerogel.cost.predict import family_of, operations
from aerogel.cost.runtime import Runtime, read_runtime
from aerogel.errors import AerogelError
from aerogel.export.models import input_of
from aerogel.export.onnx import export_onnx

ANCHORS = (
    "resnet18",
    "resnet20",
    "mobilenet_v2",
    "mobilenet_v2:width=0.35,input_size=96",
    "vgg11:width=0.25,input_size=64",
)
STARTED = 4096  # bytes: a kernel that touches no more only starts


class Families(nn.Module):
    """A few kernels of every family that the anchors lack, none after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(240, 240, 1, groups=3),
                nn.Conv2d(256, 256, 3, padding=1, groups=32),
                nn.ConvTranspose2d(64, 64, 4, 2, 1),
                nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384), nn.LayerNorm(384)),
                nn.Softmax(-1),
                nn.ChannelShuffle(2),
                nn.Hardswish(),
                nn.AvgPool2d(3, 2, 1),
            ]
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


SHAPES = (
    (240, 28, 28),
    (256, 14, 14),
    (64, 14, 14),
    (196, 384),
    (6, 196, 196),
    (116, 28, 28),
    (120, 28, 28),
    (64, 56, 56),
)


def calibrate(*, threads: int = 1, seconds: float = 2.0, say: Callable[[str], None] = lambda text: None) -> Device:
    """The profile of this machine with so many threads; `seconds` goes to timing each anchor whole.

    Kernel times go to the table of `aerogel.cost.kernels`. Raises AerogelError when threads is below 1.
    """
    if threads < 1:
        raise AerogelError(f"calibrate: threads must be >= 1, got {threads}")
    table = KernelTable(threads)
    measured: list[tuple[Runtime, dict[str, float | None]]] = []
    whole: list[tuple[float, int, float]] = []  # sum of kernels, their number, latency
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(Families(), tuple(torch.zeros(1, *shape) for shape in SHAPES), Path(folder) / "f.onnx").path
        for spec in (None, *ANCHORS):
            say(f"{spec or 'one kernel of each family'}")
            if spec is not None:
                path = export_zoo(spec, Path(folder) / "net.onnx")
            runtime = read_runtime(path, threads=threads, seconds=0.2)
            held = table.measure(runtime, again=True)
            measured.append((runtime, held))
            if spec is not None:
                ms = measure(path, threads=threads, seconds=seconds).median_ms
                whole.append((sum(ms or 0 for ms in held.values()), len(runtime.kernels), ms))
    overhead_us = _overhead_us(measured)
    scale, kernel_us, run_us = fit(whole)
    cache = last_cache_bytes()
    return Device(
        name=THIS,
        title=f"this machine, {threads} thread{'s' if threads > 1 else ''}",
        kind="measured",
        source=table.machine,
        date=date.today().isoformat(),
        threads=threads,
        simd=simd_lanes(),
        overhead_us=round(overhead_us, 3),
        cache_bytes=cache // 2,
        cache_gb_s=round(copy_gb_s(cache // 8), 2),
        memory_gb_s=round(copy_gb_s(cache * 4), 2),
        kernel_scale=round(scale, 4),
        kernel_us=round(kernel_us, 4),
        run_us=round(run_us, 4),
        gmacs={family: round(speed, 3) for family, speed in speeds(measured, overhead_us).items()},
    )


def export_zoo(spec: str, path: Path) -> Path:
    """A network of the zoo as an ONNX file, for one image."""
    name, arguments = nets.parse(spec)
    net = nets.build(name, **arguments)
    return export_onnx(net, (torch.zeros(1, *input_of(net)),), path).path


def fit(whole: list[tuple[float, int, float]]) -> tuple[float, float, float]:
    """a, b (us) and c (us) from (sum of kernels in ms, number of kernels, latency in ms); none is negative."""
    sums, counts, latency = np.array(whole, dtype=float).T
    terms = np.stack([sums, counts / 1000, np.full(len(whole), 1e-3)], axis=1) / latency[:, None]
    (a, b, c), _ = nnls(terms, np.ones(len(whole)))
    return float(a), float(b), float(c)


def speeds(measured: list[tuple[Runtime, dict[str, float | None]]], overhead_us: float) -> dict[str, float]:
    """{family: 10^9 MACs (operations) a second}: the work of all its kernels over their time, less their start."""
    work: dict[str, float] = defaultdict(float)
    spent: dict[str, float] = defaultdict(float)
    for runtime, held in measured:
        for one in runtime.kernels:
            ms = held[one.name]
            if ms is not None and one.bytes > STARTED:
                work[family_of(one)] += operations(one)
                spent[family_of(one)] += max(ms - overhead_us / 1000, ms / 10)
    return {family: work[family] / spent[family] / 1e6 for family in sorted(work) if work[family]}


def _overhead_us(measured: list[tuple[Runtime, dict[str, float | None]]]) -> float:
    """The median of kernels that touch next to nothing."""
    tiny = [
        ms for runtime, held in measured for one in runtime.kernels if one.bytes <= STARTED and (ms := held[one.name])
    ]
    return 1000 * statistics.median(tiny) if tiny else 1.0


def copy_gb_s(size: int, seconds: float = 0.5) -> float:
    """10^9 bytes a second read and written when an array of `size` bytes is copied, one thread."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times) / 1e9


def simd_lanes() -> int:
    """float32 numbers in a vector register, by what PyTorch says of the processor."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
