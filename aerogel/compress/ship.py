"""Stage 5: the last candidate as files, the check that the file computes what the model computes, and the verdict.

PASS only if the upper 95 % bound of the paired accuracy drop on the test split is within --max-drop, the upper bound
of every size goal is within its limit, and the exported file agrees with the model.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.compress.goal import Goal
from aerogel.compress.job import Job
from aerogel.compress.measure import compare_files, correct_on, summary
from aerogel.compress.run import Run
from aerogel.cost import count
from aerogel.cost.latency import Ratio
from aerogel.data import normalise
from aerogel.export.verify import check_parity
from aerogel.files import write_json
from aerogel.graph import capture
from aerogel.prune import couple
from aerogel.prune.plan import measure as measure_metric
from aerogel.stats import accuracy_interval, paired_drop

SAMPLES = 1000  # real test images on which the file is compared with the model


def ship(job: Job, run: Run, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """run["ship"]: {"verdict", "before", "after", "parity"}; the result itself is in model/."""
    if "ship" in run:
        return run["ship"]
    folder = run.clear("model")
    shutil.copytree(run.path / "candidates" / candidates[-1]["name"], folder)
    found = judge(job, run.path / "candidates/000", folder)
    found["before"] = run["baseline"] | found["before"]
    if not found["verdict"]["pass"]:
        found["verdict"]["nearest"] = _nearest(job, candidates, found["verdict"]["goals"])
    write_json(folder / "verify.json", found)
    run["ship"] = found
    return found


def judge(job: Job, original: Path, result: Path) -> dict[str, Any]:
    """Compares two saved folders by their model.onnx on the test split, and the file with its own model."""
    model, whole, file = job.load(result), original / "model.onnx", result / "model.onnx"
    images = normalise(job.data.test.images[:SAMPLES], job.data.mean, job.data.std)
    parity = check_parity(model, file, images)
    job.console.say("ship", f"{file}: {100 * parity.top1_agreement:.2f} % top-1 agreement with the model on "
                    f"{parity.samples} test images, largest difference {parity.max_abs_diff:.1e}")  # fmt: skip
    ratio = compare_files(job, whole, file, job.settings.seconds)
    right_before, right_after = correct_on(job, whole, "test"), correct_on(job, file, "test")
    drop = paired_drop(right_before, right_after)
    before = _sizes(job, job.load(original)) | {"latency": asdict(ratio.a)}
    after = _sizes(job, model) | {
        "latency": asdict(ratio.b),
        "accuracy": asdict(accuracy_interval(right_after)),
        "file_bytes": file.stat().st_size,
    }
    goals = [_size_goal(g, ratio, before, after) for g in job.goals]
    goals.append(_goal("accuracy drop", "pt", drop.value, drop.low, drop.high, job.settings.max_drop))
    passed = parity.ok and all(goal["met"] for goal in goals)
    verdict = {"pass": passed, "text": _text(passed, goals), "goals": goals, "nearest": []}
    return {"verdict": verdict, "before": before, "after": after, "parity": asdict(parity)}


def _sizes(job: Job, model: nn.Module) -> dict[str, Any]:
    graph = capture(model, job.example)
    return summary(count(graph)) | {"channels": measure_metric(couple(graph), "channels")}


def _size_goal(goal: Goal, ratio: Ratio, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Latency by measurement with its interval; counts are exact, so their interval is a point."""
    if goal.metric == "latency" and goal.absolute:
        return _goal("latency", "ms", ratio.b.median_ms, ratio.b.low_ms, ratio.b.high_ms, goal.limit)
    if goal.metric == "latency":
        return _goal("latency", "x", ratio.ratio.value, ratio.ratio.low, ratio.ratio.high, goal.limit)
    now = after[goal.metric] if goal.absolute else after[goal.metric] / before[goal.metric]
    return _goal(goal.metric, "" if goal.absolute else "x", now, now, now, goal.limit)


def _goal(name: str, unit: str, value: float, low: float, high: float, limit: float) -> dict[str, Any]:
    return {
        "name": name,
        "unit": unit,
        "value": value,
        "low": low,
        "high": high,
        "limit": limit,
        "met": high <= limit,
    }


def _text(passed: bool, goals: list[dict[str, Any]]) -> str:
    parts = [f"{g['name']} {_amount(g, 'value')} [{_amount(g, 'low')}, {_amount(g, 'high')}] "
             f"{'<=' if g['met'] else 'not within'} {_amount(g, 'limit')}" for g in goals]  # fmt: skip
    return "   ".join(["PASS" if passed else "FAIL", *parts])


def _amount(goal: dict[str, Any], key: str) -> str:
    value, unit = goal[key], goal["unit"]
    return (
        f"x{value:.3f}"
        if unit == "x"
        else f"{value:.2f} pt"
        if unit == "pt"
        else f"{value:.5g}{' ' + unit if unit else ''}"
    )


def _nearest(job: Job, candidates: list[dict[str, Any]], goals: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The nearest goals that can be met: a smaller cut at this drop, or this size at a larger drop."""
    size = "latency_ratio" if job.size_metric == "latency" else job.size_metric
    size = size if size in candidates[0] else "macs"
    name = size.removesuffix("_ratio")
    best = candidates[0]["val_accuracy"]
    inside = [c for c in candidates[1:] if best - c["val_accuracy"] <= job.settings.max_drop]
    found = []
    drop = goals[-1]
    if not drop["met"]:
        found.append({"text": f"this size needs --max-drop {drop['high'] + 0.005:.2f}"})
        if inside:
            one = min(inside, key=lambda c: c[size])
            share = one[size] / candidates[0][size]
            found.append(
                {
                    "text": f"--target {name}={share:.2f} cost {best - one['val_accuracy']:.2f} points on validation (candidate {one['name']})"
                }
            )
    for goal in goals[:-1]:
        if not goal["met"]:
            unit = "ms" if goal["unit"] == "ms" else ""
            found.append(
                {"text": f"--target {goal['name']}={goal['high'] * 1.01:.3g}{unit} is what this result meets"}
            )
    return found
