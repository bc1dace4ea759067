"""The latency that a network would have after a planned cut, from the times of its single kernels on this machine.

Here paper does not do: the network is sliced, exported, and read as ONNX Runtime would run it; each kernel's
time comes from the machine's table (`aerogel.cost.kernels`), where those of other cuts are kept, and is measured where
the table lacks it. A kernel that does not run by itself counts as long as it took in place.
The sum leaves out what the device profile would correct (1 to 3 % on the CPU it was fitted on, see docs/log.md), so
that no calibration is needed. Times that were taken while other programs ran are kept too: plan on a quiet machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aerogel.cost.kernels import KernelTable
from aerogel.cost.runtime import read_runtime
from aerogel.export.onnx import export_onnx
from aerogel.prune.coupling import Coupling

PROFILE_SECONDS = 0.05  # of the runtime's profiler, for the shapes; the times come from the table


class DoesNotRun(Exception):
    """The network cut like this fails its proof, so that no latency can be told. removed: what was cut."""

    def __init__(self, removed: np.ndarray) -> None:
        super().__init__("the network does not run when it is cut like this")
        self.removed = removed


class LatencyAfter:
    """Called with (coupling, components to remove): milliseconds of one input. Equal shapes are priced once.

    build: makes the network cut like that, or None where it fails its proof. args, kwargs: example inputs.
    """

    def __init__(
        self,
        build: Callable[[Coupling, np.ndarray], nn.Module | None],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        self.build, self.args, self.kwargs, self.threads = build, args, dict(kwargs or {}), threads
        self._known: dict[str, float] = {}

    @cached_property
    def table(self) -> KernelTable:
        return KernelTable(self.threads)

    def __call__(self, coupling: Coupling, removed: np.ndarray) -> float:
        """Raises DoesNotRun where a group should be frozen, AerogelError where the network cannot be exported."""
        shapes = {t: tuple(-1 if k is None else len(k) for k in dims) for t, dims in coupling.kept(removed).items()}
        key = repr(sorted(shapes.items()))
        if key not in self._known:
            smaller = self.build(coupling, removed)
            if smaller is None:
                raise DoesNotRun(removed)
            self._known[key] = self._price(smaller)
        return self._known[key]

    def _price(self, model: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            file = export_onnx(model, self.args, Path(folder) / "model.onnx", kwargs=self.kwargs).path
            runtime = read_runtime(file, threads=self.threads, seconds=PROFILE_SECONDS)
            alone = self.table.measure(runtime)
        return sum(one.ms if (ms := alone[one.name]) is None else ms for one in runtime.kernels)
