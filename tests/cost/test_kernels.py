"""The runtime's own kernels, their table, and what is predicted from it. No test looks at how long anything took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device import made
from torch import Tensor, nn

from aerogel.cost import calibrate as calibrating
from aerogel.cost import count
from aerogel.cost import kernels as kernels_module
from aerogel.cost.calibrate import copy_gb_s, export_zoo, fit, simd_lanes, speeds
from aerogel.cost.kernels import KernelTable, key_of, time_kernel
from aerogel.cost.predict import estimate, family_of, operations, predict
from aerogel.cost.runtime import Kernel, Runtime, read_runtime
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx, module_of
from aerogel.graph import capture


class Unit(nn.Module):
    """A residual unit, a head, and a transposed convolution on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 4, 2, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        return self.fc(x.mean((2, 3))), self.up(x)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = tmp_path_factory.mktemp("unit") / "unit.onnx"
    return read_runtime(export_onnx(Unit(), (torch.randn(1, 3, 16, 16),), path).path, seconds=0.02)


def one(runtime: Runtime, module: str) -> Kernel:
    return max((k for k in runtime.kernels if k.module.startswith(module)), key=operations)


def test_kernels_belong_to_the_modules_of_the_model(runtime: Runtime) -> None:
    modules = {name for name, _ in Unit().named_modules()}
    assert {k.module for k in runtime.kernels} <= modules
    assert {"depthwise", "pointwise", "fc", "up"} <= {k.module for k in runtime.kernels}
    assert any(k.module.startswith("stem") for k in runtime.kernels)
    assert not runtime.unread


def test_norm_and_activation_are_fused_away(runtime: Runtime) -> None:
    assert not any(k.op in ("BatchNormalization", "Relu") for k in runtime.kernels)


@pytest.mark.parametrize(
    ("module", "family", "macs"),
    [
        ("stem", "conv", 16 * 256 * 27),
        ("depthwise", "depthwise", 16 * 256 * 9),
        ("pointwise", "pointwise", 16 * 256 * 16),
        ("up", "transposed", 16 * 256 * 4 * 4),
        ("fc", "matmul", 160),
    ],
)
def test_family_and_work_of_a_kernel(runtime: Runtime, module: str, family: str, macs: int) -> None:
    assert family_of(one(runtime, module)) == family
    assert operations(one(runtime, module)) == macs


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("features.stem.act/relu_nchwc", "features.stem.act"),
        ("fused features.stem.conv/conv2d", "features.stem.conv"),
        ("/add_3", ""),
        ("ReorderOutput_token_1", None),
    ],
)
def test_the_module_is_read_out_of_a_runtime_s_name(name: str, module: str | None) -> None:
    assert module_of(name) == module


def test_every_kernel_runs_by_itself_and_is_measured_once(runtime: Runtime, tmp_path: Path, monkeypatch) -> None:
    table = KernelTable(path=tmp_path / "table.json")
    found = table.measure(runtime)
    assert set(found) == {k.name for k in runtime.kernels}
    assert all(ms is not None and ms > 0 for ms in found.values())
    monkeypatch.setattr(kernels_module, "time_kernel", lambda *_, **__: pytest.fail("measured again"))
    again = KernelTable(path=tmp_path / "table.json")
    assert again.measure(runtime) == found == again.look_up(runtime)


def test_another_machine_s_table_is_not_believed(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"machine": "another", "ms": {"Conv 1": 3.0}}')
    assert KernelTable(path=tmp_path / "table.json").ms == {}


def test_the_key_is_the_shapes_and_not_the_weights(tmp_path: Path) -> None:
    def key(channels: int, seed: int, stride: int = 1) -> str:
        torch.manual_seed(seed)
        net = nn.Conv2d(8, channels, 3, stride, 1)
        path = export_onnx(net, (torch.randn(1, 8, 8, 8),), tmp_path / f"{channels}-{seed}-{stride}.onnx").path
        found = read_runtime(path, seconds=0.01)
        return key_of(max(found.kernels, key=operations), found)

    assert key(16, 0) == key(16, 1)
    assert len({key(16, 0), key(24, 0), key(16, 0, stride=2)}) == 3


def test_a_kernel_with_a_graph_of_its_own_is_not_timed(runtime: Runtime) -> None:
    import onnx

    body = onnx.helper.make_graph([], "body", [], [])
    branch = onnx.helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)
    assert time_kernel(Kernel("if", "If", "", branch, (), (), 1.0), runtime) is None


