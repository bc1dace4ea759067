"""The report: complete, minimal, failed and hostile; the page as a browser parses it; the text for a pipe."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.errors import AerogelError
from aerogel.report import render, terminal, write
from aerogel.report.page import MAX_BARS, MAX_CURVES, MAX_POINTS, bullet, figures, script_hash
from aerogel.report.terminal import human

HOSTILE = "</script><img src=x onerror=alert(1)>'\"{{ 7*7 }}\x1b[31m\u202e"
GOAL = ("name", "unit", "value", "low", "high", "limit", "met")
SECTIONS = [
    "Before and after",
    "Teacher and student",
    "Proof",
    "Candidates",
    "Sensitivity",
    "Batch-norm scales",
    "Layers",
    "Training",
]
SECTIONS += ["Stages", "Data", "Repeat it"]
COUNTS = {"params": 431080, "macs": 2293000, "flops": 4600000, "file_bytes": 1726000}
COUNTS |= {"access_bytes": 1900000, "peak_bytes": 151000}


def side(share: float) -> dict[str, Any]:
    times = {"median_ms": 0.5, "low_ms": 0.45, "high_ms": 0.55, "p90_ms": 0.6}
    latency = {name: ms * share for name, ms in times.items()}
    setup = {"threads": 1, "batch": 1, "runtime": "onnxruntime 1.32.0", "cpu": "some cpu", "noisy": False}
    accuracy = {"value": 99.0 + share / 10, "low": 98.9, "high": 99.3}
    return {"accuracy": accuracy, "latency": latency | setup} | {k: int(v * share) for k, v in COUNTS.items()}


def layer(name: str) -> dict[str, Any]:
    sizes = {"macs_before": 288000, "macs_after": 115200, "access_before": 95400, "access_after": 39560}
    shapes = {"shape_before": [20, 1, 5, 5], "shape_after": [8, 1, 5, 5]}
    return {"name": name, "op": "conv2d", "params_before": 520, "params_after": 208} | shapes | sizes


def network(name: str, value: float) -> dict[str, Any]:
    accuracy = {"value": value, "low": value - 0.5, "high": value + 0.5}
    shares = {"val_accuracy": value - 0.25, "agreement": 97.5, "ece": 1.25, "val_ece": 1.5}
    return {"name": name, "what": "lenet5", "accuracy": accuracy, "params": 431080, "macs": 2293000} | shares


def distillation() -> dict[str, Any]:
    latency = {key: side(1.0)["latency"] for key in ("a", "b")} | {"ratio": {"value": 0.4, "low": 0.3, "high": 0.5}}
    bins = {"counts": [0, 9, 21], "confidence": [0.0, 0.5, 0.9], "accuracy": [0.0, 0.4, 0.95]}
    return {
        "networks": [network("teacher", 99.0), network("student", 98.0), network("labels alone", 97.0)],
        "members": [{"name": name, "accuracy": 98.5, "val_accuracy": 98.0} for name in ("lenet5", "resnet20")],
        "gap": {"value": 1.0, "low": 0.4, "high": 1.6},
        "gain": {"value": 1.0, "low": -0.1, "high": 2.1},
        "latency": latency,
        "confusion": {"of": 2, "classes": ["cat", "dog"], "counts": [[11, 3], [0, 16]]},
        "reliability": {"teacher": bins, "student": bins},
        "losses": {"kd": 0.9, "hard": 0.1},
    }


def full() -> dict[str, Any]:
    latency = dict(zip(GOAL, ("latency", "x", 0.48, 0.47, 0.49, 0.5, True), strict=True))
    drop = dict(zip(GOAL, ("accuracy drop", "pt", 0.1, -0.02, 0.22, 0.3, True), strict=True))
    point = {"name": "001", "macs": 1605100, "params": 211229, "latency_ratio": 0.7, "target": 0.7}
    series = {"hard": [2.3, 0.4, 0.1], "val_accuracy": [None, 98.0, 99.0]}
    return {
        "version": 1,
        "title": "lenet5 on mnist",
        "date": "2026-11-23T10:15:30+00:00",
        "command": "aerogel compress lenet5 --data mnist",
        "run": "runs/20261123-101530-lenet5",
        "verdict": {"pass": True, "text": "PASS  latency x0.48 <= 0.50", "goals": [latency, drop]},
        "before": side(1.0),
        "after": side(0.5),
        "distillation": distillation(),
        "parity": {"samples": 1000, "top1_agreement": 1.0, "max_abs_diff": 1.1e-6, "ok": True},
        "cut": {"max_error": 1.3e-7, "frozen": {"fc.2": "is the output"}, "inexact": {"gate": "a max"}},
        "method": "slimming: the smallest scales; one-shot",
        "scan": {
            "criterion": "l2",
            "images": 5000,
            "shares": [0.1, 0.5, 0.9],
            "whole": 98.75,
            "groups": {"features.0": {"channels": 20, "removed": [2, 10, 18], "values": [98.5, 91.25, 33.0]}},
        },
        "scales": {"edges": [0.0, 0.5, 1.0], "counts": {"original": [2, 18], "result": [0, 12]}},
        "candidates": [
            point | {"val_accuracy": 99.1, "frontier": True, "shipped": True},
            point | {"name": "002", "latency_ratio": 0.6, "val_accuracy": 98.0, "frontier": False},
        ],
        "layers": [layer("features.0"), layer("features.3")],
        "curves": [{"name": "baseline", "x": [0, 10, 20], "series": series}],
        "stages": [{"name": "check", "seconds": 3.1, "text": "4 of 4 layers can be cut"}],
        "bad_files": [["train/3/\udcff001.png", "truncated"]],
        "repeat": ["pip install aerogel", "aerogel compress lenet5 --data mnist"],
        "environment": {"torch": "2.13.0", "threads": 2, "governor": None, "deterministic": True},
        "data": {"name": "mnist", "fingerprint": "sha256:9f2a", "train": 55000, "val": 5000, "test": 10000},
    }


def failed() -> dict[str, Any]:
    report = full()
    report["verdict"]["pass"] = False
    report["verdict"]["goals"][0] |= {"high": 0.53, "met": False}
    report["verdict"]["nearest"] = [{"text": "latency x0.53 at a drop of 0.10 pt"}]
    return report


def poisoned(value: Any) -> Any:
    """`value` with every text that a user's model, folder or command line could have chosen made hostile."""
    if isinstance(value, dict):
        return {key: poisoned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return value + HOSTILE if isinstance(value, str) else value


class Page(HTMLParser):
    """What a browser sees: the tags with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, code = self.scripts.pop()
            self.scripts.append((attributes, code + data))
        elif self.lasttag != "style":
            self.text += data

    def headings(self) -> list[str]:
        return [h for h in SECTIONS if re.search(rf"\n\s*{h}\n", self.text)]

    def plots(self) -> dict[str, Any]:
        return json.loads(next(code for attributes, code in self.scripts if attributes.get("id") == "plots"))


# fmt: off
SHOWN = [
    "PASS", "x0.48 [0.47, 0.49]", "limit x0.50", "0.500 ms\n[0.450, 0.550]", "-0.05 pt", "2.29 M",
    "1.81 MiB", "On 1,000 samples", "100.00 %", "1.1e-06", "1.3e-07", "is the output", "20 x 1 x 5 x 5",
    "4 of 4 layers can be cut", "5,000 validation images", "91.25 %", "slimming: the smallest", "55,000",
    r"train/3/\udcff001.png", "98.00 %\n[97.50, 98.50]", "Behind its teacher by 1.00 pt [0.40, 1.60]",
    "1.00 pt [-0.10, 2.10] better", "x0.40 [0.30, 0.50]", "resnet20", "97.75 %",
]
# fmt: on


def test_full_report_shows_every_section_and_its_numbers() -> None:
    page = Page(render(full()))
    assert page.headings() == SECTIONS
    for text in SHOWN:
        assert text in page.text, text
    assert ("td", {"class": "n", "title": "2,293,000"}) in page.tags
    assert set(page.plots()) == {
        "frontier", "scan", "scales", "confusion", "reliability", "layers-macs", "layers-access", "curve-0", "curve-1",
    }  # fmt: skip


def test_minimal_report_is_unfinished_and_carries_no_plotly() -> None:
    page = render({"version": 1, "title": "x"})
    assert Page(page).headings() == []
    assert "UNFINISHED" in Page(page).text
    assert len(page) < 20_000


def test_what_had_no_goal_is_done_and_a_goal_without_a_limit_is_not_judged() -> None:
    report = full()
    report["verdict"] = {"pass": None, "text": "scanned 1 group", "goals": []}
    page = Page(render(report))
    assert "DONE" in page.text
    assert "scanned 1 group" in page.text
    assert terminal(report).splitlines()[1] == "scanned 1 group"
    report["verdict"]["goals"] = [full()["verdict"]["goals"][1] | {"limit": None, "met": None}]
    page = Page(render(report))
    assert "accuracy drop" in page.text
    assert "limit" not in page.text.partition("Before and after")[0]


def test_a_scan_is_drawn_by_its_most_sensitive_groups_and_told_in_80_columns() -> None:
    report = full()
    report["scan"]["groups"] = {
        f"features.stage{i}.a_long_name.conv": {"channels": 8, "values": [90.0, 80.0, float(i)]} for i in range(20)
    }
    plot = figures(report)["scan"]
    assert plot["caption"] == f"Accuracy without retraining, the {MAX_CURVES} most sensitive of 20 groups."
    assert [trace["y"][-1] for trace in plot["data"]] == list(range(MAX_CURVES))
    assert all((trace["x"][0], trace["y"][0]) == (0, 98.75) for trace in plot["data"])
    lines = terminal(report).splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("accuracy, % removed"))
    assert lines[head].split()[-2:] == ["10", "90"]
    assert lines[head + 1].split() == ["...s.stage0.a_long_name.conv", "8", "90.00", "0.00"]
    assert max(map(len, lines[head : head + 21])) <= 80


def test_a_distillation_is_told_a_network_a_line_in_80_columns() -> None:
    lines = terminal(full()).splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.lstrip().startswith("accuracy on test"))
    student = lines[head + 2].split()
    assert " ".join(student) == "student 98.00 % [97.50, 98.50] 97.75 97.50 1.25 431 K 2.29 M"
    assert {len(line) for line in lines[head : head + 4]} == {80}


def test_where_student_and_teacher_part_is_drawn_apart_from_where_they_agree() -> None:
    plots = figures(full())
    same, other = plots["confusion"]["data"]
    assert (same["text"], other["text"]) == ([["11", ""], ["", "16"]], [["", "3"], ["", ""]])
    assert [[n is None for n in row] for row in same["z"]] == [[False, True], [True, False]]
    assert same["hovertext"][0][1] == "teacher cat<br>student dog: 3"
    assert re.search(r"Teacher saysStudent saysImages\s+catdog3\s", Page(render(full())).text)
    teacher, student, _ = plots["reliability"]["data"]
    assert (student["x"], student["y"]) == ((50.0, 90.0), (40.0, 95.0))
    assert teacher["text"][0] == "teacher<br>50.00 % sure, 40.00 % right<br>9 images"


def test_failed_report_names_the_nearest_points() -> None:
    page = Page(render(failed()))
    assert "FAIL" in page.text
    assert "not met" in page.text
    assert "latency x0.53 at a drop of 0.10 pt" in page.text


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every dict entry in `value`, but for the version."""
    if isinstance(value, list):
        return [path for i, inner in enumerate(value) for path in paths(inner, (*above, i))]
    if not isinstance(value, dict):
        return []
    own = [(*above, key) for key in value if key != "version"]
    return own + [path for key, inner in value.items() for path in paths(inner, (*above, key))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(paths(failed())), max_size=30), st.booleans())
