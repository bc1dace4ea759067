"""A cut network is as good as any: it trains, exports, runs in ONNX Runtime, compiles, is saved and loaded."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from strategies import randomise
from torch import Tensor, nn

from aerogel import nets
from aerogel.cost import count
from aerogel.export import load, save
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import check_parity
from aerogel.graph import capture, evaluating
from aerogel.prune import Cut, cut

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# The user's own networks, in a file as they are for the user: a residual one with squeeze-and-excite, and one of
# Hugging Face.
USERS = """
from torch import nn
from transformers import ViTConfig, ViTForImageClassification


class Excited(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        self.squeeze = nn.Sequential(nn.Conv2d(inner, 6, 1), nn.ReLU(), nn.Conv2d(6, inner, 1), nn.Sigmoid())
        self.back = nn.Sequential(nn.Conv2d(inner, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.body(x)
        return x + self.back(y * self.squeeze(y.mean((2, 3), keepdim=True)))


def build_excited():
    stem = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, Excited(16, 32), Excited(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 10))


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        self.net = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))

    def forward(self, x):
        return self.net(x).logits


def build_vit():
    return Logits()
"""

ZOO = {
    "lenet5": {"in_channels": 3, "input_size": 32},
    "mobilenet_v3_small": {"width": 0.25, "input_size": 32, "num_classes": 10},
}
NETWORKS = ["lenet5", "excited", "vit", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)]
FACTORIES = {"excited": "users.py:build_excited", "vit": "users.py:build_vit"}


class Cuts:
    """Each network cut to half of its channels, once. `folder` holds the user's file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, Cut]()
        (folder / "users.py").write_text(USERS)

    def build(self, name: str) -> nn.Module:
        if name in ZOO:
            return nets.build(name, **ZOO[name])
        names: dict[str, Any] = {"__name__": "users"}
        exec(compile(USERS, str(self.folder / "users.py"), "exec"), names)
        return names[f"build_{name}"]()

    def __getitem__(self, name: str) -> Cut:
        if name not in self.made:
            torch.manual_seed(0)
            net = self.build(name)
            randomise(net)
            self.made[name] = made = cut(net, (X,), target={"channels": 0.5}, criterion="random")
            assert made.after.params < 0.9 * made.before.params
        return self.made[name]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Cuts:
    return Cuts(tmp_path_factory.mktemp("after_cut"))


def fresh(cuts: Cuts, name: str) -> nn.Module:
    """A copy that a test may change."""
    return copy.deepcopy(cuts[name].model)


@torch.no_grad()
def answers(net: nn.Module) -> Tensor:
    with evaluating(net):
        return net(X)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains(cuts: Cuts, name: str) -> None:
    net = fresh(cuts, name).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(net(X), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = [not torch.equal(t, before[n]) for n, t in net.state_dict().items() if t.is_floating_point()]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_can_be_exported_by_pytorch(cuts: Cuts, name: str) -> None:
    net = cuts[name].model.eval()
    program = torch.export.export(net, (X,))
    with torch.no_grad():
        assert close(net(X), program.module()(X))
    assert cuts[name].after == count(capture(net, (X,)))


@pytest.mark.parametrize("name", NETWORKS)
def test_its_onnx_file_computes_the_same(cuts: Cuts, name: str, tmp_path: Path) -> None:
    net = cuts[name].model
    exported = export_onnx(net, (X,), tmp_path / "model.onnx")
    assert exported.bytes < 4 * cuts[name].after.params * 1.6 + 400_000
    parity = check_parity(net, exported.path, X)
    assert parity.ok, parity
    assert answers(net).std(0).max() > 1e-3, "the answers depend on the image"


@pytest.mark.parametrize("name", NETWORKS)
def test_it_can_be_cut_again(cuts: Cuts, name: str) -> None:
    again = cut(cuts[name].model, (X,), target={"channels": 0.6}, criterion="random")
    assert again.after.params < cuts[name].after.params
    assert again.before == cuts[name].after


FRESH_PROCESS = """
import sys, aerogel, safetensors.torch, torch
torch.set_num_threads(1)
x = safetensors.torch.load_file("x.safetensors")["x"]
with torch.no_grad():
    found = {name: aerogel.load(name, trust=True)(x) for name in sys.argv[1:]}
safetensors.torch.save_file(found, "found.safetensors")
"""


def test_they_come_back_in_a_fresh_process(cuts: Cuts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cuts.folder)
    saved = ["lenet5", *FACTORIES]
    for name in saved:
        save(cuts[name].model, name, factory=FACTORIES.get(name))
    safetensors.torch.save_file({"x": X}, "x.safetensors")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, *saved], check=True, timeout=120)
    found = safetensors.torch.load_file("found.safetensors")
    for name in saved:
        assert torch.equal(found[name], answers(cuts[name].model)), name
    again = load("vit", factory=lambda: cuts.build("vit"))
    assert count(capture(again, (X,))) == cuts["vit"].after


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_compiles(cuts: Cuts, name: str) -> None:
    net = fresh(cuts, name).eval()
    compiled = torch.compile(net)
    with torch.no_grad():
        assert close(net(X), compiled(X))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_it_trains_compiled(cuts: Cuts) -> None:
    net = fresh(cuts, "excited").train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(net)
    for model in (torch.compile(net), alone):
        nn.functional.cross_entropy(model(X), torch.arange(4)).backward()
    expected, got = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (alone, net))
    assert close(expected, got)
