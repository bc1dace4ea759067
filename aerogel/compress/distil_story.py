"""The report's dictionary of a distillation, from what its stages left in the run."""

from __future__ import annotations

from shlex import quote
from typing import Any

from aerogel.compress.job import Job
from aerogel.compress.run import Run
from aerogel.compress.story import curve_of, curves_of, facts

SEEN = {
    "val_accuracy": "validation accuracy, %",
    "agreement": "agreement with the teacher on validation, %",
    "ece": "ECE on validation, %",
}
NAMES = {"distil": "student", "alone": "labels alone"}  # of curves, by stage


def tell(job: Job, run: Run) -> dict[str, Any]:
    """The report of a run whose student is shipped."""
    settings, path, found = job.settings, quote(str(run.path)), run["ship"]
    return facts(job, run) | {
        "title": f"{settings.short_model} taught by {settings.taught_by} on {job.data.name}",
        "method": settings.lesson.described,
        "verdict": {"pass": None if found["parity"]["ok"] else False, "text": _verdict(found), "goals": []},
        "distillation": {
            **{
                key: found[key]
                for key in ("networks", "gap", "gain", "latency", "confusion", "reliability")
                if key in found
            },
            "members": run["teacher"]["members"],
            "losses": dict(settings.lesson.losses),
        },
        "parity": found["parity"],
        "curves": _curves(job, run),
        "stages": _stages(run),
        "repeat": [f"aerogel distill --config {path}/config.toml", f"aerogel verify {path}"],
    }


def _verdict(found: dict[str, Any]) -> str:
    """`student 98.90 %, teacher 99.36 %; student behind its teacher by 0.46 pt [0.20, 0.72]; ...`."""
    accuracy = {network["name"]: network["accuracy"]["value"] for network in found["networks"]}
    parts = [
        f"student {accuracy['student']:.2f} %, teacher {accuracy['teacher']:.2f} %",
        f"student {_against(found['gap'], 'behind', 'ahead of')} its teacher",
    ]
    if "gain" in found:
        alone = f"labels alone ({accuracy['labels alone']:.2f} %)"
        parts.append(f"{_against(found['gain'], 'ahead of', 'behind')} {alone}")
    if not found["parity"]["ok"]:
        parts.append("the exported file gives other answers than the model")
    return "; ".join(parts)


def _against(points: dict[str, float], more: str, less: str) -> str:
    """`0.46 pt [0.20, 0.72] behind`; the other word, and the signs turned, for what is below 0."""
    value, low, high = points["value"], points["low"], points["high"]
    if value < 0:
        value, low, high, more = -value, -high, -low, less
    return f"{value:.2f} pt [{low:.2f}, {high:.2f}] {more}"


def _stages(run: Run) -> list[dict[str, Any]]:
    texts = {"check": run["check"]["text"], "teacher": f"top-1 {run['teacher']['accuracy']['value']:.2f} %"}
    for name in ("distil", "alone"):
        if name in run:
            texts[name] = f"validation {run[name]['val_accuracy']:.2f} % after {run[name]['epoch']:g} epochs"
            if name in run.speed:
                texts[name] += f"; {run.speed[name]['text']}"
    texts["ship"] = _verdict(run["ship"])
    return [{"name": name, "seconds": round(run["seconds"][name], 1), "text": text} for name, text in texts.items()]


def _curves(job: Job, run: Run) -> list[dict[str, Any]]:
    """A curve a network: losses without their weights, so that two trainings can be compared, and what validation said
    after each epoch. The teacher's is level."""
    weights = job.settings.lesson.losses
    points: dict[str, dict[int, dict[str, float]]] = {}
    for curve in curves_of(run):
        stage, _, watched = curve["name"].partition(", ")
        held = points.setdefault(NAMES[stage], {})
        for name, values in curve["series"].items():
            title = SEEN[name] if watched else f"{name} loss"
            weight = (not watched and stage == "distil" and weights.get(name)) or 1.0
            for step, value in zip(curve["x"], values, strict=True):
                if value is not None:
                    held.setdefault(step, {})[title] = value / weight
    found = [curve_of(name, dict(sorted(held.items()))) for name, held in points.items()]
    teacher, last = run["teacher"], max((x for curve in found for x in curve["x"]), default=0)
    level = {SEEN["val_accuracy"]: [teacher["val_accuracy"]] * 2, SEEN["ece"]: [teacher["val_ece"]] * 2}
    return [*found, {"name": "teacher", "x": [0, last], "series": level}]