def test_a_prediction_is_the_sum_of_its_kernels(runtime: Runtime, tmp_path: Path) -> None:
    table = KernelTable(path=tmp_path / "table.json")
    table.ms = {key_of(k, runtime): 2.0 for k in runtime.kernels}
    device = made(kernel_scale=0.5, kernel_us=100.0, run_us=1000.0)
    found = predict(runtime, table, device, measure=False)
    assert found.ms == pytest.approx(0.5 * 2.0 * len(runtime.kernels) + 0.1 * len(runtime.kernels) + 1.0)
    assert found.estimated == {}
    assert sum(ms for _, ms in found.kernel_ms) == pytest.approx(found.ms - 1.0)
    assert [module for module, _ in found.kernel_ms] == [k.module for k in runtime.kernels]


def test_what_was_not_measured_is_estimated_and_said(runtime: Runtime, tmp_path: Path) -> None:
    found = predict(runtime, KernelTable(path=tmp_path / "table.json"), made(), measure=False)
    assert sum(found.estimated.values()) == found.kernels == len(runtime.kernels)
    assert found.ms == pytest.approx(sum(estimate(k, made()) for k in runtime.kernels))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.5, 2), st.floats(0, 5), st.floats(0, 50),
    st.lists(st.tuples(st.floats(0.1, 50), st.integers(5, 300)), min_size=5, max_size=8, unique=True),
)  # fmt: skip
def test_the_fit_explains_what_follows_the_model(a: float, b: float, c: float, nets: list[tuple[float, int]]) -> None:
    whole = [(total, number, a * total + b * number / 1000 + c / 1000) for total, number in nets]
    scale, kernel_us, run_us = fit(whole)
    for total, number, ms in whole:
        assert scale * total + kernel_us * number / 1000 + run_us / 1000 == pytest.approx(ms, rel=1e-3)
    assert min(scale, kernel_us, run_us) >= 0


def test_speed_is_work_over_time(runtime: Runtime) -> None:
    held = {k.name: 1.0 for k in runtime.kernels}
    found = speeds([(runtime, held)], overhead_us=0.0)
    convs = [operations(k) for k in runtime.kernels if family_of(k) == "conv"]
    assert found["conv"] == pytest.approx(sum(convs) / len(convs) / 1e6)


def test_bandwidth_and_lanes_are_positive() -> None:
    assert copy_gb_s(1 << 16, seconds=0.01) > 0
    assert simd_lanes() in (4, 8, 16)


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(AerogelError, match="threads must be >= 1, got 0"):
        calibrating.calibrate(threads=0)


@pytest.mark.slow
def test_this_machine_is_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = calibrating.calibrate(seconds=0.5)
    assert {"conv", "pointwise", "depthwise", "grouped", "transposed", "matmul", "norm", "move"} <= device.gmacs.keys()
    assert device.kernel_scale > 0
    path = export_zoo("lenet5", tmp_path / "net.onnx")
    assert predict(read_runtime(path, seconds=0.1), KernelTable(), device).estimated == {}


class Plain(nn.Module):
    """Work without MACs, each op a module."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(
            {"pool": nn.AvgPool2d(3, 2, 1), "norm": nn.LayerNorm(8), "reduce": nn.Softmax(-1), "gate": nn.Sigmoid()}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [op(x) for op in self.ops.values()]


def test_a_kernel_s_work_is_counted_as_its_layer_s(tmp_path: Path) -> None:
    net, x = Plain(), torch.randn(1, 4, 8, 8)
    found = read_runtime(export_onnx(net, (x,), tmp_path / "plain.onnx").path, seconds=0.01)
    ours = {layer.module: layer.flops for layer in count(capture(net, (x,))).layers if layer.flops}
    theirs = {k.module: operations(k) for k in found.kernels if operations(k)}
    assert theirs == ours
    assert len(ours) == 4


def test_kernels_that_the_runtime_left_without_a_name_are_read(tmp_path: Path) -> None:
    found = read_runtime(export_zoo("mobilenet_v3_small:input_size=64", tmp_path / "net.onnx"), seconds=0.01)
    assert not found.unread
    assert len({k.name for k in found.kernels}) == len(found.kernels)
    assert {"HardSigmoid", "Mul"} <= {k.op for k in found.kernels}


def test_what_makes_the_network_s_output_belongs_to_its_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    path = export_onnx(net, (torch.randn(1, 8, 14, 14),), tmp_path / "net.onnx").path
    found = read_runtime(path, seconds=0.01)
    assert {k.module for k in found.kernels if family_of(k) == "conv"} == {"1", "2"}
    assert {k.module for k in found.kernels} <= {"0", "1", "2"}
