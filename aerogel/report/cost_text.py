"""What `aerogel cost` prints of a cost report (`aerogel.report.costing`): as lines, as CSV, as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from aerogel.console import printable
from aerogel.cost.latency import Latency
from aerogel.report.costing import grouped
from aerogel.report.sheet import Column, Sheet, as_csv, as_lines, as_markdown, code
from aerogel.report.stored import stored_lines
from aerogel.report.terminal import digits, human

NOTABLE = 0.01  # of the predicted time: what no row has is told above it
UNITS = {"macs": "count", "flops": "count", "params": "count", "access": "bytes", "peak": "bytes", "latency": "ms"}
TOTALS = {"macs": ("MACs", "count"), "flops": ("FLOPs", "count"), "params": ("params", "count"),
          "access_bytes": ("access", "bytes"), "peak_bytes": ("peak", "bytes"), "ms": ("predicted", "ms")}  # fmt: skip


def cost_sheet(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> Sheet:
    """The rows of `grouped`, with the columns that there is something in."""
    columns = [Column("name", by)]
    if by == "layer":
        columns += [Column("op", "op"), Column("shape", "output", "shape")]
    else:
        columns += [Column("layers", "ops", "exact")]
    columns += [Column("params", "params", "exact"), Column("macs", "MACs", "exact")]
    columns += [] if by == "layer" else [Column("flops", "FLOPs", "exact")]
    columns += [Column("access_bytes", "access", "bytes"), Column("intensity", "FLOPs/byte", "number")]
    if report["device"]:
        columns += [Column("ms", "ms", "ms"), Column("share", "share", "%"), Column("bound", "bound")]
    else:
        columns += [Column("share", "of MACs", "%")]
    if any(layer["measured_ms"] is not None for layer in report["layers"]):
        columns += [Column("measured_ms", "measured ms", "ms")]
    return Sheet(tuple(columns), tuple(grouped(report, by, depth)))


def full_sheet(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> Sheet:
    """The same rows with every column, for a machine."""
    texts = ("name", "node", "module", "op", "family") if by == "layer" else ("name",)
    columns = [Column(key, key) for key in texts]
    columns += [Column("shape", "shape", "shape")] if by == "layer" else [Column("layers", "layers", "exact")]
    numbers = ("params", "macs", "flops", "access_bytes", "intensity", "ms", "measured_ms", "share")
    columns += [*(Column(key, key, "number") for key in numbers), Column("bound", "bound")]
    return Sheet(tuple(columns), tuple(grouped(report, by, depth)))


def against_sheet(against: Mapping[str, Any]) -> Sheet:
    """One row a layer of either network; every measure of the one compared with first."""
    columns = [Column("status", "change"), Column("name", "layer"), Column("op", "op"),
               Column("name_before", "layer before")]  # fmt: skip
    measures = [("params", "params", "exact"), ("macs", "MACs", "exact"), ("access_bytes", "access", "bytes")]
    for key, title, unit in [*measures, *([("ms", "ms", "ms")] if "ms" in against["totals"] else [])]:
        columns += [Column(f"{key}_before", f"{title} before", unit), Column(f"{key}_after", "after", unit)]
    return Sheet(tuple(columns), tuple(against["layers"]))


def as_text(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> str:
    """For a terminal: the table, the totals, what is compared, the budget, and what the words mean."""
    if "against" in report:
        sheet = _terse(against_sheet(report["against"]))
        lines = [*as_lines(sheet, _differing(sheet)), "", *as_lines(totals_sheet(report))]
    else:
        lines = as_lines(_terse(cost_sheet(report, by, depth)))
    told = [*lines, *summary(report), *verdict_lines(report), "", *_footer(report)]
    return "\n".join(map(printable, told))


def as_csv_text(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> str:
    """The table with exact numbers; of two networks, every layer of either."""
    return as_csv(against_sheet(report["against"]) if "against" in report else full_sheet(report, by, depth))


def as_markdown_text(report: Mapping[str, Any], by: str = "layer", depth: int | None = None) -> str:
    """For a comment: totals and verdicts first, the table folded away."""
    if "against" in report:
        sheet = _terse(against_sheet(report["against"]))
        table, title = as_markdown(sheet, _differing(sheet)), "Layers that differ"
        head = [*as_markdown(totals_sheet(report)), ""]
    else:
        table, title, head = as_markdown(_terse(cost_sheet(report, by, depth))), f"By {by}", []
    lines = [f"### Cost of {code(report['model'])}", "", *head]
    lines += [f"- {code(line)}" for line in [*summary(report), *verdict_lines(report)]]
    lines += ["", f"<details><summary>{title}</summary>", "", *table, "", "</details>", ""]
    return "\n".join([*lines, *(f"<sub>{line}</sub>" for line in _footer(report))])


def summary(report: Mapping[str, Any]) -> list[str]:
    """The facts about the whole network, a line each."""
    size = ", ".join("x".join(map(str, entry["shape"])) + f" {entry['dtype']}" for entry in report["inputs"])
    lines = [f"{report['model']}, input {size}, batch {report['batch']}, weights {report['dtype']}"]
    lines += [
        f"params {report['params']:,}   MACs {report['macs']:,}   FLOPs {report['flops']:,}   "
        f"{digits(report['intensity'])} FLOPs a byte",
        f"access {report['access_bytes']:,} bytes ({report['access_bytes_raw']:,} without fusion)",
        f"peak {report['peak_bytes']:,} bytes at {report['peak_op']} ({report['peak_bytes_raw']:,} without fusion; "
        f"{report['arena_bytes']:,} as a greedy planner lays them out)",
    ]
    lines += [*stored_lines(report), *_times(report), *_verified(report)]
    lines += _uncounted(report)
    if "against" in report:
        other = report["against"]
        lines.append(f"against {other['model']}: {other['text']}".removesuffix(": "))
        if other["measured"]:
            ratio, low, high = (f"{other['measured'][key]:.2f}" for key in ("ratio", "low", "high"))
            lines.append(f"measured: x{ratio} [{low}, {high}] of {other['model']}, timed in turns")
        lines += [f"{other['model']}: {line}" for line in _kernels(other, other["totals"].get("ms", {}).get("before"))]
        lines += [f"{other['model']}: {line}" for line in _uncounted(other)]
        lines += [f"{other['model']}: NOT verified by a second count"] * (other["verified"] is False)
        if other["input"] != report["input"]:
            lines.append(f"the two read different inputs: {other['input']} and {report['input']}")
    return lines


def verdict_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each limit of the budget."""
    return [verdict_line(verdict) for verdict in report.get("budget") or []]


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """macs<=300M missed: 569 M (counted); most of it: features.5 (conv2d), 51.4 M."""
    unit = UNITS[verdict["measure"]]
    word = "met" if verdict["met"] else "missed"
    text = f"budget {verdict['text']} {word}: {human(verdict['value'], unit)} ({verdict['basis']})"
    if verdict["missing"]:
        text += f", and more: {', '.join(verdict['missing'])} could not be counted"
    if verdict["met"] or not verdict["layer"]:
        return text
    where = f"{verdict['layer']} ({verdict['op']})"
    if verdict["measure"] == "peak":
        return f"{text}; reached at {where}"
    return f"{text}; the most in {where}: {human(verdict['layer_value'], unit)}"


