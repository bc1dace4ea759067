"""Stage 6: the report's dictionary, from what the stages left in the run. Any stage may be missing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.measure import cost_of
from aerogel.compress.run import Run
from aerogel.cost import Layer
from aerogel.files import read_json


def tell(job: Job, run: Run, candidates: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The report of a run, finished or not."""
    environment = read_json(run.path / "environment.json")
    report: dict[str, Any] = {
        "version": 1,
        "title": f"{job.settings.model} on {job.data.name}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": environment.pop("command", ""),
        "run": str(run.path),
        "environment": environment,
        "data": {
            "name": job.data.name,
            "fingerprint": f"sha256:{job.data.fingerprint()}",
            **{split: len(getattr(job.data, split)) for split in ("train", "val", "test")},
        },
        "bad_files": [list(row) for row in job.data.bad_files],
        "curves": _curves(run),
        "stages": run["stages"] if "stages" in run else [],
        "repeat": [f"aerogel compress --config {run.path / 'config.toml'}", f"aerogel verify {run.path}"],
    }
    if "baseline" in run:
        report["before"] = run["baseline"]
    if candidates:
        report["candidates"] = candidates
        last = candidates[-1]
        report["cut"] = {key: last.get(key) for key in ("max_error", "frozen", "inexact")}
    if "ship" in run:
        report |= run["ship"]
        report["layers"] = _layers(job, run)
    return report


def _layers(job: Job, run: Run) -> list[dict[str, Any]]:
    """Layer by layer before and after; a cut removes channels, never ops, so the two lists run in step."""
    before = cost_of(job, job.load(run.path / "candidates/000"))
    after = cost_of(job, job.load(run.path / "model"))
    return [_row(a, b) for a, b in zip(before.layers, after.layers, strict=True) if a.weight]


def _row(a: Layer, b: Layer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": a.name,
        "op": a.op,
        "shape_before": list(a.weight or ()),
        "shape_after": list(b.weight or ()),
    }
    for side, layer in (("before", a), ("after", b)):
        row |= {
            f"macs_{side}": layer.macs,
            f"access_{side}": layer.access_bytes,
            f"params_{side}": layer.params,
        }
    return row


def _curves(run: Run) -> list[dict[str, Any]]:
    """Training losses from events.jsonl; a torn last line (a killed run) is passed over."""
    curves: dict[str, dict[str, Any]] = {}
    path = run.path / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if "train" not in event:
            continue
        curve = curves.setdefault(event["train"], {"name": event["train"], "x": [], "series": {}})
        curve["x"].append(event["step"])
        for name in event.keys() - {"time", "train", "step"}:
            curve["series"].setdefault(name, []).append(event[name])
    return list(curves.values())
