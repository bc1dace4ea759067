"""Saved folders: what is saved comes back bit for bit in a fresh process; what is wrong is named; nothing runs."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import pickle
import random
import struct
import subprocess
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
from aerogel.export import InputSpec, load, read_config, save
from aerogel.graph import evaluating
from aerogel.imports import import_factory
from aerogel.prune import cut

CUT = ("lenet5", "resnet20", "mobilenet_v2")
CONV = "features.conv1.weight"  # of lenet5: (20, 1, 5, 5)


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder; forget the users' modules and search paths of the test afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("aerogel_user", "canary")):
            del sys.modules[name]


NARROW = {"num_classes": 10, "in_channels": 1, "input_size": 28, "width": 0.125, "growth": 4, "widths": "16-16"}


def small(name: str, seed: int = 0) -> nn.Module:
    """The net for 10 classes and 28 x 28 grey images, narrow where it can be, with statistics in its norms."""
    torch.manual_seed(seed)
    options = inspect.signature(nets.NETS[name]).parameters
    net = nets.build(name, **{key: NARROW[key] for key in NARROW if key in options})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answers(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with evaluating(net):
        return net(images() if x is None else x)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def cuts() -> dict[str, nn.Module]:
    """Networks with channels cut away."""
    return {name: cut(small(name), (images(1),), target={"channels": 0.6}).model for name in CUT}


FRESH_PROCESS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("aerogel.prune", "aerogel.train", "aerogel.compress", "aerogel.distill")):
            raise ImportError("a saved model needs no " + name)
sys.meta_path.insert(0, Refuse())
import aerogel, pathlib, safetensors.torch, torch
torch.set_num_threads(1)
x = safetensors.torch.load_file("x.safetensors")["x"]
with torch.no_grad():
    found = {path.name: aerogel.load(path)(x) for path in pathlib.Path("saved").iterdir()}
safetensors.torch.save_file(found, "found.safetensors")
"""


def test_every_net_and_every_cut_one_comes_back_in_a_fresh_process(cuts: dict[str, nn.Module]) -> None:
    expected = {}
    for name, net in ({name: small(name) for name in nets.NETS} | {f"{name} cut": cuts[name] for name in CUT}).items():
        assert save(net, f"saved/{name}") == Path(f"saved/{name}")
        assert names(Path(f"saved/{name}")) == ["config.json", "model.safetensors"]
        expected[name] = answers(net)
    safetensors.torch.save_file({"x": images()}, "x.safetensors")
    subprocess.run([sys.executable, "-c", FRESH_PROCESS], check=True)
    found = safetensors.torch.load_file("found.safetensors")
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), name


def test_what_is_known_of_it_comes_back() -> None:
    net = small("lenet5")
    spec = InputSpec(shape=(1, 28, 28), mean=(0.1,), std=(0.3,))
    save(net, "a", input=spec, classes=("zero", "one"), metrics={"accuracy": {"value": 98.5}, "data": "digits"})
    config = read_config("a")
    assert (config.net, config.args, config.factory, config.shapes) == ("lenet5", net.spec["args"], None, {})
    assert (config.input, config.classes) == (spec, ["zero", "one"])
    assert config.metrics == {"accuracy": {"value": 98.5}, "data": "digits"}
    assert config.format == 1
    assert config.sha256 == hashlib.sha256(Path("a/model.safetensors").read_bytes()).hexdigest()


def test_one_mean_stands_for_all_channels() -> None:
    spec = InputSpec(shape=(3, 8, 8), mean=(0.5,))
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    assert InputSpec(shape=(3, 8, 8), mean=(1, 2, 3), std=(4, 5, 6)).std == (4, 5, 6)


