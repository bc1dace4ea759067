"""The time of single kernels, measured once and kept: {kernel with its exact shapes: milliseconds}.

A kernel's key is all that its speed depends on: the op with its attributes, the type and shape of every input and
output, which of them are constants, threads, processor and version of the runtime. It is measured out of place, in a
file of its own that holds it `copies` times one after the other and that the runtime runs as it stands:
- each copy has weights of its own, as the layers of a network have, so that they come from as far away as there: all
  together they are at most as large as the network's, or as a quarter of the processor's cache where the network fits
  in half of it, and that is part of the key too;
- all copies read one input, which is as near as a result that was just written;
- one run of the file takes about a millisecond, beside which the call into the runtime is little, and that is
  measured with an empty file and taken off.
The value is the median of blocks, and blocks are added until they agree or the time is over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from aerogel.cost.device import cache_folder
from aerogel.cost.latency import DTYPES, cpu_name, last_cache_bytes, no_garbage_collection
from aerogel.cost.runtime import KINDS, TYPES, Kernel, Runtime, tensor_bytes
from aerogel.errors import AerogelError
from aerogel.export.verify import flushing_denormals, open_session
from aerogel.files import read_json, write_json
from aerogel.imports import one_line

RUN_MS, MAX_COPIES = 1.0, 64
FAR = 1 << 26  # bytes: no cache holds so much
SECONDS, AGREE = 0.25, 0.03  # for one kernel; interquartile range over median of the blocks
BLOCK_MS, MIN_BLOCKS = 4.0, 5
SMALL = 4096  # numbers of an integer constant that is a shape or an index, and so belongs to the key


class KernelTable:
    """Kernel times of this machine with `threads` threads; read from and kept in a file of the cache folder."""

    def __init__(self, threads: int = 1, path: Path | None = None) -> None:
        self.threads = threads
        self.machine = machine(threads)
        digest = hashlib.sha256(self.machine.encode()).hexdigest()[:12]
        self.path = path or cache_folder() / f"kernels-{digest}.json"
        held = read_json(self.path) if self.path.exists() else {}
        known = isinstance(held, dict) and held.get("machine") == self.machine
        self.ms: dict[str, float] = dict(held["ms"]) if known else {}

    def measure(self, runtime: Runtime, *, again: bool = False) -> dict[str, float | None]:
        """{kernel's name: milliseconds} of every kernel of a network; None for one that does not run by itself.

        What the table lacks (all of it, with `again`) is measured, and the table is kept.
        """
        found: dict[str, float | None] = {}
        new: dict[str, float | None] = {}
        with flushing_denormals(), no_garbage_collection():
            for one in runtime.kernels:
                key = key_of(one, runtime)
                if key in new or (key in self.ms and not again):
                    found[one.name] = new.get(key, self.ms.get(key))
                    continue
                found[one.name] = new[key] = time_kernel(one, runtime, threads=self.threads)
        self.ms |= {key: ms for key, ms in new.items() if ms is not None}
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"machine": self.machine, "ms": self.ms})
        return found

    def look_up(self, runtime: Runtime) -> dict[str, float | None]:
        """As `measure`, but nothing is measured: None for a kernel that the table lacks."""
        return {one.name: self.ms.get(key_of(one, runtime)) for one in runtime.kernels}


def machine(threads: int) -> str:
    """What a kernel's time depends on besides the kernel."""
    return f"{cpu_name()}, onnxruntime {onnxruntime.__version__}, {threads} thread{'s' * (threads > 1)}"


def near(runtime: Runtime) -> bool:
    """Whether the network's weights stay in the processor's last cache from run to run: half of it is theirs."""
    return runtime.weight_bytes <= last_cache_bytes() // 2


def key_of(kernel: Kernel, runtime: Runtime) -> str:
    """A digest of all that the kernel's time depends on but the machine."""
    given = [name for name in kernel.node.input if name]
    constants = [_constant_key(runtime.constants.get(name)) for name in given]
    attributes = sorted(a.SerializeToString(deterministic=True).hex() for a in kernel.node.attribute)
    missing = [i for i, name in enumerate(kernel.node.input) if not name]
    shapes = [kernel.inputs, kernel.outputs, constants, missing]
    text = json.dumps([kernel.op, kernel.node.domain, attributes, shapes, near(runtime)])
    return f"{kernel.op} {hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _constant_key(tensor: TensorProto | None) -> str:
    """ "" for an activation, "weight" for numbers that do not matter, the numbers of a shape or an index."""
    if tensor is None:
        return ""
    return str(numpy_helper.to_array(tensor).tolist()) if _is_index(tensor) else "weight"


def _is_index(tensor: TensorProto) -> bool:
    whole = tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return whole and math.prod(tensor.dims) <= SMALL


def time_kernel(kernel: Kernel, runtime: Runtime, *, threads: int = 1, seconds: float = SECONDS) -> float | None:
    """Milliseconds of one kernel by itself; None where it cannot be run so (a branch or loop of its own)."""
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in kernel.node.attribute):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.onnx"
        try:
            once = _time_copies(kernel, runtime, 1, path, threads, seconds / 5)
            weights = sum(map(tensor_bytes, _weights(kernel, runtime)))
            room = last_cache_bytes() // 4 if near(runtime) else FAR
            copies = min(MAX_COPIES, math.ceil(RUN_MS / max(once, 1e-4)), room // max(weights, 1))
            return _time_copies(kernel, runtime, max(1, copies), path, threads, seconds)
        except AerogelError:
            return None


def _time_copies(kernel: Kernel, runtime: Runtime, copies: int, path: Path, threads: int, seconds: float) -> float:
    """Milliseconds of one copy. Raises AerogelError when the runtime cannot run it."""
    model, feeds = _model_of(kernel, runtime, copies)
    path.write_bytes(model.SerializeToString())
    session = open_session(path, threads=threads, optimise=False)
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    try:
        return max(_median_ms(lambda: session.run_with_iobinding(binding), seconds) - call_ms(), 1e-5) / copies
    except Exception as error:
        raise AerogelError(f"time_kernel: {kernel.name} does not run by itself: {one_line(error)}") from error


def _median_ms(run: Callable[[], object], seconds: float) -> float:
    """The median over blocks of about BLOCK_MS of their mean; more blocks until they agree or the time is over."""
    for _ in range(3):
        run()
    start = time.perf_counter()
    run()
    runs = max(1, math.ceil(BLOCK_MS / 1000 / max(time.perf_counter() - start, 1e-7)))
    blocks: list[float] = []
    end = time.perf_counter() + seconds
    while len(blocks) < MIN_BLOCKS or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(runs):
            run()
        blocks.append((time.perf_counter() - start) / runs)
        if len(blocks) >= MIN_BLOCKS:
            low, middle, high = np.percentile(blocks, [25, 50, 75])
            if (high - low) < AGREE * middle:
                break
        if time.perf_counter() > end + 4 * seconds:
            break
    return 1000 * float(np.median(blocks))


_CALL_MS: list[float] = []


def call_ms() -> float:
    """Milliseconds of calling the runtime for next to nothing; measured once a process."""
    if not _CALL_MS:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "empty.onnx"
            path.write_bytes(model.SerializeToString())
            session = open_session(path, optimise=False)
            binding = session.io_binding()
            binding.bind_cpu_input("x", np.zeros(1, np.float32))
            binding.bind_output("y")
            _CALL_MS.append(_median_ms(lambda: session.run_with_iobinding(binding), 0.1))
    return _CALL_MS[0]


def _model_of(kernel: Kernel, runtime: Runtime, copies: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The kernel `copies` times in one graph, and inputs for it. Only the last copy's results leave the graph, so that
    the runtime reuses the memory of the others', as in a network."""
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    inputs, initializers, nodes = [], [], []
    given = [name for name in kernel.node.input if name]
    typed = dict(zip(given, kernel.inputs, strict=False))
    for name in dict.fromkeys(given):
        constant = runtime.constants.get(name)
        kind, shape = typed[name]
        if constant is None:
            feeds[f"in_{name}"] = _numbers(kind, shape, rng)
            inputs.append(helper.make_tensor_value_info(f"in_{name}", TYPES[kind], shape))
        elif _is_index(constant):
            initializers.append(_renamed(constant, f"in_{name}"))
    for copy in range(copies):
        names = []
        for name in kernel.node.input:
            constant = runtime.constants.get(name)
            own = constant is not None and not _is_index(constant)
            names.append(f"w{copy}_{name}" if own else f"in_{name}" if name else "")
        node = onnx.NodeProto()
        node.CopyFrom(kernel.node)
        node.name = f"copy{copy}"
        del node.input[:], node.output[:]
        node.input.extend(names)
        node.output.extend(f"out{copy}_{i}" if out else "" for i, out in enumerate(kernel.node.output))
        nodes.append(node)
    for tensor, copy in itertools.product(_weights(kernel, runtime), range(copies)):
        values = _numbers(KINDS[tensor.data_type], tuple(tensor.dims), rng)
        initializers.append(numpy_helper.from_array(values, f"w{copy}_{tensor.name}"))
    real = [i for i, out in enumerate(kernel.node.output) if out]
    outputs = [
        helper.make_tensor_value_info(f"out{copies - 1}_{i}", TYPES[kind], shape)
        for i, (kind, shape) in zip(real, kernel.outputs, strict=False)
    ]
    graph = helper.make_graph(nodes, "kernel", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in runtime.opsets.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=runtime.ir_version), feeds


def _weights(kernel: Kernel, runtime: Runtime) -> list[TensorProto]:
    held = (runtime.constants.get(name) for name in dict.fromkeys(kernel.node.input))
    return [tensor for tensor in held if tensor is not None and not _is_index(tensor)]


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _numbers(kind: str, shape: Iterable[int], rng: np.random.Generator) -> np.ndarray:
    """Of about the size that numbers in a network have: values do not change the time unless they are denormal."""
    dtype = DTYPES[f"tensor({kind})"]
    shape = tuple(shape)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(shape, dtype=np.float32) * 0.1, dtype)
    return np.zeros(shape, dtype)
