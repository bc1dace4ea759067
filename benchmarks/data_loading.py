"""What an epoch's batches cost where images are decoded as they are used, and what packing and workers change.

    OMP_NUM_THREADS=1 python benchmarks/data_loading.py [--images 600] [--rounds 3]

Photographs are imitated: JPEG files of 500 x 375 pixels, quality 90, of noise whose spectrum falls as 1/f, as natural
images' does. They are read at 3 x 224 x 224 in batches of 64, shuffled and augmented. Ways to read are timed in turn,
round by round, each a whole epoch; the median is told. Beside the time on the clock stand the processor's milliseconds
an image, which other work on the machine changes little. Files lie in the system's cache: this is about processors,
not disks. Results go to benchmarks/results/data_loading.json.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from aerogel.cost.latency import cpu_name
from aerogel.data import Dataset, batches, load
from aerogel.data.pack import load_packed, write_packed
from aerogel.files import write_json

RESULTS = Path(__file__).parent / "results" / "data_loading.json"
WIDTH, HEIGHT, SIZE = 500, 375, (3, 224, 224)


def photograph(rng: np.random.Generator) -> Image.Image:
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) / frequency
        plane = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        planes.append(128 + 48 * (plane - plane.mean()) / plane.std())
    luma, blue, red = planes
    pixels = np.stack((luma, 128 + (blue - 128) / 3, 128 + (red - 128) / 3), axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "YCbCr")


def make(root: Path, images: int) -> float:
    """Bytes of a file, on average."""
    rng = np.random.default_rng(0)
    for number in range(images):
        folder = root / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(rng).save(folder / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in root.rglob("*.jpg")) / images


def timed(task: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds on the clock, and of all processors that worked for it."""
    began, spent = time.perf_counter(), _processor_seconds()
    made = task()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _processor_seconds() - spent}, made


def _processor_seconds() -> float:
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def told(took: dict[str, float], images: int) -> dict[str, float]:
    return {"images_per_s": images / took["seconds"], "cpu_ms_an_image": 1e3 * took["cpu_seconds"] / images}


def epoch(data: Dataset, workers: int) -> dict[str, float]:
    options: dict[str, Any] = {"shuffle": True, "augment": "crop_flip", "workers": workers}
    took, count = timed(lambda: sum(len(batch.labels) for batch in batches(data, "train", 64, **options)))
    return told(took, count)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, patch.dict(os.environ, XDG_CACHE_HOME=f"{place}/cache"):
        root = Path(place)
        file_bytes = make(root / "photos", asked.images)
        spec = f"folder:{root}/photos"
        first, lazy = timed(lambda: load(spec, size=SIZE, lazy=True))
        again, _ = timed(lambda: load(spec, size=SIZE, lazy=True))
        write, _ = timed(lambda: write_packed(lazy, root / "packed"))
        mapped, packed = timed(lambda: load_packed(root / "packed"))
        ways = [("files", lazy, 0), ("files", lazy, 1), ("files", lazy, 2), ("packed", packed, 0)]
        rounds: dict[str, list[dict[str, float]]] = {f"{name}, {workers} workers": [] for name, _, workers in ways}
        for _ in range(asked.rounds):
            for name, data, workers in ways:
                rounds[f"{name}, {workers} workers"].append(epoch(data, workers))
    images = asked.images
    found = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/data_loading.py --images {images} --rounds {asked.rounds}",
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "load": os.getloadavg()[0],
        "images": images, "file_bytes": file_bytes, "packed_bytes_an_image": math.prod(SIZE),
        "examine": told(first, images), "examined_before": told(again, images), "pack": told(write, images),
        "load_packed": told(mapped, images),
        "epoch": {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                  for name, rows in rounds.items()},
        "rounds": rounds,
    }  # fmt: skip
    write_json(RESULTS, found)
    for key, value in found.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
