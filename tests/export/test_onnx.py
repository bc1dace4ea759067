"""An exported file runs at any batch size, is the same bytes every time, and leaves the model and the user alone."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel.errors import AerogelError
from aerogel.export import onnx as subject
from aerogel.export.onnx import Exported, export_onnx
from aerogel.export.verify import open_session


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


class FixedBatch(nn.Module):
    """Writes its batch size into the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), -1)


class Add(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + table


class TwoInputs(nn.Module):
    """Its parameter has the name that the output is to have."""

    def __init__(self) -> None:
        super().__init__()
        self.output_0 = nn.Parameter(torch.ones(3))

    def forward(self, input_1: Tensor, scale: int, *, shift: Tensor) -> dict[str, Tensor]:
        scaled = input_1 * scale + self.output_0
        return {"sum": scaled + shift, "scaled": scaled}


class Branching(nn.Module):
    """Cannot be exported: which way it goes depends on the numbers. Prints, too."""

    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return x if x.sum() > 0 else -x


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = tiny().train()
    model[1].eval()
    result = export_onnx(model, (torch.randn(1, 1, 8, 8),), tmp_path_factory.mktemp("onnx") / "tiny.onnx")
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert model.training
    return result


def test_one_file_with_a_free_batch(exported: Exported) -> None:
    assert exported.dynamic_batch
    assert exported.bytes == exported.path.stat().st_size
    assert [file.name for file in exported.path.parent.iterdir()] == ["tiny.onnx"]
    session = open_session(exported.path)
    assert [(v.name, v.shape) for v in session.get_inputs()] == [("input", ["batch", 1, 8, 8])]
    assert [(v.name, v.shape) for v in session.get_outputs()] == [("output", ["batch", 3])]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_computes_what_the_model_computes_in_eval_mode(exported: Exported, batch: int) -> None:
    x = torch.randn(batch, 1, 8, 8)
    with torch.no_grad():
        expected = tiny().eval()(x)
    [found] = open_session(exported.path).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_file_is_valid_and_tells_nothing_of_this_machine(exported: Exported) -> None:
    onnx.checker.check_model(onnx.load(exported.path), full_check=True)
    content = exported.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert __file__.encode() not in content


def test_same_model_same_bytes_and_nothing_is_said(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    again = export_onnx(tiny().eval(), (torch.zeros(4, 1, 8, 8),), tmp_path / "again.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert list(warnings.filters) == filters
    assert logging.root.manager.disable == disabled


def test_the_exporter_reads_its_operators_once_and_writes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry
    read, parse = [], registry.from_torchlib

    def counted(*version: Any, **named: Any) -> Any:
        read.append(named)
        return parse(*version, **named)

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(counted))
    monkeypatch.setattr(subject, "_OPERATORS", {})
    example = (torch.zeros(4, 1, 8, 8),)
    files = [export_onnx(tiny(), example, tmp_path / f"{n}.onnx").path.read_bytes() for n in range(2)]
    assert len(read) == 1
    assert registry.from_torchlib is counted  # as it was before
    monkeypatch.setattr(subject, "_operators_kept", contextlib.nullcontext)
    files.append(export_onnx(tiny(), example, tmp_path / "anew.onnx").path.read_bytes())
    assert len(read) == 2
    assert len(set(files)) == 1


def test_of_a_release_without_that_registry_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.onnx._internal.exporter._registration.ONNXRegistry")
    monkeypatch.setattr(subject, "_OPERATORS", {})
    with subject._operators_kept():
        assert not subject._OPERATORS


def test_a_model_that_fixes_its_batch_is_exported_for_the_batch_of_the_example(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 2)
    result = export_onnx(FixedBatch(), (x,), tmp_path / "fixed.onnx")
    assert not result.dynamic_batch
    session = open_session(result.path)
    assert session.get_inputs()[0].shape == [1, 2, 2]
    [found] = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, x.flatten(1), rtol=1e-6)


def test_many_inputs_and_outputs_are_numbered_and_share_the_batch(tmp_path: Path) -> None:
    x, shift = torch.randn(1, 3), torch.randn(1, 3)
    result = export_onnx(TwoInputs(), (x, 2), tmp_path / "two.onnx", kwargs={"shift": shift})
    session = open_session(result.path)
    assert result.dynamic_batch
    assert [(v.name, v.shape) for v in session.get_inputs()] == [
        ("input_0", ["batch", 3]),
        ("input_1", ["batch", 3]),
    ]
    assert [v.name for v in session.get_outputs()] == ["output_0", "output_1"]
    x, shift = torch.randn(4, 3), torch.randn(4, 3)
    found = session.run(None, {"input_0": x.numpy(), "input_1": shift.numpy()})
    np.testing.assert_allclose(found[0], 2 * x + 1 + shift, rtol=1e-5)
    np.testing.assert_allclose(found[1], 2 * x + 1, rtol=1e-5)


def test_sizes_that_are_unknown_are_not_called_the_same(tmp_path: Path) -> None:
    """Attention of 1, 2, 4 heads: what the exporter leaves open there differs, and ONNX Runtime takes names for
    equal sizes."""

    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for heads in (1, 2, 4):
                y = x[..., : heads * 4].unflatten(-1, (heads, 4)).transpose(1, 2)
                x = x + F.scaled_dot_product_attention(y, y, y).sum((1, 3)).unsqueeze(-1)
            return x

    net, x = Heads(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    exported = export_onnx(net, (x,), tmp_path / "model.onnx")
    (got,) = open_session(exported.path).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, net(x).numpy(), rtol=1e-4, atol=1e-5)


def test_different_first_dimensions_are_no_batch(tmp_path: Path) -> None:
    result = export_onnx(Add(), (torch.ones(4, 3), torch.ones(1, 3)), tmp_path / "add.onnx")
    assert not result.dynamic_batch
    assert [v.shape for v in open_session(result.path).get_inputs()] == [[4, 3], [1, 3]]


def test_a_failure_names_the_model_and_leaves_all_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, model = tmp_path / "m.onnx", Branching()
    path.write_text("before")
    with pytest.raises(AerogelError, match=r"^export_onnx: Branching cannot be .*data-dependent.*$") as caught:
        export_onnx(model, (torch.randn(2, 3),), path)
    assert "\n" not in str(caught.value)
    assert model.training
    assert path.read_text() == "before"
    assert capfd.readouterr() == ("", "")


def test_a_bare_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"args must be a tuple of example tensors, got Tensor; pass \(x,\)"):
        export_onnx(tiny(), torch.zeros(1, 1, 8, 8), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_a_model_too_big_for_one_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MAX_BYTES", 100)
    with pytest.raises(AerogelError, match=r"Sequential holds 0\.0 GB of weights, one ONNX file holds at most"):
        export_onnx(tiny(), (torch.zeros(1, 1, 8, 8),), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())
