"""One job on scikit-learn's digits that the tests of runs share, and what they look at in a run's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from aerogel import data

JOB = ("lenet_300_100", "--data", "digits", "--target", "macs=0.3", "--max-drop", "20", "--epochs", "40")
# A quick run; with the one criterion that draws random numbers, which a resumed run must draw again.
BRIEF = 'steps = 1\nseconds = 0.1\ncriterion = "random"\n'


class Finished(NamedTuple):
    """A run that is done: its folder, what it printed, its report."""

    path: Path
    out: str
    report: dict[str, Any]


def digest(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file below."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def right(folder: Path, split: str) -> np.ndarray:
    """Which digits of a split a saved folder's model.onnx gets right, by ONNX Runtime and numpy alone."""
    spec = json.loads((folder / "config.json").read_text())["input"]
    part = getattr(data.load("digits"), split)
    mean, std = (np.reshape(spec[key], (1, -1, 1, 1)) for key in ("mean", "std"))
    inputs = ((part.images.numpy() / 255 - mean) / std).astype(np.float32)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": inputs})
    return logits.argmax(1) == part.labels.numpy()
