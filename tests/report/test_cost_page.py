"""The page of a cost report: what it shows, that its plots are plotly's and add up, that nothing is loaded."""

from __future__ import annotations

import json
import re
from typing import Any

import plotly.graph_objects
import pytest
import torch
from test_page import HOSTILE, Page, poisoned
from torch import nn

from aerogel.cost import Device, count, device
from aerogel.cost.against import compare
from aerogel.cost.budget import judge, parse_budget
from aerogel.errors import AerogelError
from aerogel.graph import capture
from aerogel.nets import build
from aerogel.report.cost_page import MAX_STEPS, figures, memory, render, treemap
from aerogel.report.costing import budgeted, compared, cost_report, grouped
from aerogel.report.page import script_hash

PI = device("raspberry_pi_4")


def report_of(net: nn.Module, *shape: int, on: Device | None = PI) -> dict[str, Any]:
    graph = capture(net, (torch.zeros(shape),))
    return cost_report("net", graph, count(graph), device=on)


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """A network against a wider one, on a device, with a budget met and one missed."""
    graphs = [capture(build("lenet5"), (torch.zeros(1, 1, 28, 28),)) for _ in range(2)]
    found = count(graphs[0])
    report = cost_report("lenet5", graphs[0], found, device=PI)
    other = cost_report("other", graphs[1], found)
    report["against"] = compared(other, compare(found, found, PI))
    return report | {"budget": budgeted(judge(parse_budget("macs<=1M,params<=1M"), found))}


def plots_of(report: dict[str, Any]) -> dict[str, Any]:
    return figures(report, grouped(report))


def test_the_page_shows_totals_budget_comparison_and_every_table(full: dict[str, Any]) -> None:
    page = Page(render(full))
    text = re.sub(r"\s+", " ", page.text)
    for word in (
        "Cost of lenet5", "over budget", "budget macs<=1M missed: 2.29 M", "params 431,080",
        "against other: MACs x1.00", "MACs: multiply-accumulates", "Raspberry Pi 4 B", "By layer", "Totals",
        "By family of kernels", "Memory", "What holds it back", "features.",
    ):  # fmt: skip
        assert word in text, word
    assert set(page.plots()) == {"tree-macs", "tree-access", "tree-ms", "roofline", "memory"}


def test_without_a_device_there_is_no_roofline_and_no_time(full: dict[str, Any]) -> None:
    report = report_of(build("lenet5"), 1, 1, 28, 28, on=None)
    assert plots_of(report).keys() == {"tree-macs", "tree-access", "memory"}
    assert "What holds it back" not in Page(render(report)).text


def test_a_network_that_does_nothing_has_a_page_too() -> None:
    report = report_of(nn.Identity(), 1, 3)
    assert "Cost of net" in Page(render(report)).text


@pytest.mark.parametrize("name", ["lenet5", "shufflenet_v2"])
def test_every_plot_is_valid_plotly(name: str) -> None:
    shape = (1, 28, 28) if name == "lenet5" else (3, 64, 64)
    for plot in plots_of(
        report_of(build(name, **({} if name == "lenet5" else {"input_size": 64})), 1, *shape)
    ).values():
        plotly.graph_objects.Figure(data=plot["data"], layout=plot["layout"])  # raises on an unknown property


