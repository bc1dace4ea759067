"""aerogel makes neural networks light: design, measure, distil, prune and ship, with proof."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported, and else keeps a log
__all__ = [
    "AerogelError", "capture", "cost", "data", "distill", "export", "load", "nets", "prune", "recover", "save",
    "sparse", "train",
]  # fmt: skip
_HOME = {
    "AerogelError": "aerogel.errors", "capture": "aerogel.graph", "load": "aerogel.export",
    "recover": "aerogel.compress.again", "save": "aerogel.export",
}  # fmt: skip

if TYPE_CHECKING:
    from aerogel import cost, data, distill, export, nets, prune, sparse, train
    from aerogel.errors import AerogelError
    from aerogel.export import load, save
    from aerogel.graph import capture


def __getattr__(name: str) -> Any:
    """Imports an area on first use, so that `import aerogel` and `aerogel --help` never wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'aerogel' has no attribute {name!r}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    return importlib.import_module(f"aerogel.{name}")


def __dir__() -> list[str]:
    """For completion: the names above are there before they are imported."""
    return sorted({*globals(), *__all__})
