"""Of a network with weights: how many of them are not zero, and what its file really takes beside a dense one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.export import split_source
from aerogel.export.saved import WEIGHTS

SPARSE = 0.9  # parameters of which more than a tenth is zero are called so


def stored(model: str, weights: str | None, net: nn.Module) -> dict[str, Any]:
    """nonzero_params, file_bytes and dense_bytes (parameters and buffers as they are in memory); None without weights.

    model, weights: as the user typed them.
    """
    file = weights_file(model, weights)
    if file is None:
        return {"nonzero_params": None, "file_bytes": None, "dense_bytes": None}
    return {
        "nonzero_params": sum(int(p.count_nonzero()) for p in net.parameters()),
        "file_bytes": os.stat(file).st_size,
        "dense_bytes": sum(t.numel() * t.dtype.itemsize for t in [*net.parameters(), *net.buffers()]),
    }


def weights_file(model: str, weights: str | None) -> Path | None:
    """The file that the weights were read from: of a saved folder, of a run's result, or as given."""
    path = Path(split_source(weights)[1] if weights is not None else model)
    held = (path, path / WEIGHTS, path / "model" / WEIGHTS)
    return next((file for file in held if file.is_file()), None) if weights is not None or path.is_dir() else None


def stored_lines(report: Mapping[str, Any]) -> list[str]:
    """What `stored` found, as text; and what zeros are worth to the runtime whose time stands beside them."""
    if report.get("nonzero_params") is None:
        return []
    share = report["nonzero_params"] / max(1, report["params"])
    lines = [
        f"not zero: {report['nonzero_params']:,} of {report['params']:,} params ({100 * share:.2f} %)   "
        f"file {report['file_bytes']:,} bytes, dense {report['dense_bytes']:,}"
    ]
    if report["latency"] and share < SPARSE:
        lines.append(
            "expect no speed-up from zeros: ONNX Runtime multiplies by them as by any other number; to be faster cut "
            "channels, aerogel prune --target latency=0.5"
        )
    return lines
