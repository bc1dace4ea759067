"""The cost report: its schema, groups that add up, what is compared and judged, and the three texts made of it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aerogel.cost import count, device
from aerogel.cost.against import compare
from aerogel.cost.budget import judge, parse_budget
from aerogel.cost.count import Verified
from aerogel.cost.latency import Latency, Ratio
from aerogel.cost.predict import Prediction
from aerogel.graph import capture
from aerogel.nets import build
from aerogel.report.cost_text import against_sheet, as_csv_text, as_markdown_text, as_text, summary, verdict_line
from aerogel.report.costing import BY, MEASURES, budgeted, compared, cost_report, grouped, within_budget
from aerogel.report.sheet import Column, Sheet, as_csv, as_lines, as_markdown, cell, code
from aerogel.stats import Interval

PI = device("raspberry_pi_4")
LATENCY = {"median_ms": 0.5, "low_ms": 0.4, "high_ms": 0.6, "p90_ms": 0.7, "iqr_ms": 0.01, "runs": 9, "threads": 1,
           "batch": 1, "noisy": True, "load": 3.0, "runtime": "a runtime", "cpu": "a CPU"}  # fmt: skip


class Odd(nn.Module):
    """An op without a formula, a parameter that no op reads, work of the network's own, a norm fused away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.idle = nn.Parameter(torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(self.norm(self.conv(x)).relu()) + 1


def report_of(net: nn.Module, *shape: int, on: Any = None, **known: Any) -> dict[str, Any]:
    graph = capture(net, (torch.zeros(shape),))
    return cost_report("net", graph, count(graph), device=on, **known)


def odd(on: Any = None, **known: Any) -> dict[str, Any]:
    return report_of(Odd(), 1, 3, 8, 8, on=on, **known)


def of_two(on: Any = None) -> dict[str, Any]:
    """A dense convolution (after) against a grouped one with a norm (before)."""
    graphs = [
        capture(net, (torch.zeros(1, 4, 8, 8),))
        for net in (
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2)),
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 2)),
        )
    ]
    before, after = (count(graph) for graph in graphs)
    report = cost_report("new", graphs[1], after, device=on)
    return report | {"against": compared(cost_report("old", graphs[0], before), compare(before, after, on))}


def test_the_report_says_what_design_promises_and_is_plain_json() -> None:
    report = odd()
    promised = {"model", "input", "macs", "flops", "params", "access_bytes", "peak_bytes", "layers", "uncounted"}
    assert promised <= report.keys()
    assert (report["schema"], report["version"]) == ("aerogel.cost", 1)
    assert report["input"] == [1, 3, 8, 8]
    assert (report["batch"], report["dtype"]) == (1, "float32")
    assert report["macs"] == 6 * 6 * 4 * 27
    assert report["params"] == 3 * 4 * 9 + 2 * 4 + 7
    assert report["uncounted"] == [{"op": "linalg_inv", "modules": ["linalg_inv"]}]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"aerogel", "torch", "python"} == report["environment"].keys()
    assert (report["device"], report["predicted_ms"], report["latency"], report["verified"]) == (None,) * 4


def test_predicted_times_are_the_rooflines_and_measured_ones_are_the_callers() -> None:
    report = odd(PI, latency=LATENCY, layers_ms={"conv2d": 0.25})
    first = report["layers"][0]
    assert first["bound"] in ("compute", "memory", "overhead")
    assert first["measured_ms"] == 0.25
    assert report["predicted_ms"] == pytest.approx(sum(layer["ms"] for layer in report["layers"]))
    assert report["device"]["name"] == "raspberry_pi_4"
    text = as_text(report)
    assert "predicted 0." in text
    assert "measured 0.5 ms [0.4, 0.6] p90 0.7 (1 thread, batch 1), a runtime, a CPU; NOISY, the load was 3.0" in text
    assert "measured ms" in text.splitlines()[0]


@pytest.mark.parametrize("by", ["module", "op", "family", "layer"])
@pytest.mark.parametrize(("left", "told"), [(0.0, False), (0.09, False), (0.2, True)])
def test_what_no_layer_takes_of_a_prediction_is_told(by: str, left: float, told: bool) -> None:
    nodes = [layer["node"] for layer in odd(PI)["layers"]]
    kernels = Prediction(ms=9.9 + left, kernels=3, estimated={}, unread=(), kernel_ms=())
    report = odd(PI, predicted=kernels, predicted_layers={nodes[0]: 9.0, nodes[-1]: 0.9})
    assert report["unplaced_ms"] == pytest.approx(left)
    rows = sum(row["ms"] or 0 for row in grouped(report, by))
    assert rows + report["unplaced_ms"] == pytest.approx(report["predicted_ms"])
    assert ("stand in no row" in as_text(report)) is told
    assert (odd(PI)["unplaced_ms"], odd()["unplaced_ms"]) == (0, None)


