"""Stage 6: the report's dictionary, from what the stages left in the run."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from shlex import quote
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.run import ORIGINAL, RESULT, Run
from aerogel.compress.settings import described
from aerogel.compress.slim import scales
from aerogel.cost import Layer, count
from aerogel.files import read_json
from aerogel.graph import capture


def tell(job: Job, run: Run, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of a run whose result is shipped, or whose scan is done where there was no goal (no candidates)."""
    path, settings = quote(str(run.path)), job.settings
    repeat = [f"aerogel {settings.verb} --config {path}/config.toml"]
    report = facts(job, run) | {"curves": curves_of(run), "stages": _stages(run, candidates), "repeat": repeat}
    if settings.scan:
        report["scan"] = run["scan"]
    if not candidates:
        return report | {"before": run["baseline"], "verdict": {"pass": None, "text": scanned(run), "goals": []}}
    if settings.slimming:
        report["scales"] = scales(job, run)
    return report | {
        "method": described(settings),
        "repeat": [*repeat, f"aerogel verify {path}"],
        "candidates": candidates,
        **_how(run, candidates),
        "layers": _layers(job, run),
        **run["ship"],
    }


def facts(job: Job, run: Run) -> dict[str, Any]:
    """What the report of any run begins with."""
    environment = read_json(run.path / "environment.json")
    return {
        "version": 1,
        "title": job.settings.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": environment.pop("command"),
        "run": str(run.path),
        "environment": environment,
        "data": {
            "name": job.data.name,
            "fingerprint": f"sha256:{job.data.fingerprint()}",
            **{split: len(getattr(job.data, split)) for split in ("train", "val", "test")},
        },
        "bad_files": [list(row) for row in job.data.bad_files],
    }


def _how(run: Run, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the channels that were cut, or layer by layer of the weights that were pruned."""
    last = candidates[-1]
    if "kept" not in last:
        return {"cut": {key: last[key] for key in ("max_error", "frozen", "inexact", "difference")}}
    rows = [
        {"name": name, "weights": weights, "kept": kept, "share": 100 * kept / weights}
        for name, (kept, weights) in last["kept"].items()
    ]
    held = run["baseline"]["weights"] - run["baseline"]["nonzero_weights"]
    return {"pruned": {"layers": rows, "dead": last["dead"], "zero_before": held}}


def _stages(run: Run, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each stage found and the seconds it took, those of interrupted attempts included."""
    accuracy, kept = run["baseline"]["accuracy"]["value"], sum(one["frontier"] for one in candidates)
    texts = {"check": run["check"]["text"], "baseline": f"top-1 {accuracy:.2f} %, {run['baseline']['macs']:,} MACs"}
    if "scan" in run:
        texts["scan"] = scanned(run)
    if "slim" in run:
        texts["slim"] = f"validation {run['slim']['val_accuracy']:.2f} % before anything is cut"
    if candidates:
        rounds = f"{len(candidates) - 1} cut{'s' if len(candidates) > 2 else ''}"
        texts["plan"] = run["plan"]["text"]
        done = "cut and recover" if "kept" not in candidates[-1] else "prune and retrain"
        texts[done] = f"{rounds.replace('cut', 'pruning') if done[0] == 'p' else rounds}, {kept} on the frontier"
        texts["ship"] = run["ship"]["verdict"]["text"]
    for stage, text in texts.items():
        texts[stage] = "; ".join([text, *_speeds(run, stage)])
    return [{"name": name, "seconds": round(run["seconds"][name], 1), "text": text} for name, text in texts.items()]


def _speeds(run: Run, stage: str) -> list[str]:
    """How fast the last training of a stage went, and which knob makes it faster."""
    recovery = dict.fromkeys(("cut and recover", "prune and retrain"), ("gradual", "step "))
    parts = (recovery | {"baseline": ("baseline",), "slim": ("slim",)}).get(stage)
    held = run["speed"] if parts and "speed" in run else {}
    return [speed["text"] for name, speed in held.items() if name.startswith(parts or ())][-1:]


def scanned(run: Run) -> str:
    """`scanned 5 groups on 500 validation images, 91.20 % whole`."""
    groups, images, whole = (run["scan"][key] for key in ("groups", "images", "whole"))
    what = "layers" if run["scan"].get("unit") == "weights" else "groups"
    return f"scanned {len(groups)} {what} on {images:,} validation images, {whole:.2f} % whole"


def _layers(job: Job, run: Run) -> list[dict[str, Any]]:
    """Layer by layer before and after; a cut removes channels, never ops, so the two lists run in step."""
    before, after = (count(capture(job.load(run.path / part), job.example)) for part in (ORIGINAL, RESULT))
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


def curves_of(run: Run) -> list[dict[str, Any]]:
    """Training losses from events.jsonl.

    A torn last line (a killed run) is passed over; of steps done twice (a resumed run) the later record counts.
    """
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for line in (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if "train" in event:
            losses = {name: value for name, value in event.items() if name not in ("time", "train", "step")}
            stages.setdefault(event["train"], {})[event["step"]] = losses
    return [curve_of(stage, dict(sorted(points.items()))) for stage, points in stages.items()]


def curve_of(stage: str, points: dict[int, dict[str, float]]) -> dict[str, Any]:
    names = dict.fromkeys(name for losses in points.values() for name in losses)
    series = {name: [losses.get(name) for losses in points.values()] for name in names}
    return {"name": stage, "x": list(points), "series": series}
