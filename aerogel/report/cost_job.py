"""`aerogel cost`: what was asked for, in order: check the question, count, compare, measure, judge, write, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from aerogel.cost import Cost, Device, count, device
from aerogel.cost.against import Times, compare
from aerogel.cost.budget import Limit, judge, parse_budget
from aerogel.cost.device import this_path
from aerogel.cost.device import write as write_device
from aerogel.cost.measured import OnThisMachine
from aerogel.cost.verify import verified
from aerogel.errors import AerogelError, nearest
from aerogel.export import open_counted
from aerogel.files import refuse_existing, write_text
from aerogel.graph import Graph, capture
from aerogel.report import cost_page
from aerogel.report.cost_text import as_csv_text, as_markdown_text, as_text
from aerogel.report.costing import BY, budgeted, compared, cost_report
from aerogel.report.here import ask
from aerogel.report.stored import stored

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
    other = counted(asked.against, asked.input, None, asked.trust) if asked.against is not None else None
    found = ask(asked, profile, network, other)
    here, why = found.network, found.roofline_because
    report = _report(asked.model, network, profile, here, why) | stored(asked.model, asked.weights, network.model)
    if asked.against is not None and other is not None:
        before, after = _times(found.other), _times(here)
        both = (before, after) if before and after else None
        comparison = compare(other.cost, network.cost, profile, both)
        report["against"] = compared(_report(asked.against, other, profile, found.other, why), comparison, found.ratio)
    if limits:
        times = (here.measured_ms or here.predicted_ms) if here else None
        measured_ms = here.latency.median_ms if here and here.latency else None
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
    network = open_counted(model, input, weights, trust)
    graph = capture(*network)
    return Counted(graph, verified(count(graph), *network), *network)


def _check(asked: Asked) -> tuple[Limit, ...]:
    """The limits. Raises AerogelError for what does not go together, before a model is opened."""
    if asked.by is not None and asked.by not in BY:
        raise AerogelError(f"--by {asked.by!r} must be one of {', '.join(BY)}; {nearest(asked.by, BY)}")
    if asked.depth is not None and (asked.depth < 1 or asked.grouping != "module"):
        rule = "must be >= 1" if asked.depth < 1 else "goes with --by module"
        raise AerogelError(f"--depth {rule}, got --depth {asked.depth} --by {asked.grouping}; write --by module")
    if asked.against is not None and asked.grouping != "layer":
        raise AerogelError(f"--against compares layer by layer, got --by {asked.grouping}; leave out --by and --depth")
    if asked.threads < 1:
        raise AerogelError(f"cost: --threads must be >= 1, got {asked.threads}; write --threads 1")
    on_stdout = {"--json": asked.json, "--markdown": asked.markdown, "--csv -": asked.csv == STDOUT}
    several = [name for name, wanted in on_stdout.items() if wanted]
    if len(several) > 1:
        raise AerogelError(f"only one of them can go to stdout: {' and '.join(several)}; write a file with --csv FILE")
    csv = Path(asked.csv) if asked.csv is not None and asked.csv != STDOUT else None
    if csv is not None and asked.html is not None and csv.resolve() == asked.html.resolve():
        raise AerogelError(f"--html and --csv must be two files, both are {asked.csv}; give one another name")
    for path in (asked.html, csv):
        if path is not None:
            refuse_existing(path, "cost")
            if not path.parent.is_dir():
                raise AerogelError(f"cost: there is no folder {path.parent} for {path.name}; make it first")
    return parse_budget(asked.budget) if asked.budget is not None else ()


def _report(
    model: str, network: Counted, profile: Device | None, here: OnThisMachine | None, roofline_because: str | None
) -> dict[str, Any]:
    return cost_report(
        model,
        network.graph,
        network.cost,
        device=profile,
        latency=asdict(here.latency) if here and here.latency else None,
        layers_ms=here.measured_ms if here else None,
        predicted=here.prediction if here else None,
        predicted_layers=here.predicted_ms if here else None,
        roofline_because=roofline_because,
    )


def _times(here: OnThisMachine | None) -> Times | None:
    """By kernels, where they were asked."""
    if here is None or here.prediction is None or here.predicted_ms is None:
        return None
    return Times(here.prediction.ms, here.predicted_ms)


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