def totals_sheet(report: Mapping[str, Any]) -> Sheet:
    """Both networks' totals and their ratio."""
    rows = []
    for name, amount in report["against"]["totals"].items():
        title, unit = TOTALS[name]
        before, after = (human(amount[side], unit) for side in ("before", "after"))
        rows.append({"total": title, "before": before, "after": after, "ratio": amount["ratio"]})
    columns = (Column("total", "total"), Column("before", "before"), Column("after", "after"))
    return Sheet((*columns, Column("ratio", "after / before", "x")), tuple(rows))


def _uncounted(report: Mapping[str, Any]) -> list[str]:
    return [f"not counted: {entry['op']} in {', '.join(entry['modules'])}" for entry in report["uncounted"]]


def _times(report: Mapping[str, Any]) -> list[str]:
    lines = []
    device, latency = report["device"], report["latency"]
    if device:
        held: dict[str, float] = {}
        for layer in report["layers"]:
            held[layer["bound"]] = held.get(layer["bound"], 0.0) + layer["ms"]
        total = report["predicted_ms"]
        shares = ", ".join(f"{100 * ms / total:.0f} % {bound}" for bound, ms in held.items() if total and ms)
        kind = f"{device['title']}; {device['kind']}, {device['threads']} thread{'s' * (device['threads'] > 1)}"
        lines.append(f"predicted {digits(total)} ms on {device['name']} ({kind}), bound by: {shares or 'nothing'}")
        lines += _kernels(report, total)
        if report["roofline_because"]:
            lines.append(f"predicted by the roofline, not by kernels: {report['roofline_because']}")
    if latency:
        text = Latency(**latency).describe()
        busy = f"; NOISY, the load was {latency['load']:.1f}: repeat it on a quiet machine" * latency["noisy"]
        lines.append(f"measured {text}, {latency['runtime']}, {latency['cpu']}{busy}")
    return lines


def _kernels(report: Mapping[str, Any], total_ms: float | None) -> list[str]:
    """How a time was predicted from kernels, and what of it is in no row."""
    if not report["prediction"]:
        return []
    number, estimated = report["prediction"]["kernels"], report["prediction"]["estimated"]
    rest = ", ".join(f"{count} {op}" for op, count in estimated.items())
    lines = [f"predicted from {number} kernels, each measured" + f"; but for {rest}: roofline" * bool(rest)]
    if report["prediction"]["unread"]:
        lines.append(f"NOT predicted: {', '.join(report['prediction']['unread'])}, of which the runtime tells nothing")
    left = report["unplaced_ms"]
    if total_ms and left > NOTABLE * total_ms:
        share = f"{digits(left)} ms ({100 * left / total_ms:.0f} %)"
        lines.append(f"{share} stand in no row: what a run costs beside its kernels, and kernels that no layer takes")
    return lines


def _verified(report: Mapping[str, Any]) -> list[str]:
    found = report["verification"]
    if found is None:
        return []
    if found["agrees"]:
        return ["verified: a second, independent count gives the same MACs"]
    if found["agrees"] is None:
        return [f"not verified: {found['reason']}"]
    differs = ", ".join(f"{name} {ours:,} and {theirs:,}" for name, (ours, theirs) in found["differs"].items())
    return [f"NOT verified: a second count gives {found['macs']:,} MACs; they differ in {differs}"]


def _footer(report: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in report["environment"].items())
    return [*textwrap.wrap(report["convention"], 110), f"{versions}; {report['schema']} version {report['version']}"]


def _terse(sheet: Sheet) -> Sheet:
    """For the eye: of a fused layer its own op, and the old name only where it is another."""
    rows = []
    for row in sheet.rows:
        short = {"op": row["op"].partition("+")[0]} if "op" in row else {}
        same = row.get("name_before") == row["name"]
        rows.append({**row, **short, **({"name_before": None} if same else {})})
    renamed = any(row.get("name_before") for row in rows)
    columns = tuple(c for c in sheet.columns if c.key != "name_before" or renamed)
    return Sheet(columns, tuple(rows))


def _differing(sheet: Sheet) -> list[Mapping[str, Any]]:
    return [row for row in sheet.rows if row["status"] != "same"]
