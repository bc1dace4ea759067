"""`aerogel export --to sparse` and `--to dense`: the same network in another kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from aerogel import sparse
from aerogel.compress.job import Job, open_job
from aerogel.compress.settings import Settings
from aerogel.console import Console
from aerogel.errors import AerogelError, nearest
from aerogel.export import open_model, read_config, save, saved_folder
from aerogel.export.saved import WEIGHTS
from aerogel.files import refuse_existing
from aerogel.stats import accuracy_interval
from aerogel.train import accuracy, predict

KINDS = ("onnx", "sparse", "dense")
MAX_DROP = 0.1  # points of validation accuracy that shared values may cost, unless the user says otherwise

Size = tuple[int, int, int] | None


def store(
    model: str, weights: str | None, shape: Size, trust: bool, out: Path, console: Console, *, to: str,
    bits: int | None = None, data: str | None = None, max_drop: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the folder `out`, its weights coded (`to` "sparse") or plain ("dense"); either loads as the same network.

    Without bits and data no bit of any weight changes. bits: the weights are shared first (`aerogel.sparse.share`).
    data: with the fewest bits whose accuracy on validation images is at most `max_drop` points lower; or, with bits,
    what they cost. Raises AerogelError for what cannot be opened, judged or saved.
    """
    refuse_existing(out, "export")
    job = None
    if data is not None:
        job = open_job(Settings(model=model, data=data, weights=weights, input=shape, trust=trust), console)
        if not job.opened.trained:
            raise AerogelError(f"export: {model} has no trained weights to judge by --data; give --weights too")
    opened = job.opened if job else open_model(model, input_shape=shape, weights=weights, trust=trust)
    net = opened.model
    found: dict[str, Any] = _counted(net)
    known = _known(model if weights is None else weights)
    if bits is not None or job is not None:
        shared = _share(net, job, bits, MAX_DROP if max_drop is None else max_drop)
        known["metrics"] = {"shared": shared} | ({"accuracy": shared["after"]} if "after" in shared else {})
        found["shared"] = shared
    save(net, out, factory=opened.factory, input=opened.input, sparse=to == "sparse", **known)
    found = {"saved": str(out), "to": to, **found, "file_bytes": (out / WEIGHTS).stat().st_size}
    return found | {"text": text(found)}


def text(found: Mapping[str, Any]) -> str:
    """One line, and one more of what shared values cost."""
    share = 100 * found["nonzero_params"] / max(1, found["params"])
    line = f"{found['saved']}  {found['file_bytes']:,} bytes, dense {found['dense_bytes']:,} "
    line += f"(x{found['dense_bytes'] / found['file_bytes']:.1f}); "
    line += f"{found['nonzero_params']:,} of {found['params']:,} parameters are not zero ({share:.2f} %)"
    shared = found.get("shared")
    if shared is None:
        return line
    line += f"\nweights share {2 ** shared['bits']} values a tensor ({shared['bits']} bits)"
    if "after" in shared:
        before, after = (f"{held['value']:.2f} % [{held['low']:.2f}, {held['high']:.2f}]" for held in
                         (shared["before"], shared["after"]))  # fmt: skip
        line += f"; top-1 on test images {before} before, {after} after"
    return line


def check_kind(to: str, options: Mapping[str, Any]) -> None:
    """Raises AerogelError for a kind of file that is not known, or options that belong to another."""
    if to not in KINDS:
        raise AerogelError(f"export: --to must be one of {', '.join(KINDS)}, got {to!r}; {nearest(to, KINDS)}")
    given = [name for name, value in options.items() if value is not None]
    if to != "sparse" and given:
        raise AerogelError(f"export: {' and '.join(given)} must go with --to sparse, got --to {to}; leave it out")
    if "--max-drop" in given and ("--data" not in given or "--bits" in given or not options["--max-drop"] >= 0):
        raise AerogelError(
            f"export: --max-drop must be >= 0 and goes with --data and without --bits, got {options['--max-drop']}; it "
            "says how many points of validation accuracy the fewest bits may cost"
        )


def _share(net: nn.Module, job: Job | None, bits: int | None, max_drop: float) -> dict[str, Any]:
    """Shares the weights of `net`, in place. With data: the score of each number of bits tried, and the test's."""
    if job is None:
        assert bits is not None
        sparse.share(net, bits)
        return {"bits": bits}
    before = _on_test(net, job)
    scores: dict[int, float] = {}
    if bits is None:
        bits, scores, _ = sparse.fewest_bits(net, lambda one: accuracy(one, job.data, "val"), max_drop)
    else:
        sparse.share(net, bits)
    told: dict[str, Any] = {"bits": bits, "data": job.settings.data, "before": before, "after": _on_test(net, job)}
    if scores:
        told["validation"] = {str(tried): score for tried, score in scores.items()}
        told["max_drop"] = max_drop
    return told


def _on_test(net: nn.Module, job: Job) -> dict[str, float]:
    correct = predict(net, job.data, "test").argmax(1) == job.data.test.labels
    return asdict(accuracy_interval(correct.numpy()))


def _counted(net: nn.Module) -> dict[str, int]:
    parameters, tensors = list(net.parameters()), [*net.parameters(), *net.buffers()]
    return {
        "params": sum(p.numel() for p in parameters),
        "nonzero_params": sum(int(p.count_nonzero()) for p in parameters),
        "dense_bytes": sum(t.numel() * t.dtype.itemsize for t in tensors),
    }


def _known(source: str) -> dict[str, Any]:
    """What the saved folder that the weights are from knows of them beside the weights."""
    folder = saved_folder(source)
    if folder is None:
        return {}
    config = read_config(folder)
    return {"classes": tuple(config.classes), "metrics": config.metrics}
