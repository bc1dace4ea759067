"""One file in a hundred is bad: all of them are listed with the reason, no other is, and the run completes."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aerogel.data import Dataset, load
from aerogel.train import HardLabels, Recipe, accuracy, start
from aerogel.train import fit as train_fit

SIZE = (3, 16, 16)
SIDE = 32
Encode = Callable[[np.ndarray, np.random.Generator], bytes]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(label: int, rng: np.random.Generator) -> np.ndarray:
    """Dark noise with a bright upper (label 0) or lower half (1): orientation and range show in the label."""
    pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[label * SIDE // 2 : (label + 1) * SIDE // 2] += 180
    return pixels


def rotated(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    """Stored turned; its EXIF says how it is seen."""
    tag, turns = ((3, 2), (6, 1), (8, 3))[rng.integers(3)]
    exif = Image.Exif()
    exif[0x0112] = tag
    return encoded(Image.fromarray(np.rot90(pixels, turns).copy()), "JPEG", quality=95, exif=exif)


def sixteen_bit(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    return encoded(Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG")


def bomb(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    """A PNG whose header claims 3.6 10^9 pixels."""
    content = bytearray(encoded(Image.fromarray(pixels), "PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def truncated(kind: str) -> Encode:
    def cut(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
        content = encoded(Image.fromarray(pixels), kind)
        return content[: int(len(content) * rng.uniform(0.5, 0.9))]

    return cut


GOOD: dict[str, tuple[str, Encode]] = {
    "plain": ("png", lambda pixels, rng: encoded(Image.fromarray(pixels), "PNG")),
    "photo": ("jpg", lambda pixels, rng: encoded(Image.fromarray(pixels), "JPEG", quality=95)),
    "progressive": ("jpg", lambda pixels, rng: encoded(Image.fromarray(pixels), "JPEG", quality=95, progressive=True)),
    "cmyk": ("jpg", lambda pixels, rng: encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)),
    "sixteen_bit": ("png", sixteen_bit),
    "palette": ("gif", lambda pixels, rng: encoded(Image.fromarray(pixels).convert("P"), "GIF")),
    "rotated": ("jpg", rotated),
    "grey": ("png", lambda pixels, rng: encoded(Image.fromarray(pixels).convert("L"), "PNG")),
    "trailer": ("jpg", lambda pixels, rng: encoded(Image.fromarray(pixels), "JPEG", quality=95) + bytes(100)),
}
BAD: dict[str, tuple[str, Encode, str]] = {
    "cut_jpeg": ("jpg", truncated("JPEG"), "truncated"),
    "cut_png": ("png", truncated("PNG"), "truncated"),
    "empty": ("jpg", lambda pixels, rng: b"", "an empty file"),
    "html": ("jpg", lambda pixels, rng: b"<!DOCTYPE html><title>404</title>", "its content is none of JPEG"),
    "bomb": ("png", bomb, "more pixels than the limit of"),
}


def make(root: Path, count: int) -> dict[str, str]:
    """`count` files, every hundredth bad; {the bad one's name: what its reason must hold}."""
    rng = np.random.default_rng(0)
    wrong = {}
    for name in ("above", "below"):
        (root / "train" / name).mkdir(parents=True)
    for number in range(count):
        label = number % 2
        pixels = picture(label, rng)
        if number % 100 == 57:
            kind = list(BAD)[number // 100 % len(BAD)]
            suffix, encode, reason = BAD[kind]
        else:
            kind = list(GOOD)[number // 2 % len(GOOD)]
            suffix, encode = GOOD[kind]
        path = root / "train" / ("above", "below")[label] / f"{number:05}-{kind}.{suffix}"
        path.write_bytes(encode(pixels, rng))
        if number % 100 == 57:
            wrong[path.name] = reason
    return wrong


def check_listed(data: Dataset, wrong: dict[str, str], count: int) -> None:
    found = {Path(path).name: reason for path, reason in data.bad_files}
    assert found.keys() == wrong.keys()  # all, and no other
    for name, reason in wrong.items():
        assert reason in found[name].replace("Truncated", "truncated"), name
    assert len(data.train) + len(data.val) + len(data.test) == count - len(wrong)


def check_pixels(data: Dataset) -> None:
    """Whatever the file's kind, the bright half is where it was: none is turned, inverted or out of range."""
    for name in ("train", "val", "test"):
        part = getattr(data, name)
        pixels = part.rows(slice(None)).float().mean(1)
        above, below = pixels[:, :7].mean((1, 2)), pixels[:, 9:].mean((1, 2))
        bright, dark = torch.maximum(above, below), torch.minimum(above, below)
        assert torch.equal((below > above).long(), part.labels)
        assert 190 < bright.min() <= bright.max() < 230
        assert 15 < dark.min() <= dark.max() < 50


def check_run(root: Path, *, lazy: bool) -> Dataset:
    data = load(f"folder:{root}", size=SIZE, lazy=lazy)
    check_pixels(data)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    recipe = Recipe(epochs=1, batch_size=64, lr=0.05, augment="none")
    assert accuracy(train_fit(start(net, HardLabels(), data, recipe), data), data, "test") > 99
    return data


def test_a_thousand_files_ten_of_them_bad(tmp_path: Path, aerogel: Callable) -> None:
    wrong = make(tmp_path, 1000)
    assert len(wrong) == 10
    for lazy in (False, True):
        check_listed(check_run(tmp_path, lazy=lazy), wrong, 1000)
    outcome = aerogel("data", "check", f"folder:{tmp_path}", "--input", "3,16,16", "--json")
    assert outcome.code == 2
    assert {Path(path).name for path, _ in json.loads(outcome.out)["bad_files"]} == wrong.keys()


@pytest.mark.slow
def test_ten_thousand_files_a_hundred_of_them_bad(tmp_path: Path) -> None:
    wrong = make(tmp_path, 10_000)
    assert len(wrong) == 100
    held, lazy = (check_run(tmp_path, lazy=lazy) for lazy in (False, True))
    check_listed(held, wrong, 10_000)
    check_listed(lazy, wrong, 10_000)
    assert held.fingerprint() == lazy.fingerprint()
