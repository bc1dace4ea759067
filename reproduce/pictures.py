"""Plain line charts as SVG text, for docs/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 60, 50, 20, 150
COLOURS = ("#1b6ca8", "#d1495b", "#3d8b5f", "#8d6cab", "#c98a1b", "#555555")

Point = tuple[float, float, float]  # x, mean, half of the bar


def lines(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> str:
    """One line a series with error bars, both axes logarithmic, a tick at every x."""
    points = [point for one in series.values() for point in one]
    ticks = sorted({x for x, _, _ in points})
    low, high = min(y - bar for _, y, bar in points), max(y + bar for _, y, bar in points)

    def across(x: float) -> float:
        share = math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        share = math.log(y / low) / math.log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    marks = [low * (high / low) ** (step / 4) for step in range(5)]
    parts = [_text(across(x), HEIGHT - BOTTOM + 18, f"{x:g}") for x in ticks]
    for mark in marks:
        parts.append(_line(LEFT, down(mark), WIDTH - RIGHT, down(mark), "#dddddd"))
        parts.append(_text(LEFT - 8, down(mark) + 4, f"{mark:.0f}" if mark >= 100 else f"{mark:.2g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_title))
    parts.append(f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_title)}</g>')
    for one, colour in zip(series.values(), COLOURS, strict=False):
        drawn = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in one)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_line(across(x), down(y - bar), across(x), down(y + bar), colour) for x, y, bar in one]
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y, _ in one]
    ends = sorted(
        (down(one[-1][1]) + 4, name, colour) for (name, one), colour in zip(series.items(), COLOURS, strict=False)
    )
    last = 0.0
    for y, name, colour in ends:
        last = max(y, last + 15)  # none over another
        parts.append(_text(WIDTH - RIGHT + 10, last, name, "start", colour))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