def test_any_part_may_be_absent_or_none(chosen: list[tuple[Any, ...]], as_none: bool) -> None:
    report = failed()
    for *above, last in chosen:
        place: Any = report
        with contextlib.suppress(KeyError, TypeError):  # a part above was taken out already
            for key in above:
                place = place[key]
            place[last] = None
            if not as_none:
                del place[last]
    assert render(report).rstrip().endswith("</html>")
    assert terminal(report).endswith("\n")


def test_hostile_names_inject_nothing() -> None:
    report = poisoned(full())
    for part in ("frozen", "inexact"):
        report["cut"][part] = {HOSTILE: HOSTILE}
    report["distillation"]["reliability"] = {HOSTILE: distillation()["reliability"]["teacher"]}
    report["environment"][HOSTILE] = report["data"][HOSTILE] = HOSTILE
    report["scan"]["groups"] = {HOSTILE: full()["scan"]["groups"]["features.0"]}
    report["scales"]["counts"] = {HOSTILE: [1, 2]}
    report["curves"][0]["series"] = {HOSTILE: [1.0, 2.0, 3.0]}
    text = render(report)
    page, clean = Page(text), Page(render(full()))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [attributes for attributes, _ in page.scripts] == [attributes for attributes, _ in clean.scripts]
    assert "features.0</script><img src=x onerror=alert(1)>'\"{{ 7*7 }}\\x1b[31m\\u202e" in page.text
    assert "\x1b" not in text.replace(clean.scripts[0][1], "")
    assert "\u202e" not in text.replace(clean.scripts[0][1], "")
    drawn = json.dumps([[plot["data"], plot["layout"]] for plot in page.plots().values()])
    assert "&lt;img src=x" in drawn  # plotly reads some HTML in its labels
    assert "<img" not in drawn


