"""What `aerogel cost` asks of this machine: exported files, timed with --measure, predicted with --device this.

Both networks of a comparison are asked alike: both are predicted by their kernels, or, where one has no weights to run,
both by the roofline; and both files are timed in turns, so that a machine that changes its speed changes both.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aerogel.cost.device import THIS, Device
from aerogel.cost.kernels import machine
from aerogel.cost.latency import Ratio, compare
from aerogel.cost.measured import OnThisMachine, on_this_machine
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx

if TYPE_CHECKING:
    from aerogel.report.cost_job import Asked, Counted

BRIEF = 0.05  # seconds for a latency that the comparison in turns tells better


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

    def here(one: Counted, timed: bool, seconds: float = 2.0) -> OnThisMachine:
        return on_this_machine(
            one.model, one.args, one.kwargs, one.cost.layers,
            device=this, timed=timed, threads=threads, seconds=seconds,
        )  # fmt: skip

    if other is None:
        return Here(here(network, asked.measure))
    ratio = _in_turns(other, network, threads) if asked.measure else None
    found = here(network, asked.measure, BRIEF)
    if ratio is not None:
        found = replace(found, latency=ratio.b)
    return Here(found, here(other, False) if this is not None else None, ratio)


def _in_turns(before: Counted, after: Counted, threads: int) -> Ratio:
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            export_onnx(one.model, one.args, Path(folder) / f"{name}.onnx", kwargs=one.kwargs).path
            for name, one in (("before", before), ("after", after))
        ]
        return compare(*paths, threads=threads)


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
