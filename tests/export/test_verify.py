"""Parity is found where it is, and its absence where it is not; nothing of the process is changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import check_parity, flushing_denormals, open_session, run_onnx


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    return export_onnx(tiny(), (torch.zeros(1, 3, 4),), folder / "tiny.onnx").path


@pytest.fixture
def static_path(tmp_path: Path) -> Path:
    """A file that flattens batches of 4, and no others."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["output"])],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [4, 3, 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [4, 12])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "static.onnx"
    )
    return tmp_path / "static.onnx"


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(1001, 3, 4, generator=torch.Generator().manual_seed(1))


def denormals_are_flushed() -> bool:
    return bool(np.float32(1e-40) * np.float32(0.5) == 0)


def test_parity_of_a_true_export(path: Path, inputs: Tensor) -> None:
    model = tiny().train()
    model[2].eval()
    parity = check_parity(model, path, inputs, batch_size=300)
    assert parity.ok
    assert parity.samples == 1001
    assert parity.top1_agreement == 1.0
    assert parity.max_abs_diff < 1e-5
    assert parity.tolerance == pytest.approx(1e-3 * max(1.0, float(tiny().eval()(inputs).detach().abs().max())))
    assert [m.training for m in model] == [True, True, False, True, True]


def test_another_model_is_no_parity(path: Path, inputs: Tensor) -> None:
    other = tiny()
    with torch.no_grad():
        other[4].weight.mul_(-1)
    parity = check_parity(other, path, inputs)
    assert not parity.ok
    assert parity.top1_agreement < 0.5
    assert parity.max_abs_diff > parity.tolerance


def test_equal_classes_do_not_hide_a_shift(path: Path, inputs: Tensor) -> None:
    other = tiny()
    with torch.no_grad():
        other[4].bias.add_(0.1)
    parity = check_parity(other, path, inputs)
    assert parity.top1_agreement == 1.0
    assert parity.max_abs_diff == pytest.approx(0.1, abs=1e-4)
    assert not parity.ok


def test_large_logits_are_judged_by_their_size(path: Path, inputs: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model[4].bias.fill_(1000.0)
    assert check_parity(model, path, inputs).tolerance == pytest.approx(1.0, rel=0.01)


def test_a_fixed_batch_is_filled_up(static_path: Path, inputs: Tensor) -> None:
    found = run_onnx(static_path, inputs[:7].numpy(), batch_size=2)
    np.testing.assert_array_equal(found, inputs[:7].flatten(1))


def test_batches_do_not_matter(path: Path, inputs: Tensor) -> None:
    whole = run_onnx(path, inputs.numpy(), batch_size=2000, threads=1)
    parts = run_onnx(path, inputs.numpy(), batch_size=7, threads=2)
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_treated_as_before(path: Path, inputs: Tensor, before: bool) -> None:
    try:
        torch.set_flush_denormal(before)
        run_onnx(path, inputs[:2].numpy())
        assert denormals_are_flushed() is before
    finally:
        torch.set_flush_denormal(False)


def test_denormal_numbers_are_zero_only_inside(path: Path) -> None:
    for _ in range(2):
        with flushing_denormals():
            open_session(path)
            assert denormals_are_flushed()
        assert not denormals_are_flushed()


def test_not_finite_is_an_error(path: Path, inputs: Tensor) -> None:
    broken = tiny()
    with torch.no_grad():
        broken[4].bias[0] = float("nan")
    with pytest.raises(AerogelError, match="check_parity: the model gives values that are not finite"):
        check_parity(broken, path, inputs)


def test_another_number_of_classes_is_an_error(path: Path, inputs: Tensor) -> None:
    with pytest.raises(AerogelError, match=r"gives \(1001, 5\), the model gives \(1001, 8\)"):
        check_parity(tiny()[:4], path, inputs)


def test_a_model_of_many_outputs_is_an_error(path: Path, inputs: Tensor) -> None:
    with pytest.raises(AerogelError, match="LSTM must give one tensor, got tuple"):
        check_parity(nn.LSTM(4, 4), path, inputs)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 3, 4), np.float32), "needs at least one sample and batch_size >= 1, got 0 and 256"),
        (np.zeros((2, 3, 4), np.float64), r"fails on a batch \(2, 3, 4\): .*double"),
        (np.zeros((2, 3, 5), np.float32), r"fails on a batch \(2, 3, 5\): "),
    ],
)
def test_inputs_that_do_not_fit(path: Path, array: np.ndarray, reason: str) -> None:
    with pytest.raises(AerogelError, match=reason):
        run_onnx(path, array)


def test_files_that_do_not_do(path: Path, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AerogelError, match=r"corrupt.onnx is not a model that ONNX Runtime can load: .*") as caught:
        open_session(corrupt)
    assert "\n" not in str(caught.value)
    with pytest.raises(AerogelError, match=r"there is no file .*absent.onnx"):
        open_session(tmp_path / "absent.onnx")
    with pytest.raises(AerogelError, match="threads must be >= 1, got 0"):
        open_session(path, threads=0)