def test_only_the_scripts_named_by_the_policy_run() -> None:
    page = Page(render(full()))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    code = [script for attributes, script in page.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 2
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"'sha256-[^']+'", policy) == [script_hash(script) for script in code]
    assert "unsafe" not in policy.split("script-src")[1]


@pytest.mark.parametrize("make", [full, failed, lambda: poisoned(full())])
def test_page_loads_nothing(make: Any) -> None:
    page = Page(render(make()))
    assert not [(tag, a) for tag, a in page.tags if {"src", "href", "srcset", "data", "action"} & set(a)]
    assert "link" not in {tag for tag, _ in page.tags}
    style = render({"version": 1})
    assert "@import" not in style
    assert "url(" not in style


def test_page_is_accessible() -> None:
    page = Page(render(full()))
    assert ("html", {"lang": "en"}) in page.tags
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    plots = [a for tag, a in page.tags if a.get("class") == "plot"]
    assert {a["id"] for a in plots} == set(page.plots())
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_plot_is_valid_plotly() -> None:
    for plot in figures(full()).values():
        plotly.graph_objects.Figure(data=plot["data"], layout=plot["layout"])  # raises on an unknown property


def test_frontier_holds_candidates_baseline_and_goal_lines() -> None:
    plot = figures(full())["frontier"]
    points = {trace["name"]: (trace["x"], trace["y"]) for trace in plot["data"]}
    assert points["frontier"] == points["shipped"] == ((0.7,), (99.1,))
    assert points["candidate"] == ((0.6,), (98.0,))
    assert points["baseline (test accuracy)"] == ((1.0,), (99.1,))
    upright, level = plot["layout"]["shapes"]
    assert (upright["x0"], upright["x1"]) == (0.5, 0.5)
    assert level["y0"] == level["y1"] == pytest.approx(99.1 - 0.3)


