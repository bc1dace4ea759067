"""A network as ONNX Runtime really runs it: the kernels left after its own optimisation, their shapes and times.

ONNX Runtime folds batch norms and activations into convolutions, lays channels out in blocks of 8 where their number
allows it (NCHWc, with kernels that reorder at the borders), and drops what it can. Its profiler tells the shapes and
the time of every kernel in place; the file it can write holds their attributes. Both are read here, and each kernel is
given back to the module of the user's model whose name the exported file carries.

Times in place are whole microseconds, as the profiler has them, and profiling costs about a microsecond a kernel: good
to tell layers apart, not for the total, which `aerogel.cost.latency.measure` takes without a profiler.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from aerogel.cost.latency import DTYPES, example_feeds
from aerogel.errors import AerogelError
from aerogel.export.onnx import module_of
from aerogel.export.verify import flushing_denormals, open_session
from aerogel.imports import one_line

WARM_UP, MIN_RUNS = 3, 15
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Kernel:
    """One kernel of the optimised graph. The shapes are those of the inputs and outputs it is given, in order."""

    name: str
    op: str
    module: str  # of the user's model; "" is the network itself
    node: onnx.NodeProto
    inputs: tuple[tuple[str, tuple[int, ...]], ...]  # (type, shape)
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    ms: float  # in place: the median over the profiled runs

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * _itemsize(kind) for kind, shape in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Runtime:
    kernels: tuple[Kernel, ...]
    constants: dict[str, onnx.TensorProto]  # the weights of the optimised graph, and its constant shapes and indices
    opsets: dict[str, int]
    ir_version: int
    unread: tuple[str, ...]  # nodes the profiler has no time for
    weight_bytes: int


def read_runtime(path: Path, *, threads: int = 1, batch: int = 1, seconds: float = 0.5, seed: int = 0) -> Runtime:
    """Runs the file under ONNX Runtime's profiler for about `seconds`, and reads what it ran.

    Raises AerogelError when the file does not run with that batch.
    """
    with tempfile.TemporaryDirectory() as folder, flushing_denormals():
        kept = Path(folder) / "optimised.onnx"
        open_session(path, threads=threads, keep=kept)
        model = _named(kept)
        session = open_session(kept, threads=threads, optimise=False, profile=Path(folder) / "profile")
        feeds = example_feeds(path, session, batch, np.random.default_rng(seed))
        try:
            for _ in range(WARM_UP):
                session.run(None, feeds)
            end, runs = time.perf_counter() + seconds, 0
            while runs < MIN_RUNS or time.perf_counter() < end:
                session.run(None, feeds)
                runs += 1
        except Exception as error:
            raise AerogelError(f"read_runtime: {path} does not run with batch {batch}: {one_line(error)}") from error
        profile = session.end_profiling()
        events = json.loads(Path(profile).read_text(encoding="utf-8"))
    return _read(model, events, _modules_of_outputs(path))


def _named(path: Path) -> onnx.ModelProto:
    """The optimised file, every node of which has a name of its own: the runtime leaves some that it fused without."""
    model = onnx.load(path)
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_at_{i}"
        seen.add(node.name)
    path.write_bytes(model.SerializeToString())
    return model


def _modules_of_outputs(path: Path) -> dict[str, str]:
    """{output of the network: the module that makes it}: outputs have public names, and the runtime names kernels after
    what they make."""
    graph = onnx.load(path).graph
    public = {output.name for output in graph.output}
    made = ((out, module_of(node.name)) for node in graph.node for out in node.output if out in public)
    return {name: module for name, module in made if module is not None}


def _read(model: onnx.ModelProto, events: list[dict[str, Any]], of_outputs: dict[str, str]) -> Runtime:
    times: dict[str, list[int]] = defaultdict(list)
    shapes: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            name = event["name"].removesuffix(_SUFFIX)
            times[name].append(event["dur"])
            shapes[name] = event["args"]
    nodes = {node.name: node for node in model.graph.node}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    modules = _modules(list(model.graph.node), of_outputs)
    kernels = []
    for name, args in shapes.items():  # in the order they run
        if name in nodes:
            kernels.append(
                Kernel(
                    name=name,
                    op=nodes[name].op_type,
                    module=modules[name],
                    node=nodes[name],
                    inputs=_inputs(nodes[name], constants, args["input_type_shape"]),
                    outputs=_typed(args["output_type_shape"]),
                    ms=float(np.median(times[name][WARM_UP:])) / 1000,
                )
            )
    return Runtime(
        kernels=tuple(kernels),
        constants=constants,
        opsets={opset.domain: opset.version for opset in model.opset_import},
        ir_version=model.ir_version,
        unread=tuple(name for name in nodes if name not in shapes),
        weight_bytes=sum(map(tensor_bytes, constants.values())),
    )


def _inputs(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], held: list[dict[str, list[int]]]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Type and shape of every input the node is given; the profiler leaves out weights that a kernel packed anew."""
    told = list(_typed(held))
    found = []
    for name in filter(None, node.input):
        constant = constants.get(name)
        if constant is not None:
            own = (KINDS.get(constant.data_type, "unknown"), tuple(constant.dims))
            if not told or told[0] != own:
                found.append(own)
                continue
        found.append(told.pop(0))
    return tuple(found)


def _typed(held: list[dict[str, list[int]]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, tuple(shape)) for item in held for kind, shape in item.items())


def _modules(nodes: list[onnx.NodeProto], of_outputs: dict[str, str]) -> dict[str, str]:
    """The module of each node; of one the runtime added, that of the node it serves: a reorder of an output belongs to
    what made it, any other to what reads it."""

    def own(node: onnx.NodeProto) -> str | None:
        found = module_of(node.name)
        return of_outputs.get(node.name.removesuffix("_nchwc")) if found is None else found

    maker = {out: node for node in nodes for out in node.output}
    reader = {name: node for node in reversed(nodes) for name in node.input}
    found: dict[str, str] = {}
    for node in nodes:
        before = [maker[name] for name in node.input if name in maker]
        after = [reader[name] for name in node.output if name in reader]
        beside = before + after if node.op_type == "ReorderOutput" else after + before
        named = (own(one) for one in (node, *beside))
        found[node.name] = next((module for module in named if module is not None), "")
    return found


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * _itemsize(KINDS.get(tensor.data_type, ""))


def _itemsize(kind: str) -> int:
    return np.dtype(DTYPES.get(f"tensor({kind})", np.float32)).itemsize


_T = onnx.TensorProto
# The profiler's names of types.
TYPES = {"float": _T.FLOAT, "float16": _T.FLOAT16, "double": _T.DOUBLE, "int64": _T.INT64, "int32": _T.INT32,
         "uint8": _T.UINT8, "int8": _T.INT8, "bool": _T.BOOL}  # fmt: skip
KINDS: dict[int, str] = {number: kind for kind, number in TYPES.items()}
