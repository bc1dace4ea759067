"""A model as one ONNX file, through torch.export and PyTorch's own exporter (dynamo=True).

The file takes any batch size where the model allows it: the first dimension of every input is then the one
symbol "batch". A model that fixes it (a literal batch in a view, a parameter of that size) is exported for
the batch of the example, and the result says so. Inputs are named "input", or "input_0", "input_1", ...;
outputs likewise. Weights are inside the file. Nodes and what they compute are named "MODULE/VALUE", as in
"features.stem.act/relu", so that a viewer, and a runtime's profile, can be read beside the model (`module_of`).
The exporter's notes for debugging, source paths among them, are left out: the same model gives the same bytes
anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.files import replacing
from aerogel.graph import evaluating
from aerogel.graph.capture import quiet
from aerogel.imports import one_line

MAX_BYTES = int(1.9e9)  # a protobuf message ends at 2 GiB
BATCH = "batch"


@dataclass(frozen=True)
class Exported:
    """An ONNX file; without `dynamic_batch` it takes only the batch size of the example inputs."""

    path: Path
    dynamic_batch: bool
    bytes: int


def export_onnx(
    model: nn.Module, args: tuple[Tensor, ...], path: Path, *, kwargs: dict[str, Any] | None = None
) -> Exported:
    """Write `model` to `path`, as it computes in eval mode; training flags are as before afterwards.

    `args` and `kwargs` are example inputs; the first dimension of each tensor is the batch.
    Raises AerogelError when the model cannot be exported, is over 1.9 GB, or `path` cannot be written.
    """
    name, kwargs = type(model).__name__, kwargs or {}
    if not isinstance(args, tuple):
        raise AerogelError(
            f"export_onnx: args must be a tuple of example tensors, got {type(args).__name__}; pass (x,)"
        )
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim]
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > MAX_BYTES:
        raise AerogelError(
            f"export_onnx: {name} holds {size / 1e9:.1f} GB of weights, one ONNX file holds at most "
            f"{MAX_BYTES / 1e9:.1f} GB; make it smaller or convert it to half precision first"
        )
    try:
        with evaluating(model), quiet():
            program, dynamic = _export(model, args, kwargs, tensors)
            _tidy(program)
            content = program.model_proto.SerializeToString()
    except Exception as error:
        raise AerogelError(
            f"export_onnx: {name} cannot be exported to ONNX: {_reason(error)}; "
            "check the example inputs, or rewrite that step of its forward"
        ) from error
    with replacing(path) as temp:
        temp.write_bytes(content)
    return Exported(Path(path), dynamic, len(content))


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> tuple[torch.onnx.ONNXProgram, bool]:
    """The program, and whether its batch is free."""
    batches = {len(t) for t in tensors}
    if len(batches) == 1:  # else the first dimensions are not all the batch
        # torch.export takes a batch of 1 for a constant, so it is shown 2.
        shown = {id(t): torch.cat([t, t]) if batches == {1} else t for t in tensors}
        free_args = tuple(shown.get(id(v), v) for v in args)
        free_kwargs = {name: shown.get(id(v), v) for name, v in kwargs.items()}
        shapes = torch.export.ShapesCollection()
        for tensor in shown.values():
            shapes[tensor] = {0: torch.export.Dim(BATCH)}
        # Where the model fixes the batch, some releases raise and some fix it in the file. If something else
        # is wrong, the second export meets it again and tells it.
        with contextlib.suppress(Exception):
            dynamic_shapes = shapes.dynamic_shapes(model, free_args, free_kwargs)
            program = _run_exporter(model, free_args, free_kwargs, dynamic_shapes)
            if _batch_symbol(program) is not None:
                return program, True
    return _run_exporter(model, args, kwargs, None), False


def _run_exporter(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.onnx.ONNXProgram:
    with _operators_kept():
        program = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
        )
    return cast(torch.onnx.ONNXProgram, program)  # None only with dynamo=False


_OPERATORS: dict[Any, Any] = {}  # by version of the operator set


@contextlib.contextmanager
def _operators_kept() -> Iterator[None]:
    """The exporter parses the sources of its 500 operators anew for every file: one second, two thirds of a small
    network's time. Inside, it gets those of the first file again; nobody changes them, for we add none of our own.
    Where a release has them elsewhere, nothing is kept."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        parse = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def kept(*version: Any, **named: Any) -> Any:
        key = (version, tuple(named.items()))
        if key not in _OPERATORS:
            _OPERATORS[key] = parse(*version, **named)
        return _OPERATORS[key]

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(kept)):
        yield


def _batch_symbol(program: torch.onnx.ONNXProgram) -> str | None:
    """The one symbol that is the first dimension of every input, if there is one."""
    firsts = {str(v.shape[0]) for v in program.model.graph.inputs if v.shape is not None and len(v.shape)}
    symbol = firsts.pop() if len(firsts) == 1 else ""
    return symbol if symbol.isidentifier() else None


def _tidy(program: torch.onnx.ONNXProgram) -> None:
    """Names of inputs, outputs and batch as promised; no debugging notes."""
    model, graph = program.model, program.model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in nodes for out in node.outputs)]
    names = dict(zip(graph.inputs, _names("input", len(graph.inputs)), strict=True))
    names |= dict(zip(graph.outputs, _names("output", len(graph.outputs)), strict=True))
    symbol = _batch_symbol(program)
    for value in values:
        if value not in names and value.name in names.values():
            value.name = f"{value.name}_of_model"
        value.metadata_props.clear()
        if value.shape is not None and symbol is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) and size.value is not None:  # a size with a name, not an unknown one
                    value.shape[axis] = re.sub(rf"\b{symbol}\b", BATCH, str(size))
    for node in nodes:
        module = _module(node.metadata_props)
        if module is not None:
            node.name = f"{module}/{node.outputs[0].name}"
            names |= {out: f"{module}/{out.name}" for out in node.outputs if out not in names and out.name}
    for value, name in names.items():
        value.name = name
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in nodes:
        node.metadata_props.clear()


def _module(metadata: Mapping[str, str]) -> str | None:
    """The module a node comes from: the exporter notes the path of modules, then the op. None where it does not."""
    try:
        scopes = ast.literal_eval(metadata.get("pkg.torch.onnx.name_scopes", "[]"))
    except (SyntaxError, ValueError):
        return None
    return str(scopes[-2]) if len(scopes) > 1 else None


def module_of(name: str) -> str | None:
    """The module in the name of a node, also after a runtime has fused it and put words around; None without one."""
    found = re.search(r"([^\s/]*)/[^/]*$", name)
    return found[1] if found else None


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]


def _reason(error: BaseException) -> str:
    """The first line of the error that started it; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"
