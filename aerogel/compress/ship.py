"""Stage 5: the last candidate as files, the check that the file computes what the model computes, and the verdict.

PASS only if the upper 95 % bound of the paired accuracy drop on the test split is within --max-drop (where one is asked
for), the upper bound of every size goal is within its limit, and the exported file agrees with the model.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aerogel.compress.goal import WEIGHTS, Goal, typed
from aerogel.compress.job import Job
from aerogel.compress.measure import compare_files, correct_on, sizes
from aerogel.compress.run import ORIGINAL, RESULT, Run
from aerogel.cost.latency import Ratio
from aerogel.data import normalise
from aerogel.export.verify import check_parity
from aerogel.files import new_folder, write_json
from aerogel.stats import accuracy_interval, paired_drop

FORMATS = {"x": ("x", ".3f", ""), "pt": ("", ".2f", " pt"), "ms": ("", ".4g", " ms"), "": ("", ",.0f", "")}
SAMPLES = 1000  # real test images on which the file is compared with the model


def ship(job: Job, run: Run, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """run["ship"]: {"verdict", "before", "after", "parity"}; the result itself is in model/."""
    if "ship" in run:
        return run["ship"]
    best = run.path / "candidates" / candidates[-1]["name"]
    found = judge(job, run.path / ORIGINAL, best)
    found["before"] = run["baseline"] | found["before"]
    if not found["verdict"]["pass"]:
        found["verdict"]["nearest"] = _nearest(job, candidates, found["verdict"]["goals"])
    with new_folder(run.clear(RESULT), "ship") as temp:
        for file in best.iterdir():
            shutil.copyfile(file, temp / file.name)
        write_json(temp / "verify.json", found)
    job.console.say("ship", f"{run.path / RESULT}: {parity_text(found['parity'])}")
    run["ship"] = found
    return found


def judge(job: Job, original: Path, result: Path) -> dict[str, Any]:
    """Compares two saved folders by their model.onnx on the test split, and the file with its own model."""
    model, whole, file = job.load(result), original / "model.onnx", result / "model.onnx"
    images = normalise(job.data.test.images[:SAMPLES], job.data.mean, job.data.std)
    parity = check_parity(model, file, images)
    ratio = compare_files(job, whole, file, job.settings.seconds)
    right_before, right_after = correct_on(job, whole, "test"), correct_on(job, file, "test")
    drop = paired_drop(right_before, right_after)
    before = sizes(job, job.load(original)) | {"latency": asdict(ratio.a), "file_bytes": whole.stat().st_size}
    after = sizes(job, model) | {
        "latency": asdict(ratio.b),
        "accuracy": asdict(accuracy_interval(right_after)),
        "file_bytes": file.stat().st_size,
    }
    goals = [_sparsity_goal(job, g, before, after) if g.metric == WEIGHTS else _size_goal(g, ratio, before, after)
             for g in job.goals]  # fmt: skip
    goals.append(_goal("accuracy drop", "pt", drop.value, drop.low, drop.high, job.settings.max_drop))
    passed = parity.ok and all(goal["met"] is not False for goal in goals)
    parts = ["PASS" if passed else "FAIL", *map(_goal_text, goals)]
    if not parity.ok:
        parts.append("the exported file gives other answers than the model")
    verdict = {"pass": passed, "text": "   ".join(parts), "goals": goals, "nearest": []}
    return {"verdict": verdict, "before": before, "after": after, "parity": asdict(parity)}


def parity_text(parity: dict[str, Any]) -> str:
    """`100.00 % top-1 agreement with the model on 539 images, largest difference 2.9e-06`."""
    return (
        f"{100 * parity['top1_agreement']:.2f} % top-1 agreement of model.onnx with the model on {parity['samples']:,} "
        f"images, largest difference {parity['max_abs_diff']:.1e}"
    )


def _size_goal(goal: Goal, ratio: Ratio, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Latency by measurement with its interval; counts are exact, so their interval is a point."""
    if goal.metric == "latency" and goal.absolute:
        return _goal("latency", "ms", ratio.b.median_ms, ratio.b.low_ms, ratio.b.high_ms, goal.limit)
    if goal.metric == "latency":
        return _goal("latency", "x", ratio.ratio.value, ratio.ratio.low, ratio.ratio.high, goal.limit)
    now = after[goal.metric] if goal.absolute else after[goal.metric] / before[goal.metric]
    return _goal(goal.metric, "" if goal.absolute else "x", now, now, now, goal.limit)


def _sparsity_goal(job: Job, goal: Goal, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The share of the weights that is left, of all there were, zeros too; a fraction of a weight is not held against
    it. Told alone where patterns or ratios of single layers say how much goes."""
    now = after[WEIGHTS] / before["weights"]
    now = goal.limit if 0 < now - goal.limit < 1 / before["weights"] else now
    sparse = job.settings.sparse
    return _goal("weights", "x", now, now, now, goal.limit if sparse is None or sparse.exact else None)


def _goal(name: str, unit: str, value: float, low: float, high: float, limit: float | None) -> dict[str, Any]:
    """Without a limit it is told and not judged: met is None."""
    bounds = {"value": value, "low": low, "high": high, "limit": limit}
    return {"name": name, "unit": unit, **bounds, "met": None if limit is None else high <= limit}


def _goal_text(goal: dict[str, Any]) -> str:
    """`latency x0.481 [0.476, 0.487] <= x0.500`; a count has no interval, what nobody limited no limit."""
    before, digits, after = FORMATS[goal["unit"]]
    value, low, high = (f"{goal[key]:{digits}}" for key in ("value", "low", "high"))
    interval = "" if goal["low"] == goal["high"] else f" [{low}, {high}]"
    text = f"{goal['name']} {before}{value}{after}{interval}"
    if goal["limit"] is None:
        return text
    return f"{text} {'<=' if goal['met'] else 'not within'} {before}{goal['limit']:{digits}}{after}"


def _sparser(original: dict[str, Any], one: dict[str, Any]) -> str:
    """What an earlier round lost, at which sparsity."""
    lost = original["val_accuracy"] - one["val_accuracy"]
    gone = 1 - one[WEIGHTS] / original["weights"]
    return f"--sparsity {gone:.4g} cost {lost:.2f} points on validation: candidates/{one['name']}"


def _nearest(job: Job, candidates: list[dict[str, Any]], goals: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The nearest goals that can be met: this size at a larger drop, another size at this drop; what else was found."""
    texts = []
    drop, key, original = goals[-1], job.size_key, candidates[0]
    if drop["met"] is False:
        texts.append(f"this size needs --max-drop {math.ceil(100 * drop['high']) / 100:.2f}")
    if key == WEIGHTS:
        others = (one for one in candidates[1:] if one["frontier"] and not one["shipped"])
        return [{"text": text} for text in [*texts, *(_sparser(original, one) for one in others)]]
    for goal in goals[:-1]:
        if goal["met"]:
            continue
        enough = goal["high"] * (1.01 if goal["name"] == "latency" else 1.0)
        if goal["unit"] == "x" and enough > 1:
            texts.append(f"no {goal['name']} below the original's was reached")
        else:
            texts.append(f"--target {typed(goal['name'], enough, goal['unit'] != 'x')} is what this result meets")
    metric = key.removesuffix("_ratio")
    for one in candidates[1:]:
        if one["frontier"] and not one["shipped"]:
            lost = original["val_accuracy"] - one["val_accuracy"]
            goal_typed = typed(metric, one[key] / original[key], absolute=False)
            texts.append(f"--target {goal_typed} cost {lost:.2f} points on validation: candidates/{one['name']}")
    return [{"text": text} for text in texts]