def test_a_loaded_network_is_ready_to_use_train_cut_and_save_again(cuts: dict[str, nn.Module]) -> None:
    net = cuts["lenet5"]
    save(net, "a")
    again = load("a")
    assert not again.training
    assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in again.parameters())
    changed = read_config("a").shapes
    assert {name: list(t.shape) for name, t in again.state_dict().items() if name in changed} == changed != {}
    again.train()(images()).sum().backward()
    smaller = cut(again, (images(1),), target={"channels": 0.8}).model
    save(smaller, "b")
    assert torch.equal(answers(load("b")), answers(smaller))


def test_a_loaded_network_does_not_hang_on_the_file() -> None:
    save(small("lenet5"), "a")
    net = load("a")
    expected = answers(net)
    size = os.path.getsize("a/model.safetensors")
    with open("a/model.safetensors", "r+b") as file:  # in place, as `cp` writes
        file.seek(size // 2)
        file.write(bytes(size // 2))
    assert torch.equal(answers(net), expected)


def test_saving_and_loading_draw_no_random_numbers() -> None:
    Path("own.py").write_text(FACTORY)
    net = small("lenet5")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    save(net, "a")
    load("a")
    save(own_net(), "b", factory="own.py:build")
    load("b", trust=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_and_channels_last_come_back() -> None:
    save(small("lenet5").half(), "half")
    assert {t.dtype for t in load("half").state_dict().values()} == {torch.float16}
    net = small("lenet5").to(memory_format=torch.channels_last)
    save(net, "last")
    assert torch.equal(answers(load("last")), answers(small("lenet5")))


# The user's own network -----------------------------------------------------------------------------------------

FACTORY = """
from pathlib import Path
import torch
from torch import nn

Path("imported").write_text("")

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.Linear(6, 10))

def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 6, bias=False), nn.Linear(6, 10))

def relu():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.Sequential(), nn.Linear(6, 10))

def fails():
    raise KeyError("weights.bin")

def text():
    return "a network"
"""


def own_net() -> nn.Module:
    state = torch.get_rng_state()
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.Linear(6, 10))
    torch.set_rng_state(state)
    return net


@pytest.fixture
def own() -> nn.Module:
    """The user's network, saved as "mine"; their file has not been imported since."""
    Path("own.py").write_text(FACTORY)
    net = own_net()
    save(net, "mine", factory="own.py:build")
    Path("imported").unlink()
    os.utime("own.py", ns=(1, 1))  # a version that no one has imported yet
    return net


def test_a_users_network_needs_their_factory_or_trust(own: nn.Module) -> None:
    with pytest.raises(
        AerogelError, match=r"^load: mine was built by 'own.py:build', which is code; pass that factory, or"
    ):
        load("mine")
    assert not Path("imported").exists()
    assert torch.equal(answers(load("mine", factory=own_net)), answers(own))
    assert not Path("imported").exists()
    assert torch.equal(answers(load("mine", trust=True)), answers(own))
    assert Path("imported").exists()


def test_a_users_cut_network_comes_back(own: nn.Module) -> None:
    smaller = cut(own, (images(1),), target={"channels": 0.5}).model
    save(smaller, "smaller", factory="own.py:build")
    assert read_config("smaller").shapes
    again = load("smaller", trust=True)
    assert again[1].out_features == again[2].in_features == 3  # type: ignore[index]
    assert torch.equal(answers(again), answers(smaller))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("own.py:fails", r"save: 'own.py:fails' raised KeyError: 'weights.bin' at .*own.py:\d+; mend it there"),
        ("own.py:text", "save: own.py:text must return a torch.nn.Module, got str"),
        ("own.py:other", "save: own.py:other builds another network than this one: they differ in 1.bias"),
        ("own.py:relu", "save: own.py:relu builds another network than this one: they differ in 2.bias"),
        ("own.py:biuld", r"own.py has no 'biuld', got 'own.py:biuld'; did you mean build"),
        ("own.py", "spec must be package.module:name or path/file.py:name, got 'own.py'"),
        ("", "spec must be package.module:name or path/file.py:name, got ''"),
    ],
)
def test_a_factory_that_does_not_build_it_is_refused_when_saving(factory: str, message: str) -> None:
    Path("own.py").write_text(FACTORY)
    with pytest.raises(AerogelError, match=message):
        save(own_net(), "a", factory=factory)
    assert not Path("a").exists()


def test_a_factory_that_builds_another_is_refused_when_loading(own: nn.Module) -> None:
    with pytest.raises(
        AerogelError, match=r"load: mine/model.safetensors: 1.weight has shape \(6, 784\), the network needs \(9,"
    ):
        load("mine", factory=lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.Linear(9, 10)))
    with pytest.raises(AerogelError, match=r"load: mine/config.json: 'own.py:build' raised ZeroDivisionError"):
        load("mine", factory=lambda: 1 / 0)  # type: ignore[arg-type, return-value]


