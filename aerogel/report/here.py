"""What `aerogel cost` asks of this machine: exported files, timed with --measure, predicted with --device this.

Both networks of a comparison are asked alike: both are predicted by their kernels, or, where one has no weights to run,
both by the roofline; and both files are timed in turns, so that a machine that changes its speed changes both.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aerogel.cost.device import THIS, Device
from aerogel.cost.kernels import machine
from aerogel.cost.latency import Ratio, compare, measure
from aerogel.cost.measured import OnThisMachine, on_this_machine
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx

if TYPE_CHECKING:
    from aerogel.report.cost_job import Asked, Counted

SECONDS = 2.0  # for the latency of one file


@dataclass(frozen=True)
class Here:
    """Of MODEL and of the one it is compared with; None for what was not asked."""

    network: OnThisMachine | None = None
    other: OnThisMachine | None = None
    ratio: Ratio | None = None  # the time of MODEL over that of the other
    roofline_because: str | None = None  # why kernels predict neither


def ask(asked: Asked, profile: Device | None, network: Counted, other: Counted | None) -> Here:
    """Raises AerogelError for a profile of another machine, or a network to be timed that has no weights."""
    this = profile if profile is not None and profile.name == THIS else None
    both = {asked.model: network} | ({asked.against: other} if asked.against and other else {})
    without = [name for name, one in both.items() if any(tensor.is_meta for tensor in one.model.parameters())]
    if without and asked.measure:
        raise AerogelError(f"--measure: {without[0]} has no weights to run; write a factory that makes them")
    if this is not None:
        _refuse_another_machine(asked, this)
    if this is None and not asked.measure:
        return Here()
    if without:
        return Here(roofline_because=f"{without[0]} has no weights to run")
    threads = this.threads if this is not None else asked.threads
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(network, Path(folder) / "after.onnx")
        if other is None:
            latency = measure(path, threads=threads, seconds=SECONDS) if asked.measure else None
            return Here(on_this_machine(path, network.cost.layers, latency=latency, device=this, threads=threads))
        before = _exported(other, Path(folder) / "before.onnx")
        ratio = compare(before, path, threads=threads) if asked.measure else None
        latency = ratio.b if ratio else None
        found = on_this_machine(path, network.cost.layers, latency=latency, device=this, threads=threads)
        beside = on_this_machine(before, other.cost.layers, device=this, threads=threads) if this else None
        return Here(found, beside, ratio)


def _exported(one: Counted, path: Path) -> Path:
    return export_onnx(one.model, one.args, path, kwargs=one.kwargs).path


def _refuse_another_machine(asked: Asked, this: Device) -> None:
    now = machine(this.threads)
    if this.source != now:
        raise AerogelError(
            f"--device this was measured on {this.source}, this is {now}; run `aerogel cost --calibrate` again"
        )
    if asked.measure and this.threads != asked.threads:
        raise AerogelError(
            f"--device this was measured with {this.threads} threads, --threads is {asked.threads}; "
            f"run `aerogel cost --calibrate --threads {asked.threads}`"
        )
