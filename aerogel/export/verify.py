"""Does an exported file compute what its model computes? Asked of ONNX Runtime, on real samples.

ok = top-1 agrees on at least 99.9 % of the samples, and max |file - model| <= 1e-3 max(1, max |model|).
Files are opened here for timing too (cost/latency.py), so what is proved is what is timed: CPU only, every
graph optimisation, sequential, threads that do not spin, denormal numbers taken as zero.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.graph import evaluating
from aerogel.imports import one_line

MIN_AGREEMENT = 0.999
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """A file against its model. `top1_agreement` is a fraction; `tolerance` is the limit of `max_abs_diff`."""

    samples: int
    top1_agreement: float
    max_abs_diff: float
    tolerance: float
    ok: bool


def check_parity(model: nn.Module, path: Path, inputs: Tensor, *, batch_size: int = 256) -> Parity:
    """Compare `model` with the file on `inputs`, (n, ...); both must give logits, (n, classes, ...).

    The model runs in eval mode without gradients; its training flags are as before afterwards.
    Raises AerogelError when the file cannot run, or the two outputs differ in shape or are not finite.
    """
    found = run_onnx(path, inputs.detach().cpu().numpy(), batch_size=batch_size).astype(np.float32)
    expected = _run_model(model, inputs, batch_size)
    if found.shape != expected.shape or expected.ndim < 2:
        raise AerogelError(
            f"check_parity: {path} gives {found.shape}, the model gives {expected.shape}; "
            "both must be (samples, classes): export the file again from this model"
        )
    for source, values in (("the model", expected), (path, found)):
        if not np.isfinite(values).all():
            raise AerogelError(f"check_parity: {source} gives values that are not finite; check the weights")
    largest = float(np.abs(found - expected).max())
    agreement = float(np.mean(found.argmax(1) == expected.argmax(1)))
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    ok = agreement >= MIN_AGREEMENT and largest <= tolerance
    return Parity(len(found), agreement, largest, tolerance, ok)


def run_onnx(path: Path, inputs: np.ndarray, *, batch_size: int = 256, threads: int | None = None) -> np.ndarray:
    """The file's first output on `inputs`, (n, ...), float32 or as the file wants them: (n, ...).

    Of a file with a fixed batch the last batch is filled up with copies of the last sample.
    `threads`: by default all the cores this process may use.
    Raises AerogelError when the file or the inputs do not do, naming the reason.
    """
    if len(inputs) == 0 or batch_size < 1:
        raise AerogelError(
            f"run_onnx: needs at least one sample and batch_size >= 1, got {len(inputs)} and {batch_size}"
        )
    with flushing_denormals():
        session = open_session(path, threads=available_cores() if threads is None else threads)
        if len(session.get_inputs()) != 1:
            raise AerogelError(f"run_onnx: {path} has {len(session.get_inputs())} inputs, only one can be fed")
        fixed = next(iter(session.get_inputs()[0].shape), None)
        step = fixed if isinstance(fixed, int) else batch_size
        outputs = []
        for start in range(0, len(inputs), step):
            chunk = inputs[start : start + step]
            missing = step - len(chunk) if isinstance(fixed, int) else 0
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
            outputs.append(_run_batch(session, path, filled)[: len(chunk)])
    return np.concatenate(outputs)


def _run_batch(session: onnxruntime.InferenceSession, path: Path, batch: np.ndarray) -> np.ndarray:
    try:
        output = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: batch})[0]
    except Exception as error:
        raise AerogelError(f"run_onnx: {path} fails on a batch {batch.shape}: {one_line(error)}") from error
    if output.shape[:1] != batch.shape[:1]:
        raise AerogelError(f"run_onnx: {path} gives {output.shape} for a batch of {len(batch)}, not one a sample")
    return output


def open_session(
    path: Path, *, threads: int = 1, optimise: bool = True, profile: Path | None = None, keep: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU; call it inside `flushing_denormals`.

    optimise: false runs the nodes just as the file has them. profile: the start of the name of a file with the time
    of every node, written when the session's profiling ends. keep: where the optimised graph is written.

    Raises AerogelError when the file is absent or corrupt, or `threads` is below 1.
    """
    if threads < 1:
        raise AerogelError(f"open_session: threads must be >= 1, got {threads}")
    if not Path(path).is_file():
        raise AerogelError(f"open_session: there is no file {path}; export the model first")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised, never printed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if keep is not None:
        options.optimized_model_filepath = str(keep)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise AerogelError(
            f"open_session: {path} is not a model that ONNX Runtime can load: {one_line(error)}"
        ) from error


@contextlib.contextmanager
def flushing_denormals() -> Iterator[None]:
    """This thread takes denormal numbers as zero inside, and as before afterwards.

    ONNX Runtime's own option acts on its worker threads, and on the calling thread only once in a process,
    where it then stays.
    """
    before = bool(np.float32(1e-40) * np.float32(0.5) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@torch.no_grad()
def _run_model(model: nn.Module, inputs: Tensor, batch_size: int) -> np.ndarray:
    device = next((p.device for p in model.parameters()), inputs.device)
    outputs = []
    with evaluating(model):
        for batch in inputs.split(batch_size):
            output = model(batch.to(device))
            if not isinstance(output, Tensor):
                raise AerogelError(
                    f"check_parity: {type(model).__name__} must give one tensor, got {type(output).__name__}"
                )
            outputs.append(output.float().cpu())
    return torch.cat(outputs).numpy()
