"""MODEL as a user types it, and the weights that go into it: what is wrong is named, nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.export import InputSpec, input_of, load_weights, open_model, save, split_source
from aerogel.graph import evaluating
from aerogel.imports import import_factory
from aerogel.nets.weights import LAYOUTS

OWN = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def fails():
    raise KeyError("weights.bin")

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run beside own_net.py; forget it afterwards. Nothing a file holds has run."""
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(OWN)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("aerogel_user") or name == "own_net":
            del sys.modules[name]
    assert not Path("exploded").exists()


def lenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nets.build("lenet5")


@torch.no_grad()
def answers(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with evaluating(net):
        return net(torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1)) if x is None else x)


# What the text may name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known", "args"),
    [
        ("lenet5", {}, {"num_classes": 10, "in_channels": 1, "input_size": 28}),
        (
            "lenet5",
            {"input_shape": (3, 32, 32), "num_classes": 7},
            {"num_classes": 7, "in_channels": 3, "input_size": 32},
        ),
        ("lenet5:num_classes=7", {"num_classes": 7}, {"num_classes": 7, "in_channels": 1, "input_size": 28}),
        ("lenet5:input_size=32,conv_relu=true", {}, {"input_size": 32, "conv_relu": True}),
        (
            "mobilenet_v2:width=0.125",
            {"input_shape": (3, 32, 32)},
            {"width": 0.125, "in_channels": 3, "input_size": 32},
        ),
    ],
)
def test_a_net_of_the_zoo(text: str, known: dict[str, Any], args: dict[str, Any]) -> None:
    opened = open_model(text, **known)
    assert opened.model.spec["net"] == text.partition(":")[0]
    assert args.items() <= opened.model.spec["args"].items()  # type: ignore[union-attr]
    assert (opened.factory, opened.trained, opened.input) == (None, False, None)


def test_a_net_without_those_arguments_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(*, units: int = 2) -> nn.Module:
        return nn.Linear(3, units)

    monkeypatch.setitem(nets.NETS, "tiny", tiny)
    opened = open_model("tiny:units=4", input_shape=(1, 8, 8), num_classes=10)
    assert opened.model.spec == {"net": "tiny", "args": {"units": 4}}
    with pytest.raises(AerogelError, match=r"^--input C,H,W is needed: nothing says which input Linear takes$"):
        input_of(opened.model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenet6", r"model 'lenet6' is no net and no folder; did you mean .*lenet5.*your own is file.py:factory"),
        ("runs/none", r"model 'runs/none' is no net and no folder; "),
        ("", r"model '' is no net and no folder; known: alexnet, "),
        ("mobilnet_v2:width=0.5", r"model 'mobilnet_v2:width=0.5' is no net and no folder; did you mean mobilenet_v2"),
        ("x" * 5000, r"is no net and no folder"),
        ("lenet5:width=2", r"lenet5 has no argument 'width'"),
        ("lenet5:", r"'' is not KEY=VALUE"),
        (
            "lenet5:input_size=100000000",
            r"^model 'lenet5:input_size=100000000' cannot be built: .*; give smaller numbers$",
        ),
        (
            "lenet5:num_classes=1000000000000000000",
            r"^model 'lenet5:num_classes=10+' cannot be built: .*; give smaller",
        ),
        ("lenet5:name=3", "^nets.build: lenet5 has no argument 'name'; known: conv_relu"),
        ("own_net.py:fails", r"^'own_net.py:fails' raised KeyError: 'weights.bin' at .*own_net.py:\d+; mend it there$"),
        ("own_net.py:biuld", r"own_net.py has no 'biuld', got 'own_net.py:biuld'; did you mean build"),
        ("elsewhere.py:build", r"no file elsewhere.py, got 'elsewhere.py:build'"),
        ("os:getcwd", r"^os:getcwd must return a torch.nn.Module, got str$"),
    ],
)
def test_a_text_that_names_nothing_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message) as caught:
        open_model(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenet5:num_classes=3", r"num_classes must be 10 for this data, got 3; leave it out"),
        ("lenet5:input_size=32", r"input_size must be 28 for this data, got 32; leave it out"),
        ("lenet5:in_channels=3", r"in_channels must be 1 for this data, got 3; leave it out"),
    ],
)
def test_arguments_that_contradict_the_data_are_refused(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=f"^model '{text}': {message}$"):
        open_model(text, input_shape=(1, 28, 28), num_classes=10)


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(
        AerogelError, match=r"^model 'lenet5' reads square images, the data's are 28 x 30; pass --input C,S,S$"
    ):
        open_model("lenet5", input_shape=(1, 28, 30))


