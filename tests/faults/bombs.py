"""Hostile files, at least 60 of them: whoever runs one creates the file `exploded` in the current folder.

`make(folder)` writes them all and returns them by kind. Names begin with what they claim to be.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

CANARY = "exploded"
WRITE = f"open({CANARY!r}, 'w').close()"
LOADED = "canary_module"  # a module that explodes when it is imported


class Bomb:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def named(module: str, name: str, *arguments: str) -> bytes:
    """A pickle of protocol 0 that calls what it names, whether that can be imported here or not."""
    pushed = "".join(f"V{argument}\n" for argument in arguments)
    return f"c{module}\n{name}\n({pushed}tR.".encode()


CHANNELS = {
    "os": named("os", "system", f"touch {CANARY}"),
    "posix": named("posix", "system", f"touch {CANARY}"),
    "subprocess": named("subprocess", "getoutput", f"touch {CANARY}"),
    "eval": named("builtins", "eval", WRITE),
    "exec": named("builtins", "exec", WRITE),
    "code": named("code", "InteractiveInterpreter"),
    "runpy": named("runpy", "run_path", f"{LOADED}.py"),
    "import": named("importlib", "import_module", LOADED),
    "pydoc": named("pydoc", "pipepager", "x", f"touch {CANARY}"),
    "timeit": named("timeit", "timeit", "pass", WRITE),
    "collect_env": named("torch.utils.collect_env", "run", f"touch {CANARY}"),
    "torch_hub": named("torch.hub", "load", "owner/repository", "model"),
    "dotted": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch " + CANARY.encode() + b"\x85R.",
}


def pickles() -> dict[str, bytes]:
    """Pickles in every disguise, by name."""
    bomb = Bomb(eval, WRITE)
    found = {f"channel_{name}": content for name, content in CHANNELS.items()}
    found |= {f"protocol_{number}": pickle.dumps({"fc.weight": bomb}, protocol=number) for number in (0, 2, 4, 5)}
    found["broken_stream"] = pickle.dumps(bomb)[:-1] + b"\xff and no end"
    found["twice"] = pickle.dumps({}) + pickle.dumps(bomb)
    found["gzip"] = gzip.compress(pickle.dumps(bomb))
    found["state_and_bomb"] = _saved({"fc.weight": torch.zeros(2), "extra": bomb})
    found["deep"] = _saved({"state_dict": {"a": {"b": [bomb]}}})
    found["zip"] = _saved(bomb)
    found["legacy"] = _saved({"fc.weight": bomb}, _use_new_zipfile_serialization=False)
    found["legacy_tar"] = _tar({"pickle": pickle.dumps(bomb), "storages": pickle.dumps(1), "tensors": b""})
    found["zip_by_hand"] = _zip({"x/data.pkl": pickle.dumps(bomb), "x/version": b"3"})
    found["zip_packed"] = _zip({"x/data.pkl": pickle.dumps(bomb), "x/version": b"3"}, zipfile.ZIP_DEFLATED)
    found["zip_cut"] = _saved(bomb)[:-30]
    found["zip_slip"] = _zip({"../../exploded": b"", "x/data.pkl": pickle.dumps({}), "x/version": b"3"})
    found["whole_module"] = _saved(nn.Linear(2, 2))
    found["script"] = _scripted()
    found["objects_npy"] = _numpy(np.array([bomb], dtype=object))
    found["objects_npz"] = _zip({"weight.npy": _numpy(np.array([bomb], dtype=object))})
    found["joblib"] = pickle.dumps({"a": np.array([bomb], dtype=object)})
    return found


def headers() -> dict[str, bytes]:
    """Safetensors that lie, by name."""

    def file(header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def one(**changes: Any) -> bytes:
        return file(json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}).encode())

    def coded(content: bytes) -> bytes:
        """A sparse file (aerogel.sparse) whose checksum is right, of one tensor "w" with this content."""
        held = {"w": {"dtype": "U8", "shape": [len(content) + 4], "data_offsets": [0, len(content) + 4]}}
        head = {"__metadata__": {"format": "aerogel.sparse.1"}, **held}
        return file(json.dumps(head).encode(), zlib.crc32(content).to_bytes(4, "little") + content)

    two = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    huge = b"\3\2" + b"\x80\x80\x08" + b"\x80\x80\x04"  # float64 of 2^17 x 2^16, 64 GiB
    return {
        "endless_header": file(b"{}", length=2**63 - 1),
        "long_header": file(b"{}", length=2**31),
        "short_header": file(b'{"a": 1}', length=2),
        "negative_offset": one(data_offsets=[-16, 0]),
        "backwards": one(data_offsets=[16, 0]),
        "beyond_the_end": one(data_offsets=[0, 2**40], shape=[2**38]),
        "overflowing_shape": one(shape=[2**62, 2**62]),
        "negative_shape": one(shape=[-4]),
        "unknown_type": one(dtype="OBJECT"),
        "overlapping": file(json.dumps(two).encode()),
        "nested": file(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        "not_text": file(b"\xff\xfe{}"),
        "twice_one_name": file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32"}}'),
        "sparse_of_nothing": coded(b""),
        "sparse_64_gib_of_zeros": coded(huge + b"\0\0"),
        "sparse_64_gib_of_ones": coded(huge + b"\2\0" + b"\0\1" * 4),
        "sparse_endless_shape": coded(b"\0\xff" + b"\xff" * 2000),
        "sparse_endless_name": file(json.dumps({"__metadata__": {"format": "aerogel.sparse.1" * 9999}}).encode(), b""),
        "pickle_inside": file(b'{"__metadata__":{"x":{"y":1}}}', CHANNELS["eval"]),
    }


def configs() -> dict[str, dict[str, Any] | str]:
    """config.json of saved folders, by name."""
    whole: dict[str, Any] = {"format": 1, "net": "lenet5", "args": {}, "sha256": "0" * 64}
    code = ("os:system", "subprocess:getoutput", "builtins:eval", "posix:abort", "os.path:os.system",
            f"{LOADED}:build", f"{LOADED}.py:build", f"../{LOADED}.py:build", f"./{LOADED}.py:build",
            "pty:spawn", "a:b:c", "__main__:exit",
            f"{LOADED}.py:build\x1b]0;title\x07", f"folder/../{LOADED}.py:build", "antigravity:geohash")  # fmt: skip
    found: dict[str, dict[str, Any] | str] = {
        f"factory_{number}": {"format": 1, "factory": text, "sha256": "0" * 64} for number, text in enumerate(code)
    }
    found |= {
        "net_is_a_module": whole | {"net": "os.system"},
        "net_is_dunder": whole | {"net": "__builtins__"},
        "net_is_a_path": whole | {"net": f"../{LOADED}.py"},
        "net_and_factory": whole | {"factory": f"{LOADED}:build"},
        "argument_is_code": whole | {"args": {"num_classes": f"__import__('os').system('touch {CANARY}')"}},
        "argument_is_dunder": whole | {"args": {"__class__": "os"}},
        "argument_is_huge": whole | {"args": {"num_classes": 2**62}},
        "argument_is_nested": whole | {"args": {"num_classes": {"$ref": "os"}}},
        "classes_of_html": whole | {"net": "nowhere", "classes": ["<script>fetch('//x')</script>\x1b[2J"]},
        "format_is_a_bomb": whole | {"format": "!!python/object/apply:os.system ['touch exploded']"},
        "coding_lies": whole | {"format": 2, "coding": "sparse"},
        "coding_unknown": whole | {"format": 2, "coding": "os.system"},
        "shapes_lie": whole | {"shapes": {"../../x": [1], "features.0.weight": [2**62, 1]}},
        "infinite": '{"format": 1, "net": "lenet5", "metrics": {"a": Infinity, "b": NaN}, "sha256": 1e999}',
        "nested": "[" * 100_000,
        "nested_closed": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "yaml": f"!!python/object/apply:os.system ['touch {CANARY}']\n",
        "python": f"__import__('os').system('touch {CANARY}')\n",
        "endless_number": '{"format": 1' + "0" * 10_000 + "}",
        "not_text": "\udcff\udcfe",
    }  # fmt: skip
    return found


def onnx_files(folder: Path) -> None:
    """Graphs that read other files, or name what is not there."""
    for name, location in (
        ("parents", "../../secret"), ("absolute", str(folder / "secret")), ("link", "link"),
        ("device", "/dev/zero"),
    ):  # fmt: skip
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
        (folder / f"onnx_outside_{name}.onnx").write_bytes(_graph("Add", [weight]).SerializeToString())
    (folder / "secret").write_bytes(b"\0" * 64)
    (folder / "link").symlink_to("/etc/passwd")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    (folder / "onnx_unknown_op.onnx").write_bytes(_graph("Run", [weight], domain="os.system").SerializeToString())
    (folder / "onnx_cut.onnx").write_bytes(_graph("Add", [weight]).SerializeToString()[:-20])


def make(folder: Path) -> dict[str, list[Path]]:
    """All of them, written below `folder`, by kind: "file" (weights, configs, graphs), "saved", "run", "data"."""
    kinds: dict[str, list[Path]] = {"file": [], "saved": [], "run": [], "data": []}
    suffixes = (".pt", ".pth", ".bin", ".safetensors", ".json", ".toml", ".onnx", ".ckpt", ".pth.tar", ".py.pt")
    for number, (name, content) in enumerate(pickles().items()):
        for suffix in {".pt", suffixes[number % len(suffixes)]}:
            (folder / f"pickle_{name}{suffix}").write_bytes(content)
    for name, content in headers().items():
        (folder / f"header_{name}.safetensors").write_bytes(content)
    for name, text in {
        "yaml": f"model: !!python/object/apply:os.system ['touch {CANARY}']\n",
        "nested": "a = " + "[" * 100_000,
        "nested_keys": ".".join("a" * 20_000) + " = 1",
        "python": f"__import__('os').system('touch {CANARY}')\n",
        "escapes": 'seed = "\\u001b[2J<script>"\n"\\u001b]0;x\\u0007" = 1\n',
    }.items():
        (folder / f"toml_{name}.toml").write_text(text)
    onnx_files(folder)
    (folder / "name\x1b[2J\n<script>alert(1).pt").write_bytes(CHANNELS["eval"])
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    (folder / "endless.json").symlink_to("/dev/zero")
    (folder / "endless.toml").symlink_to("/dev/zero")
    (folder / "endless.onnx").symlink_to("/dev/zero")
    (folder / "endless.pt").symlink_to("/dev/zero")
    kinds["file"] = sorted(path for path in folder.iterdir() if path.name not in ("secret", "link", f"{LOADED}.py"))
    for name, config in configs().items():
        saved = folder / f"saved_{name}"
        saved.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (saved / "config.json").write_text(text, errors="surrogateescape")
        save_file({"a": torch.zeros(2)}, saved / "model.safetensors")
        kinds["saved"].append(saved)
    endless = folder / "saved_endless"
    endless.mkdir()
    (endless / "config.json").symlink_to("/dev/zero")
    kinds["saved"].append(endless)
    kinds["run"] = list(runs(folder))
    kinds["data"] = list(sets(folder))
    return kinds


def runs(folder: Path) -> list[Path]:
    """Folders that look like runs."""
    base = 'model = "lenet5"\ndata = "digits"\ntarget = ["macs=0.5"]\n'
    state: dict[str, Any] = {"data": "0" * 64, "check": {"text": "", "fractions": {}}, "ship": {}}
    rest = 'data = "digits"\ntarget = ["macs=0.5"]\n'
    made = {
        "model_is_code": (f'model = "{folder}/{LOADED}.py:build"\n{rest}', state),
        "model_inside": (f'model = "{folder}/run_model_inside/{LOADED}.py:build"\n{rest}', state),
        "model_is_a_module": (f'model = "{LOADED}:build"\n{rest}', state),
        "data_is_code": (f'model = "lenet5"\ndata = "{folder}/{LOADED}.py:build"\ntarget = ["macs=0.5"]\n', state),
        "trusting": (f'trust = true\nmodel = "{folder}/saved_factory_6"\n{rest}', state),
        "state_is_a_list": (base, []),
        "state_is_nothing": (base, {"data": "0" * 64, "check": None}),
        "yaml": ("model: !!python/name:os.system\n", state),
        "nested": ("a = " + "[" * 100_000, state),
    }  # fmt: skip
    found = []
    for name, (config, held) in made.items():
        run = folder / f"run_{name}"
        run.mkdir()
        (run / "config.toml").write_text(config)
        (run / "state.json").write_text(json.dumps(held))
        (run / "report.json").write_text("[" * 100_000)
        found.append(run)
    (folder / "run_model_inside" / f"{LOADED}.py").write_text(module())
    for name, content in (("state_pickled", CHANNELS["eval"]), ("state_deep", b"[" * 100_000)):
        run = folder / f"run_{name}"
        run.mkdir()
        (run / "config.toml").write_text(base)
        (run / "state.json").write_bytes(content)
        (run / "report.json").write_bytes(content)
        found.append(run)
    return found


def sets(folder: Path) -> list[Path]:
    """Archives that climb out of their folder, and image folders full of what is no image."""
    slip = {f"../../{CANARY}": b"", f"{folder}/{CANARY}": b"", "train/a/0.png": b""}
    (folder / "data_slip.zip").write_bytes(_zip(slip))
    (folder / "data_slip.tar").write_bytes(_tar(slip))
    images = folder / "data_images"
    for label in ("cats", "dogs\x1b[2J\n<b>"):
        (images / "train" / label).mkdir(parents=True)
        (images / "train" / label / "0.png").write_bytes(CHANNELS["eval"])
        (images / "train" / label / "1.jpg").symlink_to("/etc/passwd")
        (images / "train" / label / "2.jpg").symlink_to("/dev/zero")
        script = "%!PS\n(exploded) (w) file closefile\nshowpage\n"
        (images / "train" / label / "3.jpg").write_text(script)
    return [folder / "data_slip.zip", folder / "data_slip.tar", images]


def module() -> str:
    return f"{WRITE}\ndef build():\n    {WRITE}\n"


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _scripted() -> bytes:
    """As TorchScript packs itself; no compiler is asked."""
    code = {"x/code/__torch__.py": f"{WRITE}\n".encode(), "x/constants.pkl": pickle.dumps(()), "x/version": b"3"}
    return _zip({"x/data.pkl": CHANNELS["eval"], **code})


def _numpy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _graph(op: str, weights: list[TensorProto], domain: str = "") -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    node = helper.make_node(op, ["x", "w"], ["y"], domain=domain)
    graph = helper.make_graph([node], "g", value[:1], value[1:], weights)
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