@pytest.mark.parametrize(
    ("ratios", "goal", "at"),
    [
        (True, {"name": "latency", "unit": "ms", "limit": 0.4}, 0.4 / 0.5),
        (False, {"name": "macs", "unit": "x", "limit": 0.5}, 0.5 * 2293000),
        (False, {"name": "macs", "unit": "count", "limit": 1e6}, 1e6),
    ],
)
def test_goal_line_stands_at_the_limit_in_axis_units(ratios: bool, goal: dict[str, Any], at: float) -> None:
    report = full()
    report["verdict"]["goals"] = [goal]
    report["before"]["val_accuracy"] = 99.4
    if not ratios:
        for point in report["candidates"]:
            del point["latency_ratio"]
    plot = figures(report)["frontier"]
    assert [shape["x0"] for shape in plot["layout"]["shapes"]] == [pytest.approx(at)]
    assert next(trace for trace in plot["data"] if trace["name"] == "baseline")["y"] == (99.4,)


def test_layer_bars_keep_equal_names_apart_and_only_the_dearest_of_many() -> None:
    report = full()
    report["layers"] = [layer("shared") | {"macs_before": i * 1000, "macs_after": None} for i in range(100)]
    plot = figures(report)["layers-macs"]
    before, after = plot["data"]
    assert before["y"] == list(range(MAX_BARS))
    assert before["x"] == [float(i) for i in range(100 - MAX_BARS, 100)]
    assert after["x"] == [None] * MAX_BARS
    assert plot["caption"] == f"MACs of the {MAX_BARS} dearest of 100 layers."
    assert plot["layout"]["xaxis"]["title"]["text"] == "MACs, K"


