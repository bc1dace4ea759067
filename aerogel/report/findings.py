"""What `aerogel lint` prints: a dict of schema "aerogel.lint", version 1, and the same as lines for a terminal.

Always there: model, input, device, predicted_ms, access_bytes, noise, findings (dearest first, those below noise too),
rules ({rule: its share of the predicted time}), exceeded (a line for each --fail-on that is), uncounted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aerogel.console import printable
from aerogel.cost.count import count
from aerogel.cost.device import THIS, Device, this_path
from aerogel.cost.device import device as find_device
from aerogel.cost.guidelines import NOISE, RULES, Finding, lint, severity
from aerogel.cost.guidelines.exceptions import exceeded, settings
from aerogel.cost.guidelines.network import plural
from aerogel.cost.roofline import total_ms
from aerogel.export import open_counted
from aerogel.graph import Graph, capture
from aerogel.report.terminal import human

SCHEMA, VERSION = "aerogel.lint", 1
WIDTH = 110
DEFAULT = "server_cpu"  # the device of a machine that was not calibrated
CAVEAT = (
    "Times are predicted by the device's roofline, not measured. The paper measured G1 to G4 on a GTX 1080Ti with "
    "batch 8 and a Snapdragon 810 with batch 1; on another device another finding is the dearest."
)


def run(
    model: str, device: str | None = None, allow: Sequence[str] = (), limits: Sequence[str] = (),
    config: Path | None = None, **opening: Any,
) -> dict[str, Any]:  # fmt: skip
    """The report of `aerogel lint MODEL`. opening: weights, input and trust as typed.

    Raises AerogelError for whatever in it is wrong.
    """
    held = settings(config)
    chosen = chosen_device(device or held.device)
    graph = captured(model, **opening)
    findings = lint(graph, chosen, [*held.allow, *allow])
    return lint_report(model, graph, chosen, findings, [*held.fail_on, *limits])


def chosen_device(name: str | None) -> Device:
    """The device of that name; without one this machine where it was calibrated, else a server's processor."""
    return find_device(name or (THIS if this_path().exists() else DEFAULT))


def captured(model: str, *, weights: str | None, input: str | None, trust: bool) -> Graph:
    """The graph of a network named as on the command line, which is only counted."""
    return capture(*open_counted(model, input, weights, trust))


def lint_report(
    model: str, graph: Graph, device: Device, findings: Sequence[Finding], limits: Iterable[str] = ()
) -> dict[str, Any]:
    """The findings of `aerogel.cost.lint` as JSON. Raises AerogelError for a limit that is no RULE=SHARE%."""
    cost = count(graph)
    rules = {rule: sum(f.share for f in findings if f.rule == rule) for rule in RULES}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": model,
        "input": [list(graph.values[name].shape) for name in graph.inputs],
        "device": device.model_dump(),
        "predicted_ms": total_ms(cost.layers, device),
        "access_bytes": cost.access_bytes,
        "noise": NOISE,
        "findings": [finding.to_json() for finding in findings],
        "rules": rules,
        "exceeded": exceeded(findings, limits),
        "uncounted": [{"op": op, "modules": modules} for op, modules in cost.uncounted.items()],
    }


def as_text(report: dict[str, Any]) -> str:
    """Each finding above noise with its price and what to write instead, those alike as one; then the sums by rule."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for found in report["findings"]:
        alike.setdefault((found["rule"], found["what"], found["rewrite"], found["note"]), []).append(found)
    merged = sorted((_together(group) for group in alike.values()), key=lambda found: -found["ms"])
    # The peak is memory: it may be too much for a device where its time is nothing.
    heard = [found for found in merged if found["share"] >= report["noise"] or found["rule"] == "P4-peak"]
    device, shapes = report["device"], ", ".join("x".join(map(str, shape)) for shape in report["input"])
    lines = [
        f"{report['model']}, input {shapes}, on {device['title']} ({device['kind']})",
        f"predicted {report['predicted_ms']:.3g} ms, access {human(report['access_bytes'], 'bytes')}",
        "",
    ]
    for found in heard:
        lines += _lines(found)
    if len(merged) > len(heard):
        rest = plural(len(merged) - len(heard), "more finding")
        lines.append(f"{rest} below {report['noise']:.0%} of the predicted time: --json has them")
    if not report["findings"]:
        lines.append("nothing found")
    sums = [f"{rule} {share:.1%}" for rule, share in report["rules"].items() if share >= report["noise"]]
    lines += [f"at stake by rule, overlapping: {', '.join(sums)}"] if sums else []
    lines += [f"not counted: {entry['op']} in {', '.join(entry['modules'])}" for entry in report["uncounted"]]
    lines += ["", *textwrap.wrap(CAVEAT, WIDTH)]
    lines += [f"over the limit  {line}" for line in report["exceeded"]]
    return "\n".join(map(printable, lines))


def _together(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Findings that say the same of several ops, as one."""
    sums = {key: sum(found[key] for found in group) for key in ("ms", "share", "bytes", "gain_ms", "gain_bytes")}
    names = {key: [name for found in group for name in found[key]] for key in ("nodes", "modules")}
    return {**group[0], **sums, **names, "severity": severity(sums["share"])}


def _lines(found: dict[str, Any]) -> list[str]:
    others = len(found["modules"]) - 1
    where = (found["module"] or found["nodes"][0]) + (f" and {others} more" if others else "")
    source = f" ({found['source']})" if found["source"] else ""
    stake = f"{found['ms']:.3g} ms at stake ({found['share']:.1%}), {human(found['bytes'], 'bytes')}"
    retrain = "needs retraining" if found["needs_retraining"] else "no retraining"
    gain = f"saves {found['gain_ms']:.3g} ms, {human(found['gain_bytes'], 'bytes')}; {retrain}"
    if found["gain_ms"] < 0:
        gain = f"costs {-found['gain_ms']:.3g} ms more; {retrain}"
    lines = [f"{found['rule']:<8} {found['severity']:<7} {where}{source}: {stake}"]
    for text in (found["what"], f"-> {found['rewrite']}: {gain}", found["note"]):
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 17, subsequent_indent=" " * 20)
    return [*lines, ""]
