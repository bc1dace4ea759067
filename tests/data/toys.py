"""Small sets that the tests of this folder share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aerogel.data import Dataset, Split, assemble


def make_split(n: int, *, size: tuple[int, int, int] = (1, 6, 5), classes: int = 3, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % classes)


def make_dataset(n: int = 30, *, size: tuple[int, int, int] = (1, 6, 5)) -> Dataset:
    return assemble("toy", make_split(n, size=size), make_split(7, size=size, seed=1), "abc", val=6)


TOY = make_dataset()


def numbered(n: int) -> Dataset:
    """n images of one pixel, whose label is their number and whose pixel is that modulo 256, not normalised."""
    split = Split((torch.arange(n) % 256).to(torch.uint8).view(n, 1, 1, 1), torch.arange(n))
    return dataclasses.replace(
        TOY, train=split, val=split, test=split, classes=tuple(map(str, range(n))), mean=(0.0,), std=(1 / 255,)
    )


def noisy_folder(root: Path, each: int, suffixes: tuple[str, ...] = ("png",)) -> Path:
    """`each` noisy images of two classes, 10 x 12 pixels, with the suffixes in turn; one more cannot be read."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i:03}.{suffixes[i % len(suffixes)]}")
    (root / "train" / "cat" / "bad.jpg").write_text("<html>404</html>")
    return root
