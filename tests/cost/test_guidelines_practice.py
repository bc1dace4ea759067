"""lint beyond the paper: lanes, norms, ends, peak, and what the exporter and ONNX Runtime do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken import (
    SLOW_COMPUTE,
    SLOW_MEMORY,
    SMALL_CACHE,
    Add,
    Call,
    conv,
    graph_of,
    heavy_classifier,
    heavy_first,
    network,
    only,
    peaked,
    rows,
)
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel.cost import lint
from aerogel.cost.guidelines.runtime import SLOW, UNSUPPORTED
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.graph import capture


def test_lanes() -> None:
    found = only(graph_of(network(*rows(lambda: conv(36, 36, 3)), c=36)), "P1-simd", SLOW_COMPUTE)
    assert found.what == "36 channels fill 90% of the lanes of 5 vectors of 8, in 9 layers"
    assert found.rewrite == "32 channels are whole vectors; 40 channels take no longer"
    assert found.score == pytest.approx(40 / 36)
    assert found.share == pytest.approx(40 / 36 - 1, rel=0.01)
    few = only(graph_of(network(*rows(lambda: conv(3, 3, 3)), c=3)), "P1-simd", SLOW_COMPUTE)
    assert (few.rewrite, few.gain_ms) == ("8 channels take no longer", 0)


@pytest.mark.parametrize(
    ("block", "why", "retrain"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)), "the layer behind it", False),
        (
            lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)),
            "straight behind",
            True,
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(32, 32, 1), nn.BatchNorm2d(32)), "ONNX Runtime does", False),
        (lambda: nn.GroupNorm(4, 32), "a batch norm behind", True),
    ],
)
def test_norms_that_do_not_fold(block: Callable[[], nn.Module], why: str, retrain: bool) -> None:
    found = only(graph_of(network(nn.Conv2d(32, 32, 1), block(), conv(32, 32))), "P2-norm")
    assert why in found.rewrite
    assert found.needs_retraining == retrain
    assert found.bytes >= 2 * 32 * 1024 * 4


def test_ends() -> None:
    found = only(heavy_classifier(), "P3-ends")
    assert found.rewrite == "average over the 1024 positions before it: 32 -> 80, not 32768 -> 80"
    assert found.gain_bytes == pytest.approx(4 * 80 * (32768 - 32), rel=0.02)
    assert only(heavy_first(), "P3-ends", SLOW_COMPUTE).rewrite.startswith("stride 2: 75% fewer positions")
    net = network(*rows(lambda: conv(32, 32, 3)), last=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                  nn.Linear(32, 4096), nn.ReLU(), nn.Linear(4096, 800)))  # fmt: skip
    found = only(graph_of(net), "P3-ends")
    assert len(found.nodes) == 2
    assert "two layers 4096 ->" in found.rewrite


def test_peak() -> None:
    found = only(peaked(), "P4-peak")
    wide, narrow = 4 * 32 * 64 * 64, 4 * 32 * 32 * 32
    assert found.bytes == wide + narrow - 2 * narrow
    assert found.ms == 0, "without a cache bands save memory and no time"
    on_cache = only(peaked(), "P4-peak", SMALL_CACHE)
    assert on_cache.bytes == found.bytes
    # Of the two kernels that hold the wide tensor, each moves the bytes above at 40 GB/s instead of 4.
    assert on_cache.ms == pytest.approx(2 * found.bytes * (1 / 4 - 1 / 40) * 1e-6)
    assert only(peaked(), "P4-peak", SLOW_COMPUTE).ms == 0
    assert found.score == pytest.approx((wide + narrow) / (2 * narrow))
    assert found.module == "1.0"
    assert not found.needs_retraining


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "elu": F.elu, "selu": F.selu, "celu": F.celu, "mish": F.mish,
               "softplus": F.softplus, "threshold": lambda x: F.threshold(x, 0.1, 0.0)}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "group_norm": lambda x: F.group_norm(x, 4),
    "rms_norm": lambda x: F.rms_norm(x, (16,)),
    "glu": lambda x: F.glu(x, 1),
    "roll": lambda x: x.roll(2, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 5),
    "cdist": lambda x: torch.cdist(x, x),
    "cummax": lambda x: x.cummax(1)[0],
    "cumprod": lambda x: x.cumprod(1),
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True)[0],
    "lgamma": torch.lgamma,
    "linalg_cholesky": torch.linalg.cholesky,
    "linalg_inv": torch.linalg.inv,
    "linalg_svdvals": torch.linalg.svdvals,
    "median": lambda x: x.median(1, keepdim=True)[0],
    "special_erfinv": torch.special.erfinv,
}
FAST = ("silu", "mish", "group_norm", "adaptive_max_pool2d", "cdist")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in sorted(SLOW.keys() | UNSUPPORTED)],
)
def test_the_tables_are_what_the_exporter_and_the_runtime_do(kind: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), Call(FUNCTIONS[kind])).eval()
    x, path, optimised = torch.rand(1, 16, 16, 16), tmp_path / "net.onnx", tmp_path / "optimised.onnx"
    assert capture(net, (x,)).ops[1].kind == kind
    if kind in UNSUPPORTED:
        with pytest.raises(AerogelError, match="No ONNX function found"):
            export_onnx(net, (x,), path)
        return
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 4
    onnxruntime.InferenceSession(str(export_onnx(net, (x,), path).path), options, providers=["CPUExecutionProvider"])
    passing = {"Conv", "FusedConv", "ReorderInput", "ReorderOutput", "Shape", "Reshape", "Concat", "Slice"}
    kernels = [node.op_type for node in onnx.load(optimised).graph.node if node.op_type not in passing]
    counted = 0 if kind in ACTIVATIONS else 1
    assert len(kernels) + (kind == "roll") >= counted + SLOW[kind][0], kernels


def test_an_activation_that_runs_by_itself_is_not_counted_twice() -> None:
    absorbed = network(nn.Conv2d(32, 32, 1), nn.GELU(), conv(32, 32))
    alone = network(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.GELU(), nn.MaxPool2d(1), nn.GELU(), conv(32, 32))
    assert only(graph_of(absorbed), "P5-onnx").bytes == 2 * 32 * 1024 * 4
    found = {finding.rule: finding for finding in lint(graph_of(alone), SLOW_MEMORY)}
    assert found["G4"].what.startswith("1 activation")
    assert len(found["P5-onnx"].nodes) == 1


def test_a_formula_written_out() -> None:
    def late(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(torch.cos(x)))

    found = only(graph_of(network(conv(32, 32), Call(late), conv(32, 32))), "G4")
    assert found.what.startswith("3 other element-wise ops")
    assert found.gain_bytes == 2 * (2 * 32 * 1024 * 4)
    assert not found.needs_retraining


def test_onnx_runtime_adds_as_a_convolution_writes(tmp_path: Path) -> None:
    """What the note of G4 says."""
    import onnx
    import onnxruntime

    inner = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    net = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), Add(nn.Identity(), inner), nn.ReLU(), nn.Conv2d(16, 16, 1))
    path, optimised = tmp_path / "net.onnx", tmp_path / "optimised.onnx"
    export_onnx(net.eval(), (torch.rand(1, 16, 16, 16),), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = {node.op_type for node in onnx.load(optimised).graph.node}
    assert kernels <= {"Conv", "FusedConv", "ReorderInput", "ReorderOutput"}
