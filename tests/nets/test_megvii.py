"""megvii's checkpoints in our nets, against the authors' networks written once more as functions of a state dict.

Facts from megvii-model/ShuffleNet-Series: names of the weights; V1 shuffles by the inverse permutation after the
depthwise; V2 splits even and odd channels at a unit's start; both read B, G, R and have no bias in the linear layer.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aerogel as ag
from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.export import open_model
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import run_onnx

State = dict[str, Tensor]
STEMS = {(3, 0.5): 12, (3, 1.0): 24, (3, 1.5): 24, (3, 2.0): 48, (8, 0.5): 16, (8, 1.0): 24, (8, 1.5): 24, (8, 2.0): 48}
V2_STAGE2 = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}
UNITS = (4, 8, 4)
CLASSES = 7


class Reference:
    """Builds the weights as it walks: every layer has a name and draws its values from that name."""

    def __init__(self) -> None:
        self.state: State = {}

    def conv(self, x: Tensor, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self._draw(f"{name}.weight", (out, x.shape[1] // groups, kernel, kernel))
        return F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, shift, mean, var = (
            self._draw(f"{name}.{leaf}", (x.shape[1],)) for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(0)
        return F.batch_norm(x, mean, var, scale, shift, False, 0.0, 1e-5)

    def linear(self, x: Tensor, name: str, out: int) -> Tensor:
        return x @ self._draw(f"{name}.weight", (out, x.shape[1])).T

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("var") or (len(shape) == 1 and name.endswith("weight")):
            values = torch.rand(shape, generator=generator) + 0.5
        else:
            fan = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 25
            values = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        self.state[name] = values
        return values

    def stem(self, x: Tensor, channels: int) -> Tensor:
        x = F.relu(self.norm(self.conv(x, "first_conv.0", channels, 3, 2), "first_conv.1"))
        return F.max_pool2d(x, 3, 2, 1)


def shufflenet_v1(bgr: Tensor, groups: int, width: float) -> tuple[Tensor, State]:
    net = Reference()
    x, unit = net.stem(bgr, STEMS[groups, width]), 0
    out = int({1: 144, 3: 240, 8: 384}[groups] * width)
    for stage, units in enumerate(UNITS):
        for index in range(units):
            path, first = f"features.{unit}", stage == index == 0
            strided, middle, before = index == 0, out // 4, x.shape[1]
            y = net.conv(x, f"{path}.branch_main_1.0", middle, 1, groups=1 if first else groups)
            y = F.relu(net.norm(y, f"{path}.branch_main_1.1"))
            y = net.conv(y, f"{path}.branch_main_1.3", middle, 3, 2 if strided else 1, groups=middle)
            y = net.norm(y, f"{path}.branch_main_1.4")
            if groups > 1:
                y = torch.cat([y[:, i::groups] for i in range(groups)], dim=1)  # every groups-th channel: the inverse
            y = net.conv(y, f"{path}.branch_main_2.0", out - before if strided else out, 1, groups=groups)
            y = net.norm(y, f"{path}.branch_main_2.1")
            x = torch.cat((F.avg_pool2d(x, 3, 2, 1), F.relu(y)), dim=1) if strided else F.relu(x + y)
            unit += 1
        out *= 2
    return net.linear(x.mean((2, 3)), "classifier.0", CLASSES), net.state


def shufflenet_v2(bgr: Tensor, width: float) -> tuple[Tensor, State]:
    net = Reference()
    x, unit, out = net.stem(bgr, 24), 0, V2_STAGE2[width]
    for units in UNITS:
        for index in range(units):
            path, strided = f"features.{unit}", index == 0
            kept, taken = (x, x) if strided else (x[:, ::2], x[:, 1::2])
            before, stride = taken.shape[1], 2 if strided else 1
            if strided:
                kept = net.norm(net.conv(kept, f"{path}.branch_proj.0", before, 3, 2, before), f"{path}.branch_proj.1")
                kept = F.relu(net.norm(net.conv(kept, f"{path}.branch_proj.2", before, 1), f"{path}.branch_proj.3"))
            y = F.relu(net.norm(net.conv(taken, f"{path}.branch_main.0", out // 2, 1), f"{path}.branch_main.1"))
            y = net.norm(net.conv(y, f"{path}.branch_main.3", out // 2, 3, stride, out // 2), f"{path}.branch_main.4")
            y = F.relu(net.norm(net.conv(y, f"{path}.branch_main.5", out - before, 1), f"{path}.branch_main.6"))
            x = torch.cat((kept, y), dim=1)
            unit += 1
        out *= 2
    x = F.relu(net.norm(net.conv(x, "conv_last.0", 2048 if width == 2 else 1024, 1), "conv_last.1"))
    return net.linear(x.mean((2, 3)), "classifier.0", CLASSES), net.state


def check_same(name: str, arguments: dict[str, Any], theirs: Tensor, state: State, rgb: Tensor) -> None:
    net = nets.load_weights(nets.build(name, num_classes=CLASSES, **arguments), state, "megvii").eval()
    with torch.no_grad():
        ours = net(rgb)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert net.preprocessing == {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


@pytest.fixture
def rgb() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("groups", "width"), STEMS)
def test_shufflenet_v1_answers_as_megviis(groups: int, width: float, rgb: Tensor) -> None:
    theirs, state = shufflenet_v1(rgb.flip(1), groups, width)
    check_same("shufflenet_v1", {"groups": groups, "width": width, "shuffle": "inverse"}, theirs, state, rgb)


@pytest.mark.parametrize("shuffle", [True, False, "inverse"])
def test_without_groups_nothing_is_shuffled_and_any_net_will_do(
    shuffle: bool | str, rgb: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEMS, (1, 0.5), 12)
    theirs, state = shufflenet_v1(rgb.flip(1), 1, 0.5)
    check_same("shufflenet_v1", {"groups": 1, "width": 0.5, "shuffle": shuffle}, theirs, state, rgb)


@pytest.mark.parametrize("width", V2_STAGE2)
def test_shufflenet_v2_answers_as_megviis(width: float, rgb: Tensor) -> None:
    theirs, state = shufflenet_v2(rgb.flip(1), width)
    check_same("shufflenet_v2", {"width": width, "wiring": "even_odd"}, theirs, state, rgb)


def test_a_net_with_the_papers_wiring_is_refused(rgb: Tensor) -> None:
    _, state = shufflenet_v1(rgb, 3, 0.5)
    with pytest.raises(AerogelError, match=r"needs shuffle='inverse', the net has True.*shufflenet_v1:shuffle=inverse"):
        nets.load_weights(nets.build("shufflenet_v1", width=0.5, num_classes=CLASSES), state, "megvii")
    _, state = shufflenet_v2(rgb, 0.5)
    with pytest.raises(AerogelError, match="needs wiring='even_odd', the net has 'halves'"):
        nets.load_weights(nets.build("shufflenet_v2", width=0.5, num_classes=CLASSES), state, "megvii")


def test_a_file_as_megviis_training_writes_it(rgb: Tensor, tmp_path: Path) -> None:
    """{"state_dict": ...} with DataParallel's prefix, in PyTorch's old format, called .pth.tar."""
    theirs, state = shufflenet_v2(rgb.flip(1), 0.5)
    file = tmp_path / "checkpoint-latest.pth.tar"
    held = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 3}
    torch.save(held, file, _use_new_zipfile_serialization=False)
    opened = open_model(f"shufflenet_v2:width=0.5,num_classes={CLASSES},wiring=even_odd", weights=f"megvii:{file}")
    with torch.no_grad():
        assert (opened.model.eval()(rgb) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert opened.input is not None
    assert opened.input.std == (1 / 255,) * 3


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("shufflenet_v1", {"shuffle": "inverse"}),
    ("shufflenet_v2", {"wiring": "even_odd"}),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_such_a_net_is_counted_cut_saved_and_exported(
    name: str, way: dict[str, Any], rgb: Tensor, tmp_path: Path
) -> None:
    state = (shufflenet_v1(rgb, 3, 0.5) if name == "shufflenet_v1" else shufflenet_v2(rgb, 0.5))[1]
    net = nets.build(name, width=0.5, num_classes=CLASSES, input_size=64, **way)
    plain = nets.build(name, width=0.5, num_classes=CLASSES, input_size=64)
    costs = [ag.cost.count(ag.capture(one, (rgb,))) for one in (net, plain)]
    assert costs[0].macs == costs[1].macs
    assert not costs[0].uncounted
    found = ag.prune.cut(nets.load_weights(net, state, "megvii").eval(), (rgb,), target={"macs": 0.6})
    assert found.max_error <= 1e-4
    saved = ag.load(ag.save(found.model, tmp_path / "saved"))
    file = export_onnx(found.model, (rgb,), tmp_path / "model.onnx").path
    with torch.no_grad():
        answers = found.model(rgb)
        assert torch.equal(saved(rgb), answers)
    torch.testing.assert_close(
        torch.from_numpy(run_onnx(file, rgb.numpy())), answers, rtol=1e-4, atol=1e-4 * float(answers.abs().max())
    )
    read = ag.export.read_config(tmp_path / "saved").input
    assert read is not None
    assert (read.shape, read.mean, read.std) == ((3, 64, 64), (0.0,) * 3, (1 / 255,) * 3)