@pytest.mark.parametrize("unread", [(), ("Loop_at_3",)])
def test_kernels_that_the_runtime_tells_nothing_of_are_named(unread: tuple[str, ...]) -> None:
    found = odd(PI, predicted=Prediction(ms=9.9, kernels=3, estimated={}, unread=unread, kernel_ms=()))
    assert found["prediction"]["unread"] == list(unread)
    assert ("NOT predicted: Loop_at_3" in as_text(found)) is bool(unread)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("on", [None, PI], ids=["counted", "timed"])
def test_groups_add_up_to_the_network(by: str, on: Any) -> None:
    with torch.device("meta"):
        net = build("mobilenet_v3_small", input_size=64)
        graph = capture(net, (torch.zeros(1, 3, 64, 64),))
    for report in (cost_report("net", graph, count(graph), device=on), odd(on)):
        rows = grouped(report, by)
        for measure in ("params", "macs", "flops", "access_bytes"):
            assert sum(row[measure] or 0 for row in rows) == report[measure], measure
        if on:
            assert sum(row["ms"] or 0 for row in rows) == pytest.approx(report["predicted_ms"])
        assert sum(row["share"] or 0 for row in rows) == pytest.approx(100)


@given(depth=st.integers(1, 6))
def test_modules_cut_off_at_a_depth_add_up_too(depth: int) -> None:
    rows = grouped(LENET, "module", depth)
    assert sum(row["macs"] for row in rows) == LENET["macs"]
    assert max(row["name"].count(".") + 1 for row in rows) <= depth
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))


LENET = report_of(build("lenet5"), 1, 1, 28, 28)


def test_what_belongs_to_no_module_or_no_op_has_a_row_of_its_own() -> None:
    modules = {row["name"]: row for row in grouped(odd(), "module")}
    assert {"conv", "norm", "(the network itself)"} == modules.keys()
    assert modules["(the network itself)"]["params"] == 7
    layers = {row["name"]: row for row in grouped(odd())}
    assert layers["(read by no op)"]["params"] == 7
    assert layers["conv"]["op"] == "conv2d+batch_norm+relu"


def test_ops_and_families_stand_dearest_first() -> None:
    rows = grouped(odd(PI), "family")
    assert [row["ms"] for row in rows if row["ms"] is not None] == sorted(
        (row["ms"] for row in rows if row["ms"] is not None), reverse=True
    )


def test_an_op_without_a_formula_never_costs_nothing() -> None:
    (row,) = [row for row in grouped(odd()) if row["op" if "op" in row else "name"] == "linalg_inv"]
    assert (row["macs"], row["flops"], row["intensity"]) == (None, None, None)
    assert row["access_bytes"] == 2 * 4 * 6 * 6 * 4
    line = next(line for line in as_text(odd()).splitlines() if "linalg_inv" in line)
    assert " - " in line
    assert "not counted: linalg_inv in linalg_inv" in as_text(odd())
    assert "not counted: linalg_inv in linalg_inv" in as_markdown_text(odd())


def test_the_text_always_tells_convention_units_and_versions() -> None:
    for text in (as_text(odd()), as_markdown_text(odd())):
        for word in ("MACs: multiply-accumulates", "KiB", "float32", "batch 1", "torch ", "aerogel.cost version 1"):
            assert word in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("verified", "said"),
    [
        (Verified(5, True, {}), "verified: a second, independent count gives the same MACs"),
        (Verified(5, False, {"a": (3, 5)}), "NOT verified: a second count gives 5 MACs; they differ in a 3 and 5"),
        (Verified(None, None, {}, "no luck"), "not verified: no luck"),
    ],
)
def test_the_second_count_is_told(verified: Verified, said: str) -> None:
    graph = capture(nn.Linear(2, 2), (torch.zeros(1, 2),))
    found = count(graph)
    object.__setattr__(found, "verified", verified)
    report = cost_report("net", graph, found)
    assert report["verified"] is verified.agrees
    assert said in summary(report)


def test_two_networks_side_by_side() -> None:
    report = of_two(PI)
    against = report["against"]
    assert against["totals"]["macs"]["ratio"] == (36 * 8 * 36 + 576) / (36 * 8 * 18 + 576)
    assert [(layer["status"], layer["name"]) for layer in against["layers"]] == [("changed", "0"), ("same", "2")]
    assert against["layers"][1]["name_before"] == "3"
    text = as_text(report)
    assert "against old: MACs x1.90" in text
    assert "predicted" in text
    assert json.loads(json.dumps(against, allow_nan=False)) == against


