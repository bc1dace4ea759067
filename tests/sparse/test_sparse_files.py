"""Sparse files: any reader of safetensors opens them; damage is found and named; the command there and back."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aerogel as ag
from aerogel import nets
from aerogel.cli import run_command
from aerogel.errors import AerogelError
from aerogel.export import load, load_weights, read_config, save
from aerogel.sparse import bits, codec, entropy, files, is_sparse, read, write
from aerogel.sparse.files import FORMAT, TOGETHER


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pruned(name: str = "lenet5", density: float = 0.05, seed: int = 0) -> nn.Module:
    """A network of which that share of the weights is left."""
    torch.manual_seed(seed)
    net = nets.build(name)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight[weight.abs() < weight.abs().quantile(1 - density)] = 0
    return net


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(codec.same(a[name], b[name]) for name in a)


def tensors() -> dict[str, Tensor]:
    big = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    return {"a.big": big, "b": torch.tensor(2), "c": torch.zeros(0, 3), "d": torch.tensor([True, False])}


# There and back ----------------------------------------------------------------------------------------------------


def test_any_reader_of_safetensors_opens_it() -> None:
    write(tensors(), Path("x.safetensors"))
    rows = load_file("x.safetensors")
    assert rows.keys() == {"a.big", TOGETHER}
    assert all(row.dtype == torch.uint8 and row.ndim == 1 for row in rows.values())


def test_what_is_written_is_read() -> None:
    coded = write(tensors(), Path("x.safetensors"))
    found = read(Path("x.safetensors"))
    assert {name: (h.shape, h.dtype) for name, h in found.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors().items()
    }
    assert {name: len(data) for name, data in coded.items()}["c"] < 10
    assert all(codec.same(tensor, tensors()[name]) for name, tensor in found.decode().items())


def test_no_tensors_at_all() -> None:
    write({}, Path("x.safetensors"))
    assert read(Path("x.safetensors")).decode() == {}


@pytest.mark.parametrize("name", ["lenet5", "lenet_300_100", "resnet20"])
def test_a_saved_folder_is_small_and_loads_as_the_same_network(name: str) -> None:
    net = pruned(name)
    ag.save(net, "small", sparse=True)
    ag.save(net, "dense")
    assert equal(ag.load("small"), net)
    small, dense = (os.path.getsize(f"{folder}/model.safetensors") for folder in ("small", "dense"))
    assert small < dense / 15
    assert (read_config("small").format, read_config("dense").format) == (2, 1)
    assert "coding" not in json.loads(Path("dense/config.json").read_text())


def test_its_weights_go_into_another_network() -> None:
    save(pruned(), "small", sparse=True)
    for source in ("small", "small/model.safetensors"):
        assert equal(load_weights(nets.build("lenet5"), source), pruned())
    with pytest.raises(AerogelError, match=r"^--weights small: .*the network (needs|lacks)"):
        load_weights(nets.build("lenet_300_100"), "small")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight


def test_a_tied_weight_may_be_there_under_both_its_names() -> None:
    net, path = Tied(), Path("x.safetensors")
    write(net.state_dict(), path)
    assert equal(load_weights(Tied(), path), net)
    for other, message in ((torch.ones(4, 4), "are one tensor"), (torch.ones(5, 4), "are one tensor in the network")):
        write(net.state_dict() | {"other.weight": other}, path)
        with pytest.raises(AerogelError, match=message):
            load_weights(Tied(), path)


def test_a_name_of_two_lines_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"^sparse: 'a\\nb' must be a name of one line; rename that module"):
        write({"a\nb": torch.ones(3)}, Path("x.safetensors"))


def test_a_type_that_cannot_be_coded_is_named_with_its_tensor() -> None:
    with pytest.raises(AerogelError, match=r"a tensor of torch\.complex64 cannot be coded.* \(phases\)$"):
        write({"phases": torch.zeros(2, dtype=torch.complex64)}, Path("it.safetensors"))


def test_it_is_decoded_once() -> None:
    write({"w": torch.zeros(3)}, Path("it.safetensors"))
    coded = read(Path("it.safetensors"))
    coded.decode()
    with pytest.raises(AerogelError, match=r"it\.safetensors was decoded before.*read it again"):
        coded.decode()


def test_a_tensor_that_would_not_come_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.codec, "decode", lambda data: torch.zeros(3))
    with pytest.raises(AerogelError, match=r"^sparse: w does not come back as it was"):
        write({"w": torch.ones(3)}, Path("x"))
    assert not Path("x").exists()


# What is wrong is named --------------------------------------------------------------------------------------------


def flipped(content: bytearray, dice: np.random.Generator) -> bytes:
    content[dice.integers(len(content))] ^= 1 << dice.integers(8)
    return bytes(content)


def cut_short(content: bytearray, dice: np.random.Generator) -> bytes:
    return bytes(content[: dice.integers(len(content))])


@pytest.mark.parametrize("damage", [flipped, cut_short])
def test_damage_to_a_folder_is_found_and_named(damage: Callable[[bytearray, np.random.Generator], bytes]) -> None:
    save(pruned(), "small", sparse=True)
    file = Path("small/model.safetensors")
    good = file.read_bytes()
    dice = np.random.default_rng(0)
    for _ in range(30):
        file.write_bytes(damage(bytearray(good), dice))
        with pytest.raises(AerogelError, match=r"small/model\.safetensors"):
            load("small")
    file.write_bytes(good)
    assert equal(load("small"), pruned())


def test_damage_to_a_file_alone_is_found_by_its_checksums() -> None:
    """Without config.json: whatever bit is another, no wrong tensor comes out."""
    path = Path("x.safetensors")
    write(tensors(), path)
    good, dice = path.read_bytes(), np.random.default_rng(1)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(80):
        content = bytearray(good)
        content[dice.integers(header, len(good))] ^= 1 << dice.integers(8)
        path.write_bytes(content)
        with pytest.raises(AerogelError, match=rf"^x\.safetensors: (a\.big|{TOGETHER}) does not match its checksum"):
            read(path)


def lying(rows: dict[str, bytes], metadata: dict[str, str] | None = None) -> Path:
    """A file of these coded tensors whose checksums are right."""
    path = Path("lie.safetensors")
    checked = {name: zlib.crc32(data).to_bytes(4, "little") + data for name, data in rows.items()}
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in checked.items()}
    path.write_bytes(save_arrays(arrays, metadata={"format": FORMAT} if metadata is None else metadata))
    return path


def together(*names: str) -> bytes:
    """Tensors without content under these names."""
    text = "".join(f"{name}\n" for name in names).encode()
    return bits.varint(len(text)) + entropy.pack(np.frombuffer(text, np.uint8)) + b"\0" * len(names)


HUGE = b"\x00\x02" + bits.varint(2**17) + bits.varint(2**16) + b"\x00\x00"  # 32 GiB of zeros in 9 bytes


def test_more_than_the_memory_is_refused_before_it_is_allotted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec.np, "zeros", lambda *a, **k: pytest.fail("it was allotted"))
    path = lying({f"w{number}": HUGE for number in range(400)})
    assert path.stat().st_size < 50_000
    with pytest.raises(AerogelError, match=r"says that it holds 13,743,895,347,200 bytes, this machine has"):
        read(path).decode()


def test_another_size_than_the_networks_is_refused_before_it_is_allotted(monkeypatch: pytest.MonkeyPatch) -> None:
    save(pruned(), "small", sparse=True)
    coded = {name: codec.encode(tensor) for name, tensor in pruned().state_dict().items()}
    path = lying(coded | {"features.conv1.weight": HUGE})
    path.replace("small/model.safetensors")
    config = json.loads(Path("small/config.json").read_text())
    config["sha256"] = files_sha("small/model.safetensors")
    Path("small/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(codec, "decode", lambda data: pytest.fail("it was decoded"))
    for attempt in (lambda: load("small"), lambda: load_weights(nets.build("lenet5"), "small")):
        with pytest.raises(AerogelError, match=r"conv1\.weight has shape \(131072, 65536\), the network needs"):
            attempt()


def files_sha(path: str) -> str:
    from aerogel.files import sha256

    return sha256(Path(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"w": b""}, r"^lie\.safetensors: w is corrupt: 2 more bytes are needed"),
        ({"w": b"\xff\x00"}, r"^lie\.safetensors: w is corrupt: a type 255"),
        ({TOGETHER: b"\x00"}, rf"^lie\.safetensors: {TOGETHER} is corrupt: names of 0 bytes"),
        (
            {TOGETHER: bits.varint(2**40) + b"\0a"},
            rf"^lie\.safetensors: {TOGETHER} is corrupt: names of 1099511627776 b",
        ),
        ({TOGETHER: b"\x01\0\xff\0"}, rf"^lie\.safetensors: {TOGETHER} is corrupt: 'utf-8'"),
        (
            {TOGETHER: b"\x03\0a\x05ab"},
            rf"^lie\.safetensors: {TOGETHER} is corrupt: 5 more bytes are needed, 2 are left",
        ),
        ({TOGETHER: together("a", "a")}, rf"^lie\.safetensors: {TOGETHER} is corrupt: a is there twice"),
        ({TOGETHER: together("a") + b"\0"}, rf"^lie\.safetensors: {TOGETHER} is corrupt: 1 bytes are left over"),
        ({"a": b"\0\0\0\0", TOGETHER: together("a")}, r"^lie\.safetensors holds a twice; it is corrupt"),
    ],
)
def test_lies_are_named(rows: dict[str, bytes], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        read(lying(rows)).decode()


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_types_that_numpy_has_not_are_refused(kind: str) -> None:
    tensor = torch.zeros(4, dtype={"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[kind])
    save_file({"w": tensor}, "x.safetensors", {"format": FORMAT})
    with pytest.raises(
        AerogelError, match=r"^x\.safetensors holds other types than bytes \(.*float.*\); it is corrupt$"
    ):
        read(Path("x.safetensors"))


def test_other_files_are_no_sparse_ones() -> None:
    assert not is_sparse(lying({}, {"format": "pt"}))
    with pytest.raises(AerogelError, match=r"holds no sparse tensors: its format is not aerogel\.sparse\.1"):
        read(Path("lie.safetensors"))
    for name, content in (("none", None), ("short", b"12"), ("text", b"x" * 100)):
        if content is not None:
            Path(name).write_bytes(content)
        with pytest.raises(AerogelError, match=rf"^cannot read {name}: .*; it is absent, corrupt or not safetensors$"):
            read(Path(name))
    save_file({"w": torch.ones(2)}, "typed", metadata={"format": FORMAT})
    with pytest.raises(AerogelError, match=r"^typed: w does not match its checksum"):
        read(Path("typed"))


def test_a_config_that_says_another_coding_is_refused() -> None:
    save(pruned(), "small", sparse=True)
    save(pruned(), "dense")
    for one, other in (("small", "dense"), ("dense", "small")):
        config = json.loads(Path(f"{one}/config.json").read_text())
        held = json.loads(Path(f"{other}/config.json").read_text())
        Path("mixed").mkdir(exist_ok=True)
        Path("mixed/model.safetensors").write_bytes(Path(f"{one}/model.safetensors").read_bytes())
        Path("mixed/config.json").write_text(json.dumps(held | {"sha256": config["sha256"]}))
        with pytest.raises(AerogelError, match=r"mixed/model\.safetensors"):
            load("mixed")


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    save(pruned(), "first", classes=tuple("0123456789"), metrics={"data": "digits"})
    assert run_command(["export", "first", "--to", "sparse", "--out", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nonzero_params"] == sum(int(p.count_nonzero()) for p in pruned().parameters())
    assert found["file_bytes"] == os.path.getsize("small/model.safetensors")
    assert found["dense_bytes"] == 4 * found["params"]
    assert run_command(["export", "small", "--to", "dense", "--out", "again"]) == 0
    for file in ("model.safetensors", "config.json"):
        assert Path(f"again/{file}").read_bytes() == Path(f"first/{file}").read_bytes()


def test_the_command_shares_values(capsys: pytest.CaptureFixture[str]) -> None:
    save(pruned("lenet_300_100"), "first")
    sizes = []
    for count in (2, 4):
        assert run_command(["export", "first", "--to", "sparse", "--bits", str(count), "--out", f"small{count}"]) == 0
        assert f"share {2**count} values a tensor ({count} bits)" in capsys.readouterr().out
        assert load(f"small{count}").state_dict()["features.fc1.weight"].unique().numel() == 2**count + 1
        assert read_config(f"small{count}").metrics == {"shared": {"bits": count}}
        sizes.append(os.path.getsize(f"small{count}/model.safetensors"))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "sparce"], "--to must be one of onnx, sparse, dense, got 'sparce'; did you mean sparse?"),
        (["--bits", "3"], "--bits must go with --to sparse, got --to onnx; leave it out"),
        (["--to", "dense", "--data", "digits"], "--data must go with --to sparse, got --to dense; leave it out"),
        (["--to", "sparse", "--max-drop", "1"], "--max-drop must be >= 0 and goes with --data and without --bits, got"),
        (["--to", "sparse", "--bits", "9"], "share: bits must be whole and 1 to 8, got 9 for "),
        (["--to", "sparse", "--data", "digits"], "lenet5 has no trained weights to judge by --data"),
    ],
)
def test_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["export", "lenet5", "--out", "x", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_the_fewest_bits_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "digits", "--epochs", "8", "--out", "first"]
    assert run_command(["train", "mlp:widths=16", *words]) == 0
    capsys.readouterr()
    words = ["--to", "sparse", "--data", "digits", "--max-drop", "1", "--out", "s", "--json"]
    assert run_command(["export", "first", *words]) == 0
    shared = json.loads(capsys.readouterr().out)["shared"]
    scores = shared["validation"]
    assert list(scores) == [str(n) for n in range(shared["bits"] + 1)]
    fits = [scores[str(n)] >= scores["0"] - 1 for n in range(1, shared["bits"] + 1)]
    assert fits == [False] * (shared["bits"] - 1) + [True]
    assert read_config("s").metrics["accuracy"] == shared["after"]


def test_cost_tells_what_is_not_zero_and_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    net = pruned("lenet_300_100")
    save(net, "small", sparse=True)
    assert run_command(["cost", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nonzero_params"] == sum(int(p.count_nonzero()) for p in net.parameters())
    assert (found["file_bytes"], found["dense_bytes"]) == (os.path.getsize("small/model.safetensors"), 1_066_440)
    assert run_command(["cost", "small"]) == 0
    text = capsys.readouterr().out
    assert f"file {found['file_bytes']:,} bytes, dense 1,066,440" in text
    assert "speed-up" not in text
    assert run_command(["cost", "small", "--measure"]) == 0
    text = capsys.readouterr().out
    assert "measured " in text
    assert "expect no speed-up from zeros: ONNX Runtime multiplies by them" in text


def test_cost_of_a_network_without_weights_tells_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cost", "lenet5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nonzero_params"] is found["file_bytes"] is None
