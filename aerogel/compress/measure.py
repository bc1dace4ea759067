"""What a saved candidate is worth: its sizes, its accuracy, its latency beside the original's, all of the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aerogel import sparse
from aerogel.compress.goal import WEIGHTS
from aerogel.compress.job import Job
from aerogel.cost import count
from aerogel.cost.latency import Ratio, compare
from aerogel.data import batches
from aerogel.export.verify import run_onnx
from aerogel.graph import capture, tensor_names
from aerogel.prune import couple
from aerogel.prune.coupling import Coupling
from aerogel.prune.cut import freeze, protected, untrained
from aerogel.prune.masks import Masks
from aerogel.prune.price import file_bytes
from aerogel.prune.slimming import scale_of, scales

BRIEF = 1.0  # seconds of a comparison that only steers; the verdict's own are in the settings


def coupling_of(job: Job, model: nn.Module) -> Coupling:
    """What can be cut, as the settings have it: not what is protected, untrained, inexact, or has no scale to slim."""
    settings = job.settings
    coupling = couple(capture(model, job.example), whole_heads=settings.heads == "whole")
    coupling = protected(coupling, () if settings.sparse else settings.protect)
    coupling = freeze(coupling, untrained(model, coupling))
    if not settings.allow_inexact:
        coupling = freeze(coupling, {group.name: group.inexact for group in coupling.groups if group.inexact})
    return _scaled(coupling, model) if settings.slimming else coupling


def _scaled(coupling: Coupling, model: nn.Module) -> Coupling:
    """Without the groups that pass no batch norm."""
    gammas = {name: gamma.detach().abs().cpu() for name, gamma in scales(model).items()}
    bare = [group.name for group in coupling.groups if scale_of(group, gammas) is None]
    return freeze(coupling, dict.fromkeys(bare, "passes no batch norm"))


def sizes_of(coupling: Coupling) -> dict[str, int]:
    """Every metric that is counted, by name; weight_bytes are what a file of the weights holds, without its head."""
    cost = count(coupling.graph)
    names = ("params", "macs", "flops", "access_bytes", "peak_bytes")
    channels = sum(len(group) for group in coupling.groups)
    found = {name: getattr(cost, name) for name in names}
    return found | {"channels": channels, "weight_bytes": file_bytes(coupling.graph)}


def sizes(job: Job, model: nn.Module) -> dict[str, int]:
    """`sizes_of` a network: it is captured for that. Where single weights are pruned, also how many there are."""
    return sizes_of(coupling_of(job, model)) | weights_of(job, model)


def weights_of(job: Job, model: nn.Module) -> dict[str, int]:
    """How many weights --sparsity speaks of, how many are not zero, and the bytes of a sparse file; nothing where
    channels are cut."""
    if job.settings.sparse is None:
        return {}
    masks, names = Masks.of(model, protect=job.settings.protect), tensor_names(model)
    tensors = {names[id(t)]: t for t in model.state_dict(keep_vars=True).values()}  # tied ones once, as they are saved
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "it.safetensors"
        sparse.write(tensors, file)
        return {"weights": masks.weights, WEIGHTS: masks.survivors, "sparse_bytes": file.stat().st_size}


def compare_files(job: Job, before: Path, after: Path, seconds: float) -> Ratio:
    """Latency of `after` over `before`, interleaved, one image at a time, for at most the settings' seconds."""
    seconds = min(seconds, job.settings.seconds)
    return compare(before, after, threads=job.settings.threads, seconds=seconds, seed=job.settings.seed)


def correct_on(job: Job, file: Path, split: str) -> np.ndarray:
    """Which samples of a split the exported file gets right: bool (n,)."""
    answers = []
    for batch in batches(job.data, split, 256):
        logits = run_onnx(file, batch.inputs.numpy(), threads=torch.get_num_threads())
        answers.append(logits.argmax(1) == batch.labels.numpy())
    return np.concatenate(answers)


def percent(correct: np.ndarray) -> float:
    return 100.0 * float(correct.mean())
