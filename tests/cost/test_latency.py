"""Timings are well formed, leave the process as it was, and do not call equal things different. No test asserts a
speed, but for a network that is far larger than another.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from aerogel.cost.latency import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Latency,
    _latency,
    _ratio,
    compare,
    cpu_name,
    measure,
)
from aerogel.errors import AerogelError

QUICK = 0.05  # seconds


def write(path: Path, kind: int, shape: list[int | str], width: int = 4, layers: int = 1) -> Path:
    """An ONNX file of matrix products, or of identities where there is nothing to multiply."""
    nodes, weights, last = [], [], "input"
    for i in range(layers):
        if kind == TensorProto.FLOAT:
            weights.append(numpy_helper.from_array(np.full((width, width), 0.01, np.float32), f"w{i}"))
            nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"x{i}"]))
        else:
            nodes.append(helper.make_node("Identity", [last], [f"x{i}"]))
        last = f"x{i}"
    inputs = [helper.make_tensor_value_info("input", kind, shape)]
    outputs = [helper.make_tensor_value_info(last, kind, shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "small.onnx", TensorProto.FLOAT, ["batch", 4])


@pytest.fixture(scope="module")
def latency(small: Path) -> Latency:
    return measure(small, seconds=QUICK)


def test_a_latency_is_well_formed(latency: Latency) -> None:
    assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
    assert latency.p90_ms > 0
    assert latency.iqr_ms >= 0
    assert latency.runs >= MIN_ROUNDS
    assert (latency.threads, latency.batch) == (1, 1)
    assert latency.runtime.startswith("onnxruntime 1.")
    assert latency.cpu == cpu_name() != ""
    assert json.loads(json.dumps(dataclasses.asdict(latency))) == dataclasses.asdict(latency)


def test_describe(latency: Latency) -> None:
    times = {"median_ms": 0.4121, "low_ms": 0.409, "high_ms": 0.4161, "p90_ms": 0.43}
    said = dataclasses.replace(latency, **times).describe()
    assert said == "0.412 ms [0.409, 0.416] p90 0.43 (1 thread, batch 1)"
    times = {"median_ms": 1234.5, "low_ms": 999.4, "high_ms": 12345.6, "p90_ms": 20000.0}
    said = dataclasses.replace(latency, **times, threads=2, batch=8).describe()
    assert said == "1234 ms [999, 12346] p90 20000 (2 threads, batch 8)"


def test_a_far_larger_network_is_slower(small: Path, tmp_path: Path) -> None:
    large = write(tmp_path / "large.onnx", TensorProto.FLOAT, ["batch", 512], width=512, layers=4)
    found = compare(small, large, seconds=QUICK)
    assert 1 < found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.a.median_ms < found.b.median_ms
    assert MIN_ROUNDS <= found.pairs <= min(found.a.runs, found.b.runs)


def test_threads_batch_and_rounds_are_passed_on(small: Path) -> None:
    found = compare(small, small, threads=2, batch=3, seconds=4 * QUICK)
    assert found.a.runs == found.b.runs
    assert found.pairs >= MIN_ROUNDS
    assert {(side.threads, side.batch) for side in (found.a, found.b)} == {(2, 3)}
    assert found.ratio.low <= found.ratio.value <= found.ratio.high


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_types_of_input(tmp_path: Path, kind: int) -> None:
    path = write(tmp_path / "other.onnx", kind, [1, 4])
    assert measure(path, seconds=QUICK).median_ms > 0


@pytest.mark.parametrize("collecting", [True, False])
def test_the_process_is_left_as_it_was(small: Path, collecting: bool) -> None:
    cores = os.sched_getaffinity(0)
    try:
        (gc.enable if collecting else gc.disable)()
        measure(small, seconds=QUICK)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert os.sched_getaffinity(0) == cores
    assert np.float32(1e-40) * np.float32(0.5) > 0
    assert torch.get_num_threads() >= 1


def test_what_is_restored_is_restored_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"there is no file .*absent.onnx"):
        measure(tmp_path / "absent.onnx")
    assert gc.isenabled()


def test_files_that_cannot_be_timed(tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(b"not a model")
    with pytest.raises(AerogelError, match=r"corrupt.onnx is not a model that ONNX Runtime can load"):
        measure(corrupt)
    free = write(tmp_path / "free.onnx", TensorProto.FLOAT, ["batch", "length", 4])
    with pytest.raises(AerogelError, match=r"input input of .*free.onnx is tensor\(float\) of shape .*'length'"):
        measure(free)
    text = write(tmp_path / "text.onnx", TensorProto.STRING, [1, 4])
    with pytest.raises(AerogelError, match=r"is tensor\(string\) of shape \[1, 4\]; only plain tensors"):
        measure(text)
    odd = write(tmp_path / "odd.onnx", TensorProto.FLOAT, ["batch", 5])  # its weight is 4 x 4
    with pytest.raises(AerogelError, match=r"odd.onnx (does not run with batch 1|is not a model)"):
        measure(odd)


def test_a_fixed_batch_is_kept(tmp_path: Path, small: Path) -> None:
    static = write(tmp_path / "static.onnx", TensorProto.FLOAT, [1, 4])
    assert measure(static, seconds=QUICK).batch == 1
    with pytest.raises(AerogelError, match=r"static.onnx takes batches of 1 only, got batch=4; pass that"):
        compare(small, static, batch=4, seconds=QUICK)
    four = write(tmp_path / "four.onnx", TensorProto.FLOAT, [4, 4])
    with pytest.raises(AerogelError, match=r"four.onnx takes batches of 4 only, got batch=1"):
        measure(four, seconds=QUICK)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"seconds": 0.0}, "seconds must be above 0, got 0.0"),
        ({"seconds": float("nan")}, "seconds must be above 0, got nan"),
    ],
)
def test_arguments_out_of_range(small: Path, arguments: dict[str, float], reason: str) -> None:
    with pytest.raises(AerogelError, match=reason):
        measure(small, **arguments)  # type: ignore[arg-type]


def rounds(rng: np.random.Generator, scale: float, speed: np.ndarray) -> list[list[np.ndarray]]:
    """Made-up rounds: `speed` of the machine a round and pair, luck of the session, noise with rare long stalls."""
    luck = rng.normal(0, 0.003, size=(len(speed), 1, 1))
    noise = rng.exponential(0.02, size=(*speed.shape, 5)) + (rng.random((*speed.shape, 5)) < 0.05) * 3
    return [list(blocks) for blocks in scale * speed[:, :, None] * np.exp(luck + noise)]


def many_ratios(scale: float, trials: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    found = []
    for _ in range(trials):
        # The machine changes its speed by half, at any time, for both files.
        speed = rng.choice([1.0, 1.5], size=(MAX_ROUNDS, 5), p=[0.8, 0.2])
        ratio = _ratio(rounds(rng, 1.0, speed), rounds(rng, scale, speed))
        found.append((ratio.low, ratio.value, ratio.high))
    return np.array(found).T


def test_equal_files_are_rarely_called_different() -> None:
    low, value, high = many_ratios(1.0, trials=200)
    assert np.mean(high < 1) <= 0.05
    assert np.mean(low > 1) <= 0.05
    assert np.median(high - low) < 0.03
    assert np.median(value) == pytest.approx(1, abs=0.002)


def test_a_faster_file_is_found_and_its_ratio_covered() -> None:
    low, value, high = many_ratios(0.9, trials=100)
    assert np.mean(high < 1) == 1
    assert np.mean((low <= 0.9) & (high >= 0.9)) >= 0.9
    assert np.median(value) == pytest.approx(0.9, abs=0.002)


def test_the_latency_of_made_up_rounds() -> None:
    steady = [[np.full(4, 1.0 + i / 100)] for i in range(6)]
    found = _latency(steady, threads=1, batch=1, load=0.0)
    assert (found.low_ms, found.median_ms, found.high_ms) == pytest.approx((1.0, 1.025, 1.05))
    assert found.runs == 24
    assert not found.noisy
    assert _latency(steady, threads=1, batch=1, load=1e6).noisy
    spread = [[np.array([1.0, 1.0, 1.2, 1.2])] for _ in range(6)]
    assert _latency(spread, threads=1, batch=1, load=0.0).noisy