@pytest.mark.parametrize("place", ["tree-macs", "tree-access", "tree-ms"])
@pytest.mark.parametrize("tiles", [1500, 5], ids=["all", "the smallest together"])
def test_a_treemap_is_one_tree_whose_leaves_add_up(place: str, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerogel.report.cost_page.MAX_TILES", tiles)
    report = report_of(build("mobilenet_v2", input_size=64), 1, 3, 64, 64)
    (trace,) = plots_of(report)[place]["data"]
    total = {"tree-macs": "macs", "tree-access": "access_bytes", "tree-ms": "predicted_ms"}[place]
    assert sum(trace["values"]) == pytest.approx(report[total])
    assert len(set(trace["ids"])) == len(trace["ids"])
    assert set(trace["parents"]) <= {"", *trace["ids"]}
    assert [parent for parent in trace["parents"] if not parent] == [""]
    children = [trace["parents"].count(place) for place in trace["ids"]]
    inner = [n for n, place in zip(children, trace["ids"], strict=True) if n and place != "/"]
    assert min(inner) > 1  # a module with one part alone is drawn as that part


def test_a_treemap_of_nothing_is_not_drawn() -> None:
    report = report_of(nn.ReLU(), 1, 3)
    assert treemap(grouped(report), "macs", "MACs", "count") is None


def test_no_layer_is_above_its_roof() -> None:
    report = report_of(build("mobilenet_v2", input_size=64), 1, 3, 64, 64)
    traces = plots_of(report)["roofline"]["data"]
    points = [trace for trace in traces if trace["mode"] == "markers"]
    drawn = 0
    for trace in points:
        for x, y in zip(trace["x"], trace["y"], strict=True):
            assert y <= PI.speed(trace["name"]) / 1e9 * (1 + 1e-9)
            assert y <= max(PI.cache_gb_s, PI.memory_gb_s) * x * (1 + 1e-9)
            drawn += 1
    assert drawn == sum(1 for layer in report["layers"] if layer["ms"] and (layer["macs"] or layer["flops"]))


def test_measured_times_stand_beside_the_predicted() -> None:
    graph = capture(build("lenet5"), (torch.zeros(1, 1, 28, 28),))
    found = count(graph)
    report = cost_report("net", graph, found, device=PI, layers_ms={found.layers[0].node: 2.0})
    (trace,) = [trace for trace in plots_of(report)["roofline"]["data"] if trace["name"] == "measured"]
    assert trace["y"] == (found.layers[0].macs / 2.0 / 1e6,)


def test_the_memory_timeline_reaches_the_peak() -> None:
    report = report_of(build("mobilenet_v2", input_size=64), 1, 3, 64, 64)
    plot = memory(report)
    assert plot is not None
    assert max(plot["data"][0]["y"]) * 2**20 == report["peak_bytes"]
    assert plot["layout"]["shapes"][0]["y0"] * 2**20 == report["peak_bytes"]


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    layers = [{"name": str(i), "op": "add", "alive_bytes": i % 977} for i in range(3 * MAX_STEPS)]
    plot = memory({"layers": layers, "peak_op": "976"})
    assert plot is not None
    assert len(plot["data"][0]["x"]) <= MAX_STEPS
    assert max(plot["data"][0]["y"]) == 976 / 2**20


def test_hostile_names_inject_nothing(full: dict[str, Any]) -> None:
    report = poisoned(full) | {"schema": full["schema"]}
    report["device"]["gmacs"] = full["device"]["gmacs"]
    for layer, ours in zip(report["layers"], full["layers"], strict=True):
        layer["family"] = ours["family"]
    for verdict, clean in zip(report["budget"], full["budget"], strict=True):
        verdict["measure"] = clean["measure"]
    report["environment"][HOSTILE] = HOSTILE
    text = render(report)
    page, clean_page = Page(text), Page(render(full))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean_page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [attributes for attributes, _ in page.scripts] == [attributes for attributes, _ in clean_page.scripts]
    library = clean_page.scripts[0][1]
    assert "\x1b" not in text.replace(library, "")
    assert "\u202e" not in text.replace(library, "")
    drawn = json.dumps([[plot["data"], plot["layout"]] for plot in page.plots().values()])
    assert "&lt;img src=x" in drawn
    assert "<img" not in drawn


def test_only_the_scripts_named_by_the_policy_run_and_nothing_is_loaded(full: dict[str, Any]) -> None:
    page = Page(render(full))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    code = [script for attributes, script in page.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 2
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"'sha256-[^']+'", policy) == [script_hash(script) for script in code]
    assert not [(tag, a) for tag, a in page.tags if {"src", "href", "srcset", "data", "action"} & set(a)]
    assert "link" not in {tag for tag, _ in page.tags}


def test_page_is_accessible(full: dict[str, Any]) -> None:
    page = Page(render(full))
    assert ("html", {"lang": "en"}) in page.tags
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    plots = [a for tag, a in page.tags if a.get("class") == "plot"]
    assert {a["id"] for a in plots} == set(page.plots())
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)


@pytest.mark.parametrize("report", [{}, {"schema": "aerogel.cost", "version": 2}, {"schema": "x", "version": 1}])
def test_another_schema_is_refused(report: dict[str, Any]) -> None:
    with pytest.raises(AerogelError, match=r"cost page: the report must be aerogel\.cost version 1, got .* version"):
        render(report)
