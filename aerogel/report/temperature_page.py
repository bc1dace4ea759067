"""What the temperature does to a teacher's answers (aerogel.distill.temperature): JSON, a table, a page with a slider.

The page needs no network and no library: its curves are drawn here, as SVG, and a few lines of script soften the shown
samples' logits again when the slider moves. It is as strict as the other pages (page.py).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from aerogel.distill.temperature import moved, recommend, telling
from aerogel.errors import AerogelError
from aerogel.report.page import environment

SCHEMA, VERSION = "aerogel temperature", 1
BARS = 12  # classes drawn of one sample
WIDTH, HEIGHT, LEFT, BELOW = 360, 180, 34, 20  # of a plot, in its own units
COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], float], str], ...] = (
    ("T", lambda row: row["temperature"], "g"),
    ("entropy", lambda row: row["entropy"], ".2f"),
    ("classes", lambda row: row["classes"], ".1f"),
    ("p right", lambda row: row["right"], ".3f"),
    ("p wrong", lambda row: row["wrong"], ".3f"),
    ("p second", lambda row: row["second"], ".3f"),
    ("ranking", lambda row: row["same_ranking"], ".0%"),
    ("g wrong", lambda row: row["start"]["wrong_share"], ".3f"),
    ("g below", lambda row: row["start"]["negative_share"], ".3f"),
    ("limit", lambda row: row["start"]["aligned"], ".3f"),
    ("soft/hard", lambda row: row["start"]["balance"], ".2f"),
)
STUDENT: tuple[tuple[str, Callable[[Mapping[str, Any]], float], str], ...] = (
    ("st. g wrong", lambda row: row["student"]["wrong_share"], ".3f"),
    ("st. limit", lambda row: row["student"]["aligned"], ".3f"),
    ("st. soft/hard", lambda row: row["student"]["balance"], ".2f"),
)
MEANS = {
    "entropy": "of the softened answer, in nats",
    "classes": "exp(entropy): so many share the probability",
    "p right, p wrong, p second": "probability of the label, of all other classes, of the likeliest of those",
    "ranking": "samples whose classes are in the order of the logits",
    "g wrong": "share of the gradient, T (q - p), on the wrong classes; 1/2: all pushed alike, as by a label",
    "g below": "its share on classes whose logit is below the sample's mean: what a low T leaves out",
    "limit": "cosine of the gradient with (z - v) / N, to which it tends as T grows",
    "soft/hard": "length of the gradient of T^2 KL over that of the cross-entropy, at equal weights",
    "st.": "the same for the student as it is; the others are for one that knows nothing yet",
}


def temperature_report(
    teacher: str, student: str | None, data: str, classes: Sequence[str], images: Callable[[Tensor], Tensor],
    labels: Tensor, teacher_logits: Tensor, student_logits: Tensor | None, temperatures: Sequence[float],
    samples: int = 6, split: str = "val",
) -> dict[str, Any]:  # fmt: skip
    """Everything that the table and the page show, JSON-able.

    images: those at places (k,), as uint8 (k, C, H, W). labels: (n,). logits: (n, N). samples: how many are shown.
    Raises AerogelError as `moved` and `recommend` do.
    """
    rows = moved(teacher_logits, labels, temperatures, student_logits)
    places = telling(teacher_logits, labels, samples)
    picked = [
        {
            "image": i,
            "label": int(labels[i]),
            "picture": picture(pixels),
            "teacher": _rounded(teacher_logits[i]),
            "student": None if student_logits is None else _rounded(student_logits[i]),
        }
        for i, pixels in zip(places.tolist(), images(places), strict=True)
    ]
    return {
        "schema": SCHEMA, "version": VERSION, "teacher": teacher, "student": student, "data": data, "split": split,
        "images": len(labels), "classes": list(classes), "rows": [asdict(row) for row in rows],
        "recommended": asdict(recommend(rows, len(classes))), "samples": picked,
    }  # fmt: skip


def picture(image: Tensor) -> str:
    """uint8 (C, H, W) as the data of a PNG, in base64; of other than three channels the first."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def as_text(report: Mapping[str, Any]) -> str:
    """The table, what its columns mean, and the range to try with its reasons."""
    columns = COLUMNS + (STUDENT if report["student"] else ())
    table = [[name for name, _, _ in columns]]
    table += [[format(read(row), form) for _, read, form in columns] for row in report["rows"]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    found = report["recommended"]
    meant = [f"{name}: {what}" for name, what in MEANS.items() if report["student"] or name != "st."]
    return "\n".join([
        f"{report['teacher']} on {report['images']:,} images of {report['data']} ({report['split']})",
        *lines, "", *meant, "",
        f"try T {found['low']:g} to {found['high']:g}; for a small student begin at {found['small']:g}",
        *(f"- {reason}" for reason in found["reasons"]),
    ])  # fmt: skip


def render(report: Mapping[str, Any]) -> str:
    """One self-contained page. Raises AerogelError for a report of another schema or version."""
    known = (report.get("schema"), report.get("version"))
    if known != (SCHEMA, VERSION):
        raise AerogelError(
            f"temperature page: the report must be {SCHEMA} version {VERSION}, got {known[0]} version {known[1]}; "
            "make it with this aerogel"
        )
    columns = COLUMNS + (STUDENT if report["student"] else ())
    heats = [row["temperature"] for row in report["rows"]]
    data = {
        "heats": heats, "box": [WIDTH, HEIGHT, LEFT, BELOW], "bars": BARS, "classes": report["classes"],
        "samples": [{key: s[key] for key in ("label", "teacher", "student")} for s in report["samples"]],
        "ranked": [row["ranked"] for row in report["rows"]],
    }  # fmt: skip
    return (
        environment()
        .get_template("temperature.html")
        .render(
            report=report,
            table=[[format(read(row), form) for _, read, form in columns] for row in report["rows"]],
            columns=[name for name, _, _ in columns],
            means={name: what for name, what in MEANS.items() if report["student"] or name != "st."},
            plots=plots(report),
            data=data,
        )
    )


def plots(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title, lines with their names, and the SVG of each."""
    rows, found = report["rows"], report["recommended"]
    start = [row["start"] for row in rows]
    of_student = [row["student"] for row in rows] if report["student"] else []
    wanted: list[tuple[str, dict[str, list[float]], float]] = [
        ("Probability", {key: [row[key] for row in rows] for key in ("right", "wrong", "second")}, 1.0),
        ("Classes that share it", {"exp(entropy)": [row["classes"] for row in rows]}, float(len(report["classes"]))),
        (
            "Where the first gradient points",
            {
                "on wrong classes": [one["wrong_share"] for one in start],
                "below the mean logit": [one["negative_share"] for one in start],
                "cosine with the limit": [one["aligned"] for one in start],
            },
            1.0,
        ),
        (
            "Soft beside hard, at equal weights",
            {"at the start": [one["balance"] for one in start]}
            | ({"for the student now": [one["balance"] for one in of_student]} if of_student else {}),
            max(one["balance"] for one in [*start, *of_student]),
        ),
    ]
    heats = [row["temperature"] for row in rows]
    return [
        {"title": title, "names": list(lines), "svg": Markup(drawn(heats, lines, top, (found["low"], found["high"])))}
        for title, lines, top in wanted
    ]


def drawn(heats: Sequence[float], lines: Mapping[str, Sequence[float]], top: float, band: tuple[float, float]) -> str:
    """Lines over log T, from 0 to `top`, the recommended range shaded, a cursor for the script. Numbers alone, no text
    of the user's."""
    top = top if top > 0 else 1.0
    across = [place(heat, heats) for heat in heats]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    low, high = place(band[0], heats), place(band[1], heats)
    inner = HEIGHT - BELOW
    parts.append(f'<rect class="band" x="{low:.1f}" y="6" width="{max(high - low, 2):.1f}" height="{inner - 6}"/>')
    for share in (0.0, 0.5, 1.0):
        y = inner - share * (inner - 6)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{share * top:.3g}</text>')
    for heat in (heat for heat in (1, 2, 4, 8, 16, 32, 64) if heats[0] <= heat <= heats[-1]):
        parts.append(f'<text x="{place(heat, heats):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{heat}</text>')
    for number, values in enumerate(lines.values()):
        points = " ".join(
            f"{x:.1f},{inner - min(value / top, 1.0) * (inner - 6):.1f}"
            for x, value in zip(across, values, strict=True)
        )
        parts.append(f'<polyline class="line{number}" points="{points}"/>')
    parts.append(f'<line class="cursor" x1="{LEFT}" x2="{LEFT}" y1="6" y2="{inner}"/></svg>')
    return "".join(parts)


def place(heat: float, heats: Sequence[float]) -> float:
    """Where a T lies across a plot."""
    if heats[-1] <= heats[0]:
        return LEFT
    share = math.log(heat / heats[0]) / math.log(heats[-1] / heats[0])
    return LEFT + share * (WIDTH - 6 - LEFT)


def _rounded(logits: Tensor) -> list[float]:
    return [round(value, 4) for value in logits.double().tolist()]