def test_nothing_says_how_to_build_it() -> None:
    net = own_net()
    with pytest.raises(
        AerogelError, match=r"save: nothing says how to build Sequential again; pass factory='file.py:function'"
    ):
        save(net, "a")
    net.spec = {"name": "an attribute of the user's own"}  # type: ignore[assignment]
    with pytest.raises(AerogelError, match=r"save: nothing says how to build Sequential again"):
        save(net, "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net.features, "pool1", nn.AvgPool2d(2)), r"features.pool1 is AvgPool2d\(.* as MaxPool2d"),
        (
            lambda net: setattr(net.features.conv1, "padding", (1, 1)),
            r"features.conv1 is .*padding=\(1, 1\)\), built as",
        ),
        (lambda net: net.add_module("more", nn.Sequential()), "more is Sequential.*built as None"),
    ],
)
def test_a_net_changed_by_hand_is_not_saved_as_what_it_was(change: Callable[[Any], None], message: str) -> None:
    net = small("lenet5")
    change(net)
    with pytest.raises(AerogelError, match=f"^save: lenet5 builds another network than this one: {message}"):
        save(net, "a")


def test_a_new_head_is_a_changed_shape() -> None:
    net = small("lenet5")
    net.classifier.ip2 = nn.Linear(500, 3)  # type: ignore[union-attr]
    save(net, "a")
    assert torch.equal(answers(load("a")), answers(net))


TIED = """
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))

def data():
    net = Tied()
    net.b.weight = nn.Parameter(net.a.weight.data)
    return net

def transposed():
    net = Tied()
    net.b.weight = nn.Parameter(net.a.weight.data.t())
    return net
"""


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    Path("tied.py").write_text(TIED)
    net = import_factory("tied.py:Tied")()
    save(net, "a", factory="tied.py:Tied")
    held = safetensors.torch.load_file("a/model.safetensors")
    assert sorted(held) == ["a.bias", "a.weight", "b.bias", "head.bias", "head.weight"]
    again = load("a", trust=True)
    assert again.a.weight is again.b.weight
    x = torch.randn(3, 8)
    assert torch.equal(answers(again, x), answers(net, x))


@pytest.mark.parametrize("kind", ["data", "transposed"])
def test_weights_that_share_memory_and_are_not_tied_are_refused(kind: str) -> None:
    Path("tied.py").write_text(TIED)
    net = import_factory(f"tied.py:{kind}")()
    with pytest.raises(AerogelError, match=r"save: a.weight and b.weight share memory; tie them as one Parameter"):
        save(net, "a", factory=f"tied.py:{kind}")


def test_state_that_is_no_tensor_is_refused() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(
        AerogelError, match=r"^'_extra_state' of Counting is neither a parameter nor a buffer; make it one"
    ):
        save(Counting(2, 2), "a", factory="torch.nn:Identity")


# Where it is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_exists_is_never_overwritten(make: Callable[[Path], None]) -> None:
    make(Path("a"))
    with pytest.raises(AerogelError, match=r"^save: a exists and is never overwritten; name another"):
        save(small("lenet5"), "a")
    assert names(Path()) == ["a"]