def test_what_was_timed_in_turns_is_told() -> None:
    graph = capture(nn.Linear(4, 4), (torch.zeros(1, 4),))
    found, latency = count(graph), Latency(**LATENCY)
    ratio = Ratio(Interval(0.62, 0.604, 0.65), latency, replace(latency, median_ms=0.31), 9)
    report = cost_report("new", graph, found)
    report["against"] = compared(cost_report("old", graph, found), compare(found, found), ratio)
    assert report["against"]["measured"] == {
        "before_ms": 0.5, "after_ms": 0.31, "ratio": 0.62, "low": 0.604, "high": 0.65,
    }  # fmt: skip
    assert "measured: x0.62 [0.60, 0.65] of old, timed in turns" in summary(report)


def test_a_layer_that_is_new_has_no_numbers_before() -> None:
    graphs = [capture(net, (torch.zeros(1, 4),)) for net in (nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))]
    two = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), (torch.zeros(1, 4),))
    before, after = count(graphs[0]), count(two)
    found = compared(cost_report("old", graphs[0], before), compare(before, after))
    added = next(layer for layer in found["layers"] if layer["status"] == "added")
    assert (added["name"], added["macs_before"], added["macs_after"]) == ("2", None, 12)
    assert "ms_before" not in added
    rows = list(csv.DictReader(io.StringIO(as_csv(against_sheet(found)))))
    assert rows[1]["macs_before"] == ""


def test_verdicts_name_the_layer_and_how_the_number_is_known() -> None:
    graph = capture(Odd(), (torch.zeros(1, 3, 8, 8),))
    found = count(graph)
    verdicts = judge(parse_budget("params<=10,macs<=1G,latency<=1us,peak<=1B"), found, PI)
    report = cost_report("net", graph, found, device=PI) | {"budget": budgeted(verdicts)}
    assert not within_budget(report)
    assert within_budget(report | {"budget": []})
    params, macs, latency, peak = map(verdict_line, report["budget"])
    assert params == "budget params<=10 missed: 123 (counted); the most in conv (conv2d): 108"
    assert macs.startswith("budget macs<=1G missed: 3.89 K (counted), and more: linalg_inv could not be counted")
    assert "predicted on raspberry_pi_4" in latency
    assert "; reached at " in peak
    for text in (as_text(report), as_markdown_text(report)):
        assert params in text


def test_csv_holds_exact_numbers_under_the_schemas_names() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv_text(odd(PI)))))
    assert set(MEASURES) <= rows[0].keys()
    assert (rows[0]["name"], rows[0]["macs"], rows[0]["shape"]) == ("conv", "3888", "1x4x6x6")
    assert float(rows[0]["ms"]) == odd(PI)["layers"][0]["ms"]
    assert next(csv.DictReader(io.StringIO(as_csv_text(odd(), "op")))).keys() >= {"name", "layers", "flops"}


HOSTILE = "a|b`c``<b>\n\x1b[31m@you ![x](y)"


def test_names_cannot_leave_their_cell() -> None:
    sheet = Sheet((Column("name", "layer"), Column("n", "n", "exact")), ({"name": HOSTILE, "n": 1},))
    table = as_markdown(sheet)
    assert len(table) == 3
    assert table[2].replace(r"\|", "").count("|") == 3
    assert "\x1b" not in "".join([*table, *as_lines(sheet), as_csv(sheet)])
    (row,) = csv.DictReader(io.StringIO(as_csv(sheet)))
    assert row["n"] == "1"


@pytest.mark.parametrize("name", ["=1+2", "+x", "-x", "@x"])
def test_a_spreadsheet_runs_no_name(name: str) -> None:
    assert as_csv(Sheet((Column("name", "layer"),), ({"name": name},))) == f"name\n'{name}\n"


@pytest.mark.parametrize(("text", "span"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("", "")])
def test_code_spans(text: str, span: str) -> None:
    assert code(text) == span


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234567, "exact", "1,234,567"), (None, "exact", "-"), (None, "", ""), ([1, 3], "shape", "1x3"),
        (2048, "bytes", "2.00 KiB"), (0.12345, "ms", "0.123"), (12.5, "%", "12.50 %"), (0.5, "x", "x0.50"),
    ],
)  # fmt: skip
def test_cells(value: Any, unit: str, text: str) -> None:
    assert cell(value, unit) == text
