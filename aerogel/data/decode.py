"""One image file as pixels, and why another cannot be read.

Decoding: EXIF orientation applied, transparency laid over white, 16-bit grey scaled by 1/257, first frame of an
animation, RGB (or luma, when C is 1), shorter side resized to the target and the centre cropped.

Files are not trusted: only the formats below are tried (Pillow would run Ghostscript on an EPS named .jpg), and an
image of more pixels than Pillow's limit is refused before it is decoded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from aerogel.errors import DataError
from aerogel.imports import one_line

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")


def read_image(file: str | Path | BinaryIO, size: tuple[int, int, int]) -> torch.Tensor:
    """One image file as a set's images are read. Shape: uint8 (C, H, W).

    Raises whatever Pillow raises on a damaged file, and ValueError for a pixel type without a defined white.
    """
    from PIL import Image, ImageOps

    channels, height, width = size
    with Image.open(file, formats=FORMATS) as image:
        twice = 2 * max(height, width)
        image.draft(None, (twice, twice))  # a JPEG is decoded at less than full size: far faster
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError(f"pixel type {upright.mode} has no defined white; save it with 8 or 16 bits")
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    flat = upright.convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).view(height, width, channels).permute(2, 0, 1)


@contextmanager
def strictly() -> Iterator[None]:
    """Within, an image over Pillow's limit of pixels is an error, and damaged metadata is not worth a warning."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}"
    return f"{type(error).__name__}: {one_line(error)}"


def shown(path: Path | str) -> str:
    """A file name that prints anywhere: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