@pytest.mark.parametrize("text", ["own_net.py:build", "own_net:build"])
def test_a_users_own_factory(text: str) -> None:
    opened = open_model(text, input_shape=(1, 28, 30), num_classes=3)
    assert [type(module) for module in opened.model] == [nn.Flatten, nn.Linear]  # type: ignore[arg-type]
    assert (opened.factory, opened.trained, opened.input) == (text, False, None)
    with pytest.raises(AerogelError, match=r"^--input C,H,W is needed"):
        input_of(opened.model)


def test_the_seed_decides_the_weights() -> None:
    for text in ("lenet5", "own_net.py:build"):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(answers(open_model(text).model))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_a_saved_folder_or_the_run_that_holds_one() -> None:
    net, spec = lenet(), InputSpec(shape=(1, 28, 28), mean=(0.1,), std=(0.3,))
    save(net, "run/model", input=spec)
    for text in ("run/model", "run", "./run/", str(Path("run").resolve())):
        opened = open_model(text)
        assert torch.equal(answers(opened.model), answers(net))
        assert (opened.factory, opened.trained, opened.input) == (None, True, spec)
        assert input_of(opened.model, opened.input) == input_of(opened.model) == (1, 28, 28)
    Path("link").symlink_to("run/model")
    assert open_model("link").trained


def test_a_folder_without_a_model_is_named() -> None:
    Path("empty").mkdir()
    with pytest.raises(AerogelError, match=r"^cannot read empty/config.json: No such file or directory$"):
        open_model("empty")


def test_the_name_of_a_net_means_the_net() -> None:
    save(nets.build("lenet_300_100"), "lenet5")
    assert open_model("lenet5").model.spec["net"] == "lenet5"
    assert open_model("./lenet5").model.spec["net"] == "lenet_300_100"


def test_a_saved_factory_runs_only_with_trust() -> None:
    net = import_factory("own_net.py:build")()
    save(net, "a", factory="own_net.py:build")
    config = json.loads(Path("a/config.json").read_text())
    Path("canary.py").write_text("import os; os.system('touch exploded')")
    Path("a/config.json").write_text(json.dumps(config | {"factory": "canary.py:build"}))
    with pytest.raises(
        AerogelError, match=r"^load: a was built by 'canary.py:build', which is code; pass that factory, or"
    ):
        open_model("a")
    Path("a/config.json").write_text(json.dumps(config))
    opened = open_model("a", trust=True)
    assert opened.factory == "own_net.py:build"
    assert torch.equal(answers(opened.model), answers(net))


@pytest.mark.parametrize("text", ["lenet5", "saved"])
def test_weights_make_it_trained(text: str) -> None:
    save(lenet(), "saved")
    torch.save(lenet(1).state_dict(), "w.pt")
    opened = open_model(text, weights="w.pt")
    assert opened.trained
    assert torch.equal(answers(opened.model), answers(lenet(1)))


# Weights for a network that is there already --------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "w.safetensors", "w.pt", "w.pth"])
def test_weights_come_from_a_folder_or_a_file(source: str) -> None:
    net, other = lenet(), lenet(1)
    if source == "folder":
        save(net, "folder")
    elif source == "w.safetensors":
        safetensors.torch.save_file(net.state_dict(), source)
    else:
        torch.save(net.state_dict(), source)
    assert load_weights(other, source) is other
    assert torch.equal(answers(other), answers(net))
    assert other.training


def test_tied_weights_may_have_either_name() -> None:
    net, x = import_factory("own_net.py:Tied")(), torch.randn(3, 8)
    torch.save(net.state_dict(), "both.pt")
    torch.save({name: t for name, t in net.state_dict().items() if name != "a.weight"}, "second.pt")
    for file in ("both.pt", "second.pt"):
        again = load_weights(import_factory("own_net.py:Tied")(), file)
        assert again.a.weight is again.b.weight
        assert torch.equal(answers(again, x), answers(net, x))
    torch.save(net.state_dict() | {"b.weight": torch.zeros(8, 8)}, "parted.pt")
    with pytest.raises(
        AerogelError, match=r"'a.weight' and 'b.weight' are one tensor in the network, and differ in the file"
    ):
        load_weights(net, "parted.pt")