def test_a_folder_that_cannot_be_written() -> None:
    Path("file").touch()
    with pytest.raises(
        AerogelError, match=r"^cannot write file/a: Not a directory; [0-9]+ MiB are free on its disk: [^\n]*$"
    ):
        save(small("lenet5"), "file/a")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_full_disk_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = {"model.safetensors": Path.write_bytes, "config.json": Path.write_text}[name]

    def half(self: Path, data: Any, **options: Any) -> int:
        write(self, data[: len(data) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, write.__name__, half)
    with pytest.raises(AerogelError, match=r"^cannot write [^\n]*: No space left on device; [0-9]+ MiB are free"):
        save(small("lenet5"), "deep/a")
    assert names(Path("deep")) == []


def test_metrics_that_are_not_plain_are_refused_and_leave_nothing() -> None:
    for value, reason in ((float("nan"), "not JSON compliant"), (torch.ones(1), "not JSON serializable")):
        with pytest.raises(AerogelError, match=f"^cannot write .*config.json: .*{reason}"):
            save(small("lenet5"), "deep/a", metrics={"accuracy": value})
    assert names(Path("deep")) == []


def test_arguments_that_are_not_plain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(*, widths: tuple[int, ...] = (1, 2)) -> nn.Module:
        return nn.Linear(*widths)

    monkeypatch.setitem(nets.NETS, "wide", wide)
    with pytest.raises(
        AerogelError, match=r"^save: 'args.widths.int': .*; a saved model holds plain numbers and texts$"
    ):
        save(nets.build("wide"), "a")


def test_the_files_can_be_read_by_others() -> None:
    before = os.umask(0o022)
    save(small("lenet5"), "a")
    os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in Path("a").iterdir()} == {"0o644"}


# What is wrong with a folder is named ------------------------------------------------------------------------------


@pytest.fixture
def saved() -> Path:
    save(small("lenet5"), "saved", input=InputSpec(shape=(1, 28, 28)))
    return Path("saved")


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)


