"""The report as text: numbers as a person reads them, the before/after table, and 80 columns for a pipe."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any, NamedTuple, TypeGuard

WIDTH = 80


# The rows of the before/after table: label, note, unit, and where `before` and `after` hold the value and the
# ends of its interval.
MEASURES: tuple[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Accuracy", "higher is better", "%", ("accuracy",), ("value", "low", "high")),
    ("Latency", "median of the timed runs", "ms", ("latency",), ("median_ms", "low_ms", "high_ms")),
    ("Latency p90", "nine runs of ten are faster", "ms", ("latency",), ("p90_ms",)),
    ("MACs", "multiply-accumulates", "count", (), ("macs",)),
    ("FLOPs", "2 x MACs + element-wise work", "count", (), ("flops",)),
    ("Access bytes", "memory access cost", "bytes", (), ("access_bytes",)),
    ("Peak bytes", "most memory held at once", "bytes", (), ("peak_bytes",)),
    ("Parameters", "", "count", (), ("params",)),
    ("Nonzero", "weights that are left", "count", (), ("nonzero_weights",)),
    ("File size", "", "bytes", (), ("file_bytes",)),
    ("Sparse file", "every bit kept", "bytes", (), ("sparse_bytes",)),
)


class Row(NamedTuple):
    """One measure of both networks as text; `ratio` is after / before, None for accuracy or where unknown."""

    label: str
    note: str
    before: str
    after: str
    exact_before: str
    exact_after: str
    change: str
    ratio: float | None


def terminal(report: dict[str, Any]) -> str:
    """Verdict and before/after table as plain lines of at most 80 columns (only a longer word, as a path, is
    left whole), without control codes."""
    verdict = report.get("verdict") or {}
    lines = wrap(report.get("title") or "aerogel report") + wrap(verdict.get("text") or outcome(report))
    for point in verdict.get("nearest") or []:
        lines += wrap(point.get("text"), "nearest   ")
    table = [("", "before", "after", "change")]
    table += [(row.label, row.before, row.after, row.change) for row in rows(report)]
    if len(table) > 1:
        lines += ["", *(f"{a:<13}{b:<27}{c:<27}{d:>13}" for a, b, c, d in table), ""]
    if dig(report, "distillation", "networks"):
        lines += ["", *network_lines(report["distillation"]["networks"]), ""]
    if dig(report, "pruned", "layers"):
        lines += [*kept_lines(report["pruned"]), ""]
    if report.get("scan"):
        lines += [*scan_lines(report["scan"]), ""]
    if report.get("parity"):
        lines += wrap(parity(report["parity"]), "export    ")
    if any(dig(report, side, "latency", "noisy") for side in ("before", "after")):
        lines += wrap("the machine was busy while latency was measured", "warning   ")
    if report.get("run"):
        lines += wrap(report["run"], "run       ")
    return "\n".join(lines) + "\n"


def parity(proof: dict[str, Any]) -> str:
    """How nearly the exported file answers as the model it came from."""
    agreement = human(percent(proof.get("top1_agreement")), "%")
    word = "ok" if proof.get("ok") else "FAILED"
    return (
        f"{word}: the model's own answer on {agreement} of {exact(proof.get('samples'))} samples, "
        f"largest difference of an output {tiny(proof.get('max_abs_diff'))}"
    )


def outcome(report: dict[str, Any]) -> str:
    """PASS or FAIL, DONE for a run that had nothing to pass, or UNFINISHED for one that stopped before its verdict."""
    names = {True: "PASS", False: "FAIL", None: "DONE"}
    verdict = report.get("verdict")
    return names.get(verdict["pass"], "UNFINISHED") if isinstance(verdict, dict) and "pass" in verdict else "UNFINISHED"


def scan_lines(scan: dict[str, Any]) -> list[str]:
    """Accuracy by group and share removed: every other share, so that 80 columns hold them."""
    shares = (scan.get("shares") or [])[::2]
    heads = "".join(f"{100 * share if is_number(share) else 0:>8.0f}" for share in shares)
    lines = [f"{'accuracy, % removed':<29}{'weights' if scan.get('unit') == 'weights' else 'channels':>9}{heads}"]
    for name, curve in (scan.get("groups") or {}).items():
        short = visible(flat(name))
        short = short if len(short) <= 28 else "..." + short[-25:]
        values = "".join(f"{human(value, '%').removesuffix(' %'):>8}" for value in (dig(curve, "values") or [])[::2])
        lines.append(f"{short:<29}{flat(dig(curve, 'channels')):>9}{values}")
    return lines


def kept_lines(pruned: dict[str, Any]) -> list[str]:
    """The same as text, 80 columns wide."""
    lines = [f"{'weights left':<44}{'all':>12}{'left':>12}{'%':>8}"]
    for one in pruned.get("layers") or []:
        name = visible(flat(dig(one, "name")))
        short_name = name if len(name) <= 43 else "..." + name[-40:]
        cells = [f"{value:,}" if is_number(value) else "-" for value in (dig(one, "weights"), dig(one, "kept"))]
        share = dig(one, "share")
        lines.append(f"{short_name:<44}{cells[0]:>12}{cells[1]:>12}{share if is_number(share) else 0:>8.2f}")
    return lines


def network_lines(networks: list[dict[str, Any]]) -> list[str]:
    """Of a distillation, a line a network: teacher, student before and after, in 80 columns."""
    lines = [f"{'':<15}{'accuracy on test':<25}{'valid.':>7}{'agrees':>8}{'ECE':>7}{'params':>9}{'MACs':>9}"]
    for one in networks:
        accuracy = spread("%", *(dig(one, "accuracy", key) for key in ("value", "low", "high")))
        shares = (human(one.get(key), "%").removesuffix(" %") for key in ("val_accuracy", "agreement", "ece"))
        counts = (human(one.get(key), "count") if is_number(one.get(key)) else "" for key in ("params", "macs"))
        (valid, agrees, ece), (params, macs) = shares, counts
        name = visible(flat(one.get("name")))
        lines.append(f"{name:<15}{accuracy:<25}{valid:>7}{agrees:>8}{ece:>7}{params:>9}{macs:>9}")
    return lines


def wrap(text: Any, head: str = "") -> list[str]:
    indent = " " * len(head)
    return textwrap.wrap(
        visible(flat(text)),
        WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def rows(report: dict[str, Any]) -> list[Row]:
    """The before/after table: a row for each measure that at least one of the two networks has."""
    table = []
    for label, note, unit, part, keys in MEASURES:
        values = [[dig(report, side, *part, key) for key in keys] for side in ("before", "after")]
        old, new = values[0][0], values[1][0]
        if not (is_number(old) or is_number(new)):
            continue
        both = is_number(old) and is_number(new)
        ratio = new / old if both and old and unit != "%" else None
        change = f"{new - old:+.2f} pt" if both and unit == "%" else human(ratio, "x")
        before, after = (spread(unit, *value) for value in values)
        table.append(Row(label, note, before, after, exact(old), exact(new), change, ratio))
    return table


def spread(unit: str, value: Any, low: Any = None, high: Any = None) -> str:
    """`2.50 ms [2.41, 2.58]`, or the number alone where there is no interval."""
    text = human(value, unit)
    if not (is_number(low) and is_number(high)):
        return text
    ends = (human(end, unit).removeprefix("x").removesuffix(f" {unit}") for end in (low, high))
    return f"{text} [{', '.join(ends)}]"


def human(value: Any, unit: str = "") -> str:
    """A number as a person reads it: counts in K M G T, bytes in KiB MiB GiB TiB, long times in min and h."""
    if not is_number(value):
        return "-"
    if unit in ("count", "bytes"):
        factor, prefix = scale(value, unit)
        text = f"{value:,}" if factor == 1 and isinstance(value, int) else digits(value / factor)
        return f"{text} {prefix}".rstrip()
    if unit == "x":
        return f"x{value:.2f}"
    if unit in ("%", "pt"):
        return f"{value:.2f} {unit}"
    if unit == "s" and value >= 60:
        minutes = round(value / 60)
        return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{digits(value)} {unit}".rstrip()


def scale(value: float, unit: str) -> tuple[float, str]:
    """The factor and the prefix under which `value` reads as 1 to 1000 (bytes: 1024)."""
    step, prefixes = 1000, ("", "K", "M", "G", "T")
    if unit == "bytes":
        step, prefixes = 1024, ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while power < 4 and abs(value) >= step ** (power + 1) * 0.9995:
        power += 1
    return float(step**power), prefixes[power]


def digits(value: float) -> str:
    """Three significant digits, at most four decimals, thousands parted by commas."""
    size = int(f"{value:.2e}".split("e")[1])
    return f"{value:,.{min(max(2 - size, 0), 4)}f}"


def tiny(value: Any) -> str:
    """An error such as 1.2e-07."""
    return f"{value:.1e}" if is_number(value) else "-"


def percent(share: Any) -> Any:
    return share * 100 if is_number(share) else None


def exact(value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else repr(value)


def flat(value: Any) -> str:
    """Any JSON value as one text; a list of numbers is a shape, `8 x 1 x 5 x 5`."""
    if value is None:
        return "-"
    if isinstance(value, list) and value and all(is_number(x) for x in value):
        return " x ".join(str(x) for x in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, dict, list)) else str(value)


def visible(text: str, keep: str = "") -> str:
    """Control characters, direction marks and broken Unicode as escapes like \\x1b; those in `keep` stay."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def is_number(value: Any) -> TypeGuard[int | float]:
    """True of a finite number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def dig(value: Any, *keys: str) -> Any:
    """`value[a][b]...`, None where a step is absent."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
