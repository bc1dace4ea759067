"""`aerogel cost`: what was asked for, in order: check the question, count, compare, judge, write the files, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aerogel.cost import Cost, Device, count, device
from aerogel.cost.against import compare
from aerogel.cost.budget import Limit, judge, parse_budget
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
    if profile is None and any(limit.measure == "latency" for limit in limits):
        raise AerogelError(f"--budget {asked.budget}: nothing tells the latency; name a device with --device")
    graph, found = counted(asked.model, asked.input, asked.weights, asked.trust)
    report = cost_report(asked.model, graph, found, device=profile)
    if asked.against is not None:
        report["against"] = _against(asked, found, profile)
    if limits:
        report["budget"] = budgeted(judge(limits, found, profile))
    return report, _written(asked, report)


def counted(model: str, input: str | None, weights: str | None, trust: bool) -> tuple[Graph, Cost]:
    """MODEL as a graph, with what it costs for one input, counted twice."""
    shape = None if model.startswith(PREFIX) else parse_size(input)
    opened = open_model(model, input_shape=shape, weights=weights, trust=trust, counting=True)
    args, kwargs = example_inputs(opened, input)
    graph = capture(opened.model, args, kwargs)
    return graph, verified(count(graph), opened.model, args, kwargs)


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
    graph, before = counted(asked.against, asked.input, None, asked.trust)
    other = cost_report(asked.against, graph, before)
    return compared(other, compare(before, found, profile), profile)


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