def refuse(folder: Path | str, message: str, **options: Any) -> None:
    """Loading raises an AerogelError of one line that matches."""
    with pytest.raises(AerogelError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def reseal(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other weights, with the sha256 that goes with them."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    edit(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(Path(folder / "model.safetensors").read_bytes())


def test_missing_files() -> None:
    refuse("nowhere", "^cannot read nowhere/config.json: No such file or directory$")
    save(small("lenet5"), "a")
    Path("a/model.safetensors").unlink()
    refuse("a", "^cannot read a/model.safetensors: no such file; it is absent, corrupt or not safetensors$")
    Path("a/model.safetensors").mkdir()
    refuse("a", "^cannot read a/model.safetensors: .*; it is absent, corrupt or not safetensors$")
    Path("a/config.json").unlink()
    refuse("a", "^cannot read a/config.json: No such file or directory$")


def test_any_flipped_bit_in_the_weights_is_found(saved: Path) -> None:
    path, dice = saved / "model.safetensors", random.Random(0)
    content = path.read_bytes()
    for at in [0, 7, 8, 20, len(content) - 1, *dice.sample(range(len(content)), 20)]:
        changed = bytearray(content)
        changed[at] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        refuse(
            saved,
            r"saved/model.safetensors: .*corrupt|saved/model.safetensors does not match the sha256 in config.json",
        )
    path.write_bytes(content)
    load(saved)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_found(keep: float, saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    refuse(saved, "cannot read saved/model.safetensors: .*; it is absent, corrupt or not safetensors")


def header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip",
        struct.pack("<Q", 2**63) + b"{}",
        header({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + bytes(4),
        header({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header([]),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(content)
    edit(saved, sha256=hashlib.sha256(content).hexdigest())
    refuse(saved, r"saved/model\.safetensors: ")


@pytest.mark.parametrize("digest", [None, "", "0" * 64])
def test_a_wrong_digest_is_refused(digest: str | None, saved: Path) -> None:
    edit(saved, sha256=digest)
    refuse(
        saved, "^load: saved/model.safetensors does not match the sha256 in config.json; it is corrupt or was replaced$"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not JSON \("),
        ("{", r"is not JSON \("),
        ("net: lenet5", r"is not JSON \("),
        ("[" * 100_000, r"is not JSON \("),
        ("[]", "'the file': .*dictionary"),
        ("3", "'the file': .*dictionary"),
        ('{"format": 1}', "must name either a net or a factory"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str, message: str, saved: Path) -> None:
    (saved / "config.json").write_text(text)
    refuse(saved, f"^saved/config.json:? {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "has format 3; this aerogel reads formats 1 and 2, so update aerogel"),
        ({"format": 2}, "format 2 and coding None disagree; it is corrupt"),
        ({"format": "1"}, "has format '1'; this aerogel reads formats 1 and 2"),
        ({"format": None}, "has format None; this aerogel reads formats 1 and 2"),
        ({"colour": "blue"}, "'colour': Extra inputs are not permitted; it is corrupt or not a saved model"),
        ({"a\nb\x1b[2J": 1}, r"'a\\nb\\x1b\[2J': Extra inputs"),
        ({"net": 3}, "'net': Input should be a valid string"),
        ({"args": [1]}, "'args': Input should be a valid dictionary"),
        ({"args": {"num_classes": {}}}, "'args.num_classes"),
        ({"shapes": {CONV: "big"}}, "'shapes.features.conv1.weight': "),
        ({"shapes": {CONV: [1.5]}}, "'shapes.features.conv1.weight.0': "),
        ({"classes": "ab"}, "'classes': "),
        ({"input": {"shape": [1, 28]}}, "'input.shape.2': "),
        ({"input": {"shape": [1, 28, 0]}}, "'input.shape.2': "),
        ({"input": {"shape": [1, 28, 28], "std": [0]}}, "'input.std.0': "),
        ({"input": {"shape": [1, 28, 28], "mean": [float("nan")]}}, "'input.mean.0': "),
        ({"input": {"shape": [3, 28, 28], "mean": [0, 1]}}, "'input': .*mean and std must have one value or 3"),
        ({"net": None}, "must name either a net or a factory"),
        ({"factory": "own.py:build"}, "must name either a net or a factory"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved, **changes)
    refuse(saved, f"^saved/config.json:? {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": "lenet6"}, "no net is called 'lenet6'; did you mean .*lenet5"),
        ({"net": "os:system"}, "no net is called 'os:system'"),
        ({"args": {"num_clases": 10}}, "lenet5 has no argument 'num_clases'; did you mean num_classes"),
        ({"args": {"num_classes": -1}}, "num_classes must be an integer >= 1, got -1"),
        ({"args": {"num_classes": "ten"}}, "num_classes must be an integer >= 1, got 'ten'"),
        ({"args": {"num_classes": 10**18}}, "lenet5 cannot be built with .*: Storage size"),
        ({"args": {"num_classes": 10**40}}, "lenet5 cannot be built with "),
        ({"args": {"name": "lenet5"}}, "lenet5 has no argument 'name'"),
    ],
)
def test_arguments_that_build_nothing_are_refused(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved, **changes)
    refuse(saved, f"^load: saved/config.json: .*{message}")


@pytest.mark.parametrize("number", [11, 10**6, 10**12])
def test_arguments_that_do_not_match_the_weights_are_refused_and_cost_no_memory(number: int, saved: Path) -> None:
    """10**12 classes would be 2 PB: the net is built without memory, and the file's shapes refuse it."""
    edit(saved, args={"num_classes": number})
    refuse(
        saved,
        rf"saved/model.safetensors: classifier.ip2.weight has shape \(10, 500\), the network needs \({number}, 500\)",
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({CONV: [19, 1, 5, 5]}, rf"{CONV} has shape \(20, 1, 5, 5\), the network needs \(19, 1, 5, 5\)"),
        ({CONV: [-20, 1, 5, 5]}, r".*the network needs \(-20, 1, 5, 5\)"),
        ({CONV: [10**30, 1, 5, 5]}, ".*the network needs "),
        ({CONV: [500]}, rf"the table of shapes has '{CONV}' \(500,\), the network has not"),
        ({CONV: []}, rf"the table of shapes has '{CONV}' \(\), the network has not"),
        ({"features.conv9.weight": [1]}, "the table of shapes has 'features.conv9.weight' .*, the network has not"),
    ],
)
def test_a_table_of_shapes_that_lies_is_refused(shapes: dict[str, list[int]], message: str, saved: Path) -> None:
    edit(saved, shapes=shapes)
    refuse(saved, f"^load: saved/model.safetensors: {message}")


def test_a_table_and_weights_that_agree_on_nonsense_are_refused(saved: Path) -> None:
    """A weight of another number of dimensions would break the layer that holds it."""
    reseal(saved, tensors_of(saved) | {CONV: torch.zeros(500)})
    edit(saved, shapes={CONV: [500]})
    refuse(saved, rf"the table of shapes has '{CONV}' \(500,\), the network has not")


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    whole = tensors_of(saved)
    reseal(saved, {name: t for name, t in whole.items() if name != "features.conv2.bias"})
    refuse(saved, r"the network needs features.conv2.bias \(50,\), which is missing")
    reseal(saved, whole | {"more\n": torch.zeros(1)})
    refuse(saved, r"'more\\n' is left over, the network lacks it")
    reseal(saved, whole | {"features.conv2.bias": torch.zeros(51)})
    refuse(saved, r"features.conv2.bias has shape \(51,\), the network needs \(50,\)")
    reseal(saved, whole | {"features.conv2.bias": torch.zeros(50, dtype=torch.int64)})
    refuse(saved, r"features.conv2.bias holds torch.int64, the network needs torch.float32; is it corrupt")


# Nothing that a file names or holds is run ---------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes the file `exploded`."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.fixture(autouse=True)
def nothing_explodes(own_modules: None) -> Iterator[None]:
    yield
    assert not Path("exploded").exists()


def test_the_bomb_works() -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()
    Path("exploded").unlink()


BOMBS: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: path.write_bytes(pickle.dumps({"weight": Bomb()})),
    "zip": lambda path: torch.save({"weight": Bomb()}, path),
    "legacy": lambda path: torch.save({"weight": Bomb()}, path, _use_new_zipfile_serialization=False),
    "broken": lambda path: path.write_bytes(pickle.dumps(Bomb()) + b"\x80\x02K\x01 and more"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_under_the_name_of_the_weights_is_refused(kind: str, saved: Path) -> None:
    path = saved / "model.safetensors"
    BOMBS[kind](path)
    edit(saved, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    refuse(saved, "cannot read saved/model.safetensors: .*; it is absent, corrupt or not safetensors")


def test_a_factory_named_in_a_file_is_not_imported(own: nn.Module) -> None:
    Path("canary.py").write_text("import os\nos.system('touch exploded')\ndef build(): ...\n")
    for text in ("canary:build", "canary.py:build", "os:system", "../canary.py:build", "/etc/passwd", "own.py:build"):
        edit(Path("mine"), factory=text)
        refuse("mine", "^load: mine was built by '.*', which is code; pass that factory, or --trust to import it$")
        assert "canary" not in sys.modules
        load("mine", factory=own_net)  # the user's own, whatever the file says


def test_with_trust_the_factory_must_build_the_network(own: nn.Module) -> None:
    edit(Path("mine"), factory="builtins:print")
    refuse("mine", "load: mine/config.json: builtins:print must return a torch.nn.Module, got NoneType", trust=True)
    edit(Path("mine"), factory="no_such_module:build")
    refuse("mine", "no module 'no_such_module', got 'no_such_module:build'; install it", trust=True)
