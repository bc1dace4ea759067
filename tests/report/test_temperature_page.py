"""The temperature's page: it stands alone, trusts no name, and its numbers are those of the report."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aerogel.distill.temperature import softened
from aerogel.errors import AerogelError
from aerogel.report.page import script_hash
from aerogel.report.temperature_page import as_text, drawn, picture, place, render, temperature_report

EVIL = "</script><script>alert(1)</script><b>'\""
HEATS = (1.0, 2.0, 4.0, 20.0)
V = 4 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def made(student: bool = False, name: str = "net") -> dict[str, Any]:
    return temperature_report(
        name, name if student else None, name, [f"{name}{i}" for i in range(5)], lambda places: IMAGES[places],
        V.argmax(-1), V, V / 2 if student else None, HEATS,
    )  # fmt: skip


@pytest.mark.parametrize("student", [False, True])
def test_it_stands_alone(student: bool) -> None:
    report = made(student, EVIL)
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
    page = render(report)
    assert "<b>" not in page
    assert "alert(1)</script>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page.replace("http-equiv", "")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1  # and one of data, which is no code
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert script_hash(scripts[0]) in policy[1].replace("&#39;", "'").replace("&#43;", "+")
    assert ("Marks: the student" in page) == student


def test_its_numbers() -> None:
    report = made(student=True)
    page = render(report)
    data = json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert data["heats"] == list(HEATS)
    for sample, shown in zip(report["samples"], data["samples"], strict=True):
        i = sample["image"]
        assert shown["teacher"] == pytest.approx(V[i].tolist(), abs=1e-4)
        assert shown["student"] == pytest.approx((V[i] / 2).tolist(), abs=1e-4)
        assert shown["label"] == int(V[i].argmax())
        pixels = Image.open(io.BytesIO(base64.b64decode(sample["picture"])))
        assert np.asarray(pixels).tolist() == IMAGES[i, 0].tolist()
    for ranked, heat in zip(data["ranked"], HEATS, strict=True):
        expected = softened(V.double(), heat).sort(-1, descending=True).values.mean(0)
        assert ranked == pytest.approx(expected.tolist())
    text = as_text(report)
    for row in report["rows"]:
        assert f"{row['entropy']:.2f}" in text
        assert f"{row['entropy']:.2f}</td>" in page
    assert "st. soft/hard" in text
    assert "st. soft/hard" not in as_text(made())
    assert all(reason in text for reason in report["recommended"]["reasons"])


def test_colours() -> None:
    image = torch.randint(0, 256, (3, 4, 6), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    pixels = Image.open(io.BytesIO(base64.b64decode(picture(image))))
    assert (pixels.size, pixels.mode) == ((6, 4), "RGB")
    assert pixels.getpixel((2, 1)) == tuple(image[:, 1, 2].tolist())


def test_plots() -> None:
    assert place(1.0, (1.0, 4.0)) < place(2.0, (1.0, 4.0)) < place(4.0, (1.0, 4.0))
    assert place(2.0, (1.0, 4.0)) == pytest.approx((place(1.0, (1.0, 4.0)) + place(4.0, (1.0, 4.0))) / 2)
    assert place(3.0, (3.0,)) == place(1.0, (1.0, 4.0))
    svg = drawn((1.0, 4.0), {"a": [0.0, 1.0], "b": [0.5, 9.0]}, 1.0, (1.0, 1.0))
    assert svg.count("<polyline") == 2
    assert 'points="34.0,160.0 354.0,6.0"' in svg
    assert 'points="34.0,83.0 354.0,6.0"' in svg  # what is above the plot is drawn at its edge


def test_another_version_is_refused() -> None:
    with pytest.raises(AerogelError, match="must be aerogel temperature version 1, got aerogel temperature version 2"):
        render(made() | {"version": 2})