def test_long_curves_are_thinned_and_gaps_dropped() -> None:
    report = full()
    steps = list(range(50_000))
    sparse = [float(s) if s % 1000 == 0 else None for s in steps]
    report["curves"] = [{"name": "a", "x": steps, "series": {"hard": steps, "val_accuracy": sparse}}]
    hard, sparse_plot = (figures(report)[name]["data"][0] for name in ("curve-0", "curve-1"))
    assert MAX_POINTS / 2 < len(hard["x"]) <= MAX_POINTS
    assert hard["x"] == hard["y"]
    assert sparse_plot["x"] == tuple(range(0, 50_000, 1000))


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ((0.5, 0.25, 0.75, 1.0), (46, 23, 69, 92)),
        ((0.0, -1.0, 0.5, 1.0), (46, 0, 69, 92)),
        ((2.0, None, None, 1.0), (92, 92, 92, 46)),
        ((0, None, None, 0), (0, 0, 0, 0)),
    ],
)
def test_bullet_places_numbers_on_one_line(goal: tuple[float, ...], expected: tuple[float, ...]) -> None:
    names = ("value", "low", "high", "limit")
    assert bullet(dict(zip(names, goal, strict=True))) == dict(zip(names, expected, strict=True))
    assert bullet({"value": 0.5}) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "count", "0"),
        (999, "count", "999"),
        (999_600, "count", "1.00 M"),
        (4_089_284_608, "count", "4.09 G"),
        (1023, "bytes", "1,023 B"),
        (1536, "bytes", "1.50 KiB"),
        (102_400_000, "bytes", "97.7 MiB"),
        (0.04321, "ms", "0.0432 ms"),
        (19.84, "ms", "19.8 ms"),
        (1234.5, "ms", "1,234 ms"),
        (0.4772, "x", "x0.48"),
        (-0.02, "pt", "-0.02 pt"),
        (59.9, "s", "59.9 s"),
        (3599.9, "s", "1 h 00 min"),
        (True, "count", "-"),
        (None, "ms", "-"),
        ("7", "ms", "-"),
    ],
)
def test_human_units(value: Any, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_terminal_is_the_same_table_in_80_columns() -> None:
    lines = terminal(failed()).splitlines()
    assert lines[0] == "lenet5 on mnist"
    assert "nearest   latency x0.53 at a drop of 0.10 pt" in lines
    row = next(line for line in lines if line.startswith("Latency "))
    assert " ".join(row.split()) == "Latency 0.500 ms [0.450, 0.550] 0.250 ms [0.225, 0.275] x0.50"
    assert max(map(len, lines)) == 80
    assert "warning" not in terminal(failed())
    noisy = failed()
    noisy["after"]["latency"]["noisy"] = True
    assert "warning   the machine was busy while latency was measured" in terminal(noisy).splitlines()


@given(st.text())
def test_terminal_prints_no_control_codes(name: str) -> None:
    report = full() | {"title": name, "run": name}
    report["verdict"]["text"] = name
    assert all(line.isprintable() for line in terminal(report).split("\n"))


def test_write_makes_both_files_and_json_without_nan(tmp_path: Path) -> None:
    report = full()
    report["before"]["latency"]["median_ms"] = float("nan")
    report["candidates"][0]["val_accuracy"] = float("inf")
    untouched = copy.deepcopy(report)
    assert "nan" not in terminal(report)
    page, data = write(report, tmp_path)
    assert (page, data) == (tmp_path / "report.html", tmp_path / "report.json")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    assert page.read_text(encoding="utf-8") == render(report)
    stored = json.loads(data.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    assert stored["before"]["latency"]["median_ms"] is None
    assert stored["after"] == report["after"]
    assert repr(report) == repr(untouched)
    assert "nan" not in Page(page.read_text(encoding="utf-8")).text.lower()
    assert write(stored, tmp_path) == (page, data)  # what was written can be rendered again


def test_write_keeps_the_old_report_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"version": 1, "title": "old"}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aerogel.files.os.replace", refuse)
    with pytest.raises(AerogelError, match=r"cannot write .*report\.json: No space left"):
        write({"version": 1, "title": "new"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("report", [{"version": 2}, {"title": "x"}, {"version": "1"}, {}, []])
def test_unknown_version_is_refused(report: Any, tmp_path: Path) -> None:
    for call in (render, lambda report: write(report, tmp_path)):
        with pytest.raises(AerogelError, match=r"version must be 1, got .*; read it with the aerogel that"):
            call(report)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"report: every value must be JSON-able .*(PosixPath|WindowsPath)"):
        render({"version": 1, "run": Path("runs/x")})