def test_number_types_become_the_models() -> None:
    torch.save(lenet().half().state_dict(), "half.pt")
    net = load_weights(lenet(1), "half.pt")
    assert {t.dtype for t in net.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(answers(net), answers(lenet()), rtol=0, atol=1e-2)


def test_frozen_weights_stay_frozen() -> None:
    torch.save(lenet().state_dict(), "w.pt")
    net = load_weights(lenet().requires_grad_(False), "w.pt")
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("features.conv1.bias"), r"the network needs features.conv1.bias \(20,\), which is missing"),
        (lambda w: w.update(more=torch.zeros(1)), "'more' is left over, the network lacks it; is it another network's"),
        (
            lambda w: w.update({"features.conv1.bias": torch.zeros(19)}),
            r"features.conv1.bias has shape \(19,\), the network needs \(20,\)",
        ),
        (lambda w: w.update({"features.conv1.bias": torch.zeros(20).bool()}), "features.conv1.bias holds torch.bool"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_that_do_not_fit_are_named_and_change_nothing(
    name: str, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    net = lenet()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    held = dict(lenet(1).state_dict())
    change(held)
    (torch.save if name == "w.pt" else safetensors.torch.save_file)(held, name)
    with pytest.raises(AerogelError, match=f"^--weights {name}: {message}"):
        load_weights(net, name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    "held", [{"state_dict": {}, "epoch": 3}, [torch.zeros(1)], {3: torch.zeros(1)}, torch.zeros(1)]
)
def test_what_is_not_a_state_dict_is_refused(held: object) -> None:
    torch.save(held, "w.pt")
    with pytest.raises(AerogelError, match=r"^w.pt is not a state_dict of tensors; save model.state_dict"):
        load_weights(lenet(), "w.pt")


def test_weights_that_are_not_there() -> None:
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(AerogelError, match=f"^cannot read {name}: no such file"):
            load_weights(lenet(), name)
    Path("empty").mkdir()
    with pytest.raises(AerogelError, match=r"^cannot read empty/config.json: No such file"):
        load_weights(lenet(), "empty")


def test_weights_of_a_damaged_folder_are_refused() -> None:
    save(lenet(), "saved")
    path = Path("saved/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(AerogelError, match=r"saved/model.safetensors does not match the sha256 in config.json"):
        load_weights(lenet(), "saved")


# What a weights file holds is never run -------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes the file `exploded`."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


BOMBS: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "dict": lambda path: path.write_bytes(pickle.dumps({"weight": Bomb()})),
    "zip": lambda path: torch.save({"weight": Bomb()}, path),
    "legacy": lambda path: torch.save({"weight": Bomb()}, path, _use_new_zipfile_serialization=False),
    "module": lambda path: torch.save(lenet(), path),
    "broken": lambda path: path.write_bytes(pickle.dumps(Bomb()) + b"\x80\x02K\x01 and more"),
    "text": lambda path: path.write_text("weights"),
    "nothing": lambda path: path.touch(),
}


def test_the_bomb_works() -> None:
    pickle.loads(pickle.dumps(Bomb()))
    Path("exploded").unlink()


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors", "w.bin"])
def test_hostile_weights_are_refused(kind: str, name: str) -> None:
    BOMBS[kind](Path(name))
    with pytest.raises(AerogelError, match=rf"^cannot read {name}: [^\n]*$"):
        load_weights(lenet(), name)


def timms(net: nn.Module, source: str) -> dict[str, Tensor]:
    """A net's weights under another library's names."""
    names = LAYOUTS[net.spec["net"]][source].rename(list(net.state_dict()))
    return {names[key]: tensor.clone() for key, tensor in net.state_dict().items()}


def test_another_librarys_checkpoint_brings_its_preprocessing(tmp_path: Path) -> None:
    text = "mobilenet_v3_small:width=0.25,input_size=64,num_classes=3,padding=same"
    theirs = open_model(text).model
    safetensors.torch.save_file(timms(theirs, "timm_tf"), tmp_path / "tf.safetensors")
    torch.save(timms(theirs, "timm_tf"), tmp_path / "tf.pth")
    for file in ("tf.safetensors", "tf.pth"):
        opened = open_model(text, weights=f"timm_tf:{tmp_path / file}")
        assert opened.trained
        assert opened.input == InputSpec(shape=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(answers(opened.model, x), answers(theirs, x))
    config = json.loads((save(opened.model, tmp_path / "saved") / "config.json").read_text())
    assert config["input"] == {"shape": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}


MOBILE = "mobilenet_v2:width=0.25,input_size=64,num_classes=3"
READ = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("source", "beside", "mean"),
    [
        ("timm", {"architecture": "mobilenetv2_100", "pretrained_cfg": READ}, (0.4, 0.5, 0.6)),
        ("timm", {"pretrained_cfg": READ}, (0.4, 0.5, 0.6)),
        ("timm", {"pretrained_cfg": {"std": [1, 1, 1]}}, (0.485, 0.456, 0.406)),
        ("timm", {"format": 1, "net": "lenet5"}, (0.485, 0.456, 0.406)),
        ("timm", [], (0.485, 0.456, 0.406)),
        ("torchvision", {"pretrained_cfg": READ}, (0.485, 0.456, 0.406)),
    ],
)
def test_the_config_beside_timms_weights_says_what_they_read(source: str, beside: Any, mean: tuple[float, ...]) -> None:
    safetensors.torch.save_file(timms(open_model(MOBILE).model, source), "model.safetensors")
    Path("config.json").write_text(json.dumps(beside))
    opened = open_model(MOBILE, weights=f"{source}:model.safetensors")
    assert opened.input is not None
    assert (opened.input.shape, opened.input.mean) == ((3, 64, 64), mean)


@pytest.mark.parametrize(
    ("source", "beside", "message"),
    [
        ("timm", {"architecture": "tf_mobilenetv3_small_100", "pretrained_cfg": READ}, r"write timm_tf:model\.safe"),
        ("timm_tf", {"architecture": "mobilenetv3_small_100", "pretrained_cfg": READ}, r"write timm:model\.safe"),
        ("timm", {"pretrained_cfg": {"mean": [0.5]}}, "load_weights: mean must be three numbers"),
        ("timm", {"pretrained_cfg": {"std": "none"}}, "load_weights: std must be three numbers > 0"),
    ],
)
def test_a_config_beside_timms_weights_that_speaks_of_others_is_refused(source: str, beside: Any, message: str) -> None:
    text = f"mobilenet_v3_small:width=0.25,num_classes=3,padding={'same' if source == 'timm_tf' else 'symmetric'}"
    safetensors.torch.save_file(timms(open_model(text).model, source), "model.safetensors")
    Path("config.json").write_text(json.dumps(beside))
    with pytest.raises(AerogelError, match=message):
        open_model(text, weights=f"{source}:model.safetensors")


def test_a_file_that_tells_how_it_was_trained_holds_its_weights_under_state_dict() -> None:
    held = timms(open_model(MOBILE).model, "timm")
    torch.save({"state_dict": held, "epoch": 3}, "train.pth")
    opened = open_model(MOBILE, weights="timm:train.pth")
    assert torch.equal(opened.model.state_dict()["features.stem.conv.weight"], held["conv_stem.weight"])
    with pytest.raises(AerogelError, match=r"train\.pth is not a state_dict of tensors"):
        open_model(MOBILE, weights="train.pth")
    Path("bad.pth").write_bytes(pickle.dumps({"state_dict": Path}))
    with pytest.raises(AerogelError, match=r"cannot read bad\.pth"):
        open_model(MOBILE, weights="timm:bad.pth")


@pytest.mark.parametrize("name", ["keras:model.pt", "keras:folder/model.pt", "tim:model.pt", "timm_ft:/x/model.pt"])
def test_an_unknown_source_is_named_with_the_known_ones(name: str) -> None:
    word = name.partition(":")[0]
    message = rf"--weights {name}: '{word}' is no source, .*sources: megvii, timm, timm_tf, torchvision"
    with pytest.raises(AerogelError, match=message):
        open_model("lenet5", weights=name)
    with pytest.raises(AerogelError, match=message):
        split_source(name)


def test_a_source_without_a_file_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"--weights timm: names no file; write timm:model\.safetensors"):
        open_model("lenet5", weights="timm:")


@pytest.mark.parametrize(
    "name", ["keras:model.pt", "./timm:model.pt", "run:3/model.pt", "a b:c.pt", "2026-01-01T10:00.pt"]
)
def test_a_file_whose_name_has_a_colon_is_a_file(name: str) -> None:
    net = lenet(1)
    Path(name).parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), name)
    opened = open_model("lenet5:in_channels=1,input_size=28,num_classes=10", weights=name)
    assert torch.equal(next(opened.model.parameters()), next(net.parameters()))


@pytest.mark.parametrize("name", [r"C:\models\w.pt", "D:w.safetensors", "./keras:model.pt", "/data/x:y.pt"])
def test_a_drive_or_a_folder_before_the_colon_is_no_source(name: str) -> None:
    assert split_source(name) == (None, name)
