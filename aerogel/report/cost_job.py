"""`aerogel cost`: what was asked for, in order: check the question, count, compare, measure, judge, write, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from aerogel.cost import Cost, Device, count, device
from aerogel.cost.against import compare
from aerogel.cost.budget import Limit, judge, parse_budget
from aerogel.cost.device import THIS, this_path
from aerogel.cost.device import write as write_device
from aerogel.cost.verify import verified
from aerogel.errors import AerogelError, nearest
from aerogel.export import example_inputs, open_model
from aerogel.export.hf import PREFIX, parse_size
from aerogel.files import refuse_existing, write_text
from aerogel.graph import Graph, capture
from aerogel.report import cost_page
from aerogel.report.cost_text import as_csv_text, as_markdown_text, as_text
from aerogel.report.costing import BY, budgeted, compared, cost_report

STDOUT = "-"


@dataclass(frozen=True)
class Asked:
    """The options of the command line, as typed."""

    model: str
    weights: str | None = None
    input: str | None = None
    trust: bool = False
    by: str | None = None
    depth: int | None = None
    device: str | None = None
    against: str | None = None
    budget: str | None = None
    measure: bool = False
    threads: int = 1
    csv: str | None = None
    html: Path | None = None
    markdown: bool = False
    json: bool = False

    @property
    def grouping(self) -> str:
        return self.by or ("layer" if self.depth is None else "module")


def run(asked: Asked) -> tuple[dict[str, Any], str]:
    """The report, and the text for stdout where that is not JSON. Raises AerogelError before anything is written."""
    limits = _check(asked)
    profile = device(asked.device) if asked.device else None
    if profile is None and not asked.measure and any(limit.measure == "latency" for limit in limits):
        rule = "nothing tells the latency; name a device with --device, or measure it with --measure"
        raise AerogelError(f"--budget {asked.budget}: {rule}")
    network = counted(asked.model, asked.input, asked.weights, asked.trust)
    here = _here(asked, network, profile)
    latency = here.latency if here else None
    report = cost_report(
        asked.model,
        network.graph,
        network.cost,
        device=profile,
        latency=asdict(latency) if latency else None,
        layers_ms=here.measured_ms if here else None,
        predicted=here.prediction if here else None,
        predicted_layers=here.predicted_ms if here else None,
    )
    if asked.against is not None:
        report["against"] = _against(asked, network.cost, profile)
    if limits:
        times = (here.measured_ms or here.predicted_ms) if here else None
        measured_ms = latency.median_ms if latency else None
        predicted_ms = here.prediction.ms if here and here.prediction else None
        report["budget"] = budgeted(judge(limits, network.cost, profile, measured_ms, times, predicted_ms))
    return report, _written(asked, report)


def run_calibration(threads: int, say: Callable[[str], None]) -> Device:
    """Measures this machine and keeps its profile, for `--device this`."""
    from aerogel.cost.calibrate import calibrate

    profile = calibrate(threads=threads, say=say)
    write_device(profile, this_path())
    return profile


class Counted(NamedTuple):
    """MODEL with its example inputs, as a graph, with what it costs."""

    graph: Graph
    cost: Cost
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def counted(model: str, input: str | None, weights: str | None, trust: bool) -> Counted:
    """MODEL as a graph, with what it costs for one input, counted twice."""
    shape = None if model.startswith(PREFIX) else parse_size(input)
    opened = open_model(model, input_shape=shape, weights=weights, trust=trust, counting=True)
    args, kwargs = example_inputs(opened, input)
    graph = capture(opened.model, args, kwargs)
    return Counted(graph, verified(count(graph), opened.model, args, kwargs), opened.model, args, kwargs)


def _here(asked: Asked, network: Counted, profile: Device | None) -> Any:
    """The exported file on this machine, measured with --measure, predicted with --device this; None for neither."""
    this = profile if profile is not None and profile.name == THIS else None
    without = any(tensor.is_meta for tensor in network.model.parameters())
    if without and asked.measure:
        raise AerogelError(f"--measure: {asked.model} has no weights to run; write a factory that makes them")
    if without or not (asked.measure or this):
        return None
    from aerogel.cost.kernels import machine
    from aerogel.cost.measured import on_this_machine

    if this is not None and this.source != machine(this.threads):
        now = machine(this.threads)
        raise AerogelError(
            f"--device this was measured on {this.source}, this is {now}; run `aerogel cost --calibrate` again"
        )
    if this is not None and asked.measure and this.threads != asked.threads:
        raise AerogelError(
            f"--device this was measured with {this.threads} threads, --threads is {asked.threads}; "
            f"run `aerogel cost --calibrate --threads {asked.threads}`"
        )
    threads = this.threads if this is not None else asked.threads
    return on_this_machine(
        network.model, network.args, network.kwargs, network.cost.layers,
        device=this, timed=asked.measure, threads=threads,
    )  # fmt: skip


def _check(asked: Asked) -> tuple[Limit, ...]:
    """The limits. Raises AerogelError for what does not go together, before a model is opened."""
    if asked.by is not None and asked.by not in BY:
        raise AerogelError(f"--by {asked.by!r} must be one of {', '.join(BY)}; {nearest(asked.by, BY)}")
    if asked.depth is not None and (asked.depth < 1 or asked.grouping != "module"):
        rule = "must be >= 1" if asked.depth < 1 else "goes with --by module"
        raise AerogelError(f"--depth {rule}, got --depth {asked.depth} --by {asked.grouping}; write --by module")
    if asked.against is not None and asked.grouping != "layer":
        raise AerogelError(f"--against compares layer by layer, got --by {asked.grouping}; leave out --by and --depth")
    on_stdout = {"--json": asked.json, "--markdown": asked.markdown, "--csv -": asked.csv == STDOUT}
    several = [name for name, wanted in on_stdout.items() if wanted]
    if len(several) > 1:
        raise AerogelError(f"only one of them can go to stdout: {' and '.join(several)}; write a file with --csv FILE")
    for path in (asked.html, Path(asked.csv) if asked.csv not in (None, STDOUT) else None):
        if path is not None:
            refuse_existing(path, "cost")
            if not path.parent.is_dir():
                raise AerogelError(f"cost: there is no folder {path.parent} for {path.name}; make it first")
    return parse_budget(asked.budget) if asked.budget is not None else ()


def _against(asked: Asked, found: Cost, profile: Device | None) -> dict[str, Any]:
    assert asked.against is not None
    before = counted(asked.against, asked.input, None, asked.trust)
    other = cost_report(asked.against, before.graph, before.cost)
    return compared(other, compare(before.cost, found, profile), profile)


def _written(asked: Asked, report: dict[str, Any]) -> str:
    """What goes to stdout, after the files are written."""
    table = as_csv_text(report, asked.grouping, asked.depth) if asked.csv else ""
    page = cost_page.render(report) if asked.html else ""
    if asked.html:
        write_text(asked.html, page)
    if asked.csv and asked.csv != STDOUT:
        write_text(Path(asked.csv), table)
    if asked.csv == STDOUT:
        return table.rstrip("\n")
    if asked.json:
        return ""
    make = as_markdown_text if asked.markdown else as_text
    text = make(report, asked.grouping, asked.depth)
    return "\n".join([text, *(str(path) for path in (asked.html, asked.csv) if path and not asked.markdown)])
