"""The command line: help without torch, one clear line for whatever is wrong, exit codes, machine output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from aerogel import cli
from aerogel.errors import Interrupted
from aerogel.nets import NETS, SOURCES, build
from aerogel.nets.weights import LAYOUTS

Aerogel = Callable[..., Any]
VERBS = ("nets", "cost", "lint", "train", "compress", "prune", "resume", "export", "verify", "report")
NETWORKS = '''
import torch
from torch import nn

def digits():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))

def small():
    """Only for images of 16 x 16."""
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)
    def forward(self, x):
        y = self.fc(x.flatten(1))
        return y, y

class Branching(Pair):
    def forward(self, x):
        y = self.fc(x.flatten(1))
        return y if y.sum() > 0 else -y

class Fixed(nn.Module):
    """Nothing in it can be cut."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)
    def forward(self, x):
        return self.fc(x.flatten(1))

def number():
    return 3

def broken():
    raise RuntimeError("out of luck")
'''


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("AEROGEL_DATA", raising=False)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, data and files that something is wrong with."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "net.py").write_text(NETWORKS)
    (folder / "syntax.py").write_text("def build(:\n")
    (folder / "unknown.toml").write_text("stepz = 3\n")
    (folder / "not.toml").write_text("steps: 3\n")
    (folder / "brief.toml").write_text("seconds = 0.1\n")
    (folder / "norm.toml").write_text('criterion = "bn_scale"\n')
    (folder / "criterion.toml").write_text('criterion = "l3"\n')
    (folder / "protect.toml").write_text('protect = ["features.fcc1"]\n')
    (folder / "taken").mkdir()
    (folder / "empty").mkdir()
    save_file({"weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    (folder / "corrupt.safetensors").write_bytes(b"\x00" * 100)
    (folder / "pickle.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (folder / "corrupt/mnist").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"corrupt/mnist/{name}-ubyte.gz").write_bytes(b"\x1f\x8bnonsense")
    for name, kind in (("one/train/cats", "png"), ("bad/train/cats", "png"), ("bad/train/dogs", "txt")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            image = folder / name / f"{i}.png"
            if kind == "png":
                Image.new("RGB", (8, 8), (i, 0, 0)).save(image)
            else:
                image.write_text("<html>not found</html>")
    return folder


def test_help_needs_neither_torch_nor_a_second() -> None:
    """Of the program and of every verb, in a fresh process."""
    script = (
        "import sys\n"
        "from aerogel.cli import main\n"
        f"for words in [], ['--help'], *([verb, '--help'] for verb in {VERBS}):\n"
        "    sys.argv = ['aerogel', *words]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, words\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'plotly', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: aerogel") == 2 + len(VERBS)


def test_python_m_aerogel_is_the_same_command(aerogel: Aerogel) -> None:
    done = subprocess.run([sys.executable, "-m", "aerogel", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == aerogel("--help").out
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


WRONG_COMMANDS = [
    (["compres"], r"No such command 'compres'.*compress"),
    (["compress", "lenet5", "--dta", "digits"], r"No such option: --dta.*--data"),
    (["compress", "lenet5", "digits"], r"unexpected extra argument"),
    (["compress", "lenet5", "--epochs", "many"], r"Invalid value for '--epochs'"),
    (["export", "lenet5"], r"Missing option '--out'"),
    (["cost"], r"cost needs a MODEL"),
    (["cost", "lenet6"], r"model 'lenet6' .*did you mean lenet5"),
    (["cost", "lenet5:classes=3"], r"lenet5 has no argument 'classes'; did you mean num_classes\?"),
    (["cost", "{inputs}/net.py:digits"], r"--input C,H,W is needed"),
    (["cost", "lenet5", "--input", "abc"], r"--input must be C,H,W, .* got 'abc'; write --input 3,224,224"),
    (["cost", "lenet5", "--input", "1,28"], r"--input must be C,H,W, .* got '1,28'"),
    (["cost", "lenet5", "--input", "1,0,28"], r"--input must be C,H,W, .* got '1,0,28'"),
    (["cost", "lenet5", "--input", "1,²,28"], r"--input must be C,H,W, .* got '1,²,28'"),
    (["resume", "{inputs}/empty"], r"empty is not a run folder \(it has no state\.json\)"),
    (["resume", "nowhere"], r"nowhere is not a run folder"),
    (["report", "{inputs}/empty"], r"report: there is no .*empty/report\.json; finish the run with `aerogel resume"),
    (["verify", "nowhere"], r"verify: nowhere: there is no such folder; give a run, a saved folder, or two"),
    (["verify", "{inputs}/net.py"], r"verify: .*net\.py: one file alone has nothing to be compared with"),
    (["verify", "{inputs}/empty"], r"cannot read .*empty/config\.json: No such file"),
    (["verify", "nowhere", "{inputs}/net.py"], r"there is no file nowhere"),
    (["verify", "{inputs}/net.py", "{inputs}/net.py"], r"net\.py is not a model that ONNX Runtime can load"),
    (["verify", "{inputs}/net.py", "{inputs}/net.py", "--threads", "0"], r"threads must be >= 1, got 0"),
    (["export", "lenet5", "--out", "{inputs}/taken"], r"taken exists and is never overwritten"),
    (["export", "lenet5", "--out", "no/such/place.onnx"], r"export: there is no folder no/such; make it first"),
    (["train", "lenet5", "--data", "digits"], r"train: --out is missing; name the folder"),
    (["train", "lenet5", "--data", "digits", "--out", "{inputs}/taken"], r"taken exists and is never overwritten"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG_COMMANDS, ids=lambda value: str(value)[:40])
def test_a_wrong_command_is_one_clear_line(
    words: list[str], message: str, inputs: Path, work: Path, aerogel: Aerogel
) -> None:
    check_refused(aerogel(*(word.format(inputs=inputs) for word in words)), message)
    assert list(work.iterdir()) == []


# What follows `compress`; to it `--data digits` and `--target macs=0.5` are added where it lacks them.
WRONG_JOBS = [
    ("no_model", [], r"model is missing; name a MODEL"),
    ("no_data", ["lenet5"], r"data is missing; name a set with --data"),
    ("unknown_model", ["lenet6"], r"model 'lenet6' .*did you mean lenet5"),
    ("unknown_data", ["lenet5", "--data", "digitz"], r"unknown data set 'digitz'; did you mean digits\?"),
    ("missing_data", ["lenet5", "--data", "mnist"], r"mnist .* \$AEROGEL_DATA \(not set\).*lacks train-images"),
    ("corrupt_data", ["lenet5", "--data", "mnist"], r"corrupt/mnist/\S+ubyte\.gz"),
    ("no_folder", ["lenet5", "--data", "folder:nowhere"], r"cannot list .*nowhere/train"),
    ("one_class", ["lenet5", "--data", "folder:{inputs}/one"], r"must hold two class folders or more, got cats"),
    ("bad_images", ["lenet5", "--data", "folder:{inputs}/bad"], r"4 of 8 images under .*dogs/0\.png \(.*dogs/1\.png"),
    ("input_text", ["lenet5", "--input", "abc"], r"--input must be C,H,W"),
    ("input_channels", ["lenet5", "--input", "2,28,28"], r"C 1 or 3.*got 2,28,28"),
    ("input_too_small", ["lenet5", "--input", "1,8,8"], r"lenet5: input_size .*16.*got 8"),
    ("input_of_ones_own", ["{inputs}/net.py:small"], r"does not run through .*--input C,H,W"),
    ("wrong_classes", ["lenet5:num_classes=5"], r"num_classes must be 10 for this data, got 5"),
    ("target_above_1", ["lenet5", "--target", "macs=1.5"], r"must be in \(0, 1\].*got 1\.5"),
    ("target_negative", ["lenet5", "--target", "macs=-1"], r"must be in \(0, 1\].*got -1"),
    ("target_unit", ["lenet5", "--target", "latency=5parsecs"], r"latency=3ms.*got 5parsecs"),
    ("target_metric", ["lenet5", "--target", "speed=0.5"], r"'speed=0\.5' must be METRIC=VALUE"),
    ("target_twice", ["lenet5", "--target", "macs=0.5", "--target", "macs=1K"], r"each metric is given once"),
    ("target_met", ["lenet5", "--target", "macs=1G"], r"already within it \(macs=2\.3M\); ask for less"),
    ("latency_met", ["{inputs}/net.py:digits", "--target", "latency=1000ms", "--config", "{inputs}/brief.toml"],
     r"already within it"),
    ("out_of_reach_ms", ["{inputs}/net.py:digits", "--target", "latency=0.1us", "--config", "{inputs}/brief.toml"],
     r"latency=0\.1us is out of reach: cutting reaches .* ms \(x.* to x1\); "),
    ("out_of_reach", ["lenet5", "--target", "macs=0.0001"], r"macs=0\.0001 \(cutting reaches .*out of reach"),
    ("nothing_to_cut", ["{inputs}/net.py:Fixed"], r"out of reach; nothing can be cut"),
    ("drop_negative", ["lenet5", "--max-drop", "-1"], r"option max_drop: .*got -1"),
    ("epochs_0", ["lenet5", "--epochs", "0"], r"option train\.epochs: .*greater than 0, got 0"),
    ("threads_0", ["lenet5", "--threads", "0"], r"option threads: .*got 0"),
    ("config_unknown", ["lenet5", "--config", "{inputs}/unknown.toml"], r"'stepz' is unknown; did you mean steps"),
    ("config_not_toml", ["lenet5", "--config", "{inputs}/not.toml"], r"not\.toml is not TOML"),
    ("config_absent", ["lenet5", "--config", "none.toml"], r"cannot read none\.toml: No such file"),
    ("criterion", ["lenet5", "--config", "{inputs}/criterion.toml"], r"criterion 'l3' is unknown; did you mean l"),
    ("criterion_latency", ["lenet5", "--target", "latency=0.5", "--config", "{inputs}/norm.toml"],
     r"bn_scale.*passes no batch norm"),
    ("protect", ["lenet_300_100", "--config", "{inputs}/protect.toml"], r"'features\.fcc1' names no layer; did"),
    ("weights_absent", ["lenet5", "--weights", "nowhere"], r"cannot read .*nowhere"),
    ("weights_corrupt", ["lenet5", "--weights", "{inputs}/corrupt.safetensors"], r"cannot read .*corrupt\.safetensors"),
    ("weights_pickle", ["lenet5", "--weights", "{inputs}/pickle.pt"], r"pickle\.pt: it is corrupt or holds more"),
    ("weights_misfit", ["lenet5", "--weights", "{inputs}/other.safetensors"], r"other\.safetensors: the network needs"),
    ("weights_source", ["lenet5", "--weights", "keras:w.pt"],
     r"keras:w\.pt: 'keras' is no source, .*sources: megvii, timm, timm_tf, torchvision"),
    ("weights_no_file", ["lenet5", "--weights", "timm:"], r"--weights timm: names no file; write timm:model\."),
    ("weights_no_layout", ["lenet5", "--weights", "timm:{inputs}/other.safetensors"], r"lenet5 has no layout for"),
    ("weights_theirs", ["mobilenet_v2", "--input", "3,64,64", "--weights", "timm:{inputs}/other.safetensors"],
     r"the state dict lacks 'conv_stem\.weight' \(timm's name"),
    ("weights_padding", ["mobilenet_v3_small", "--input", "3,64,64", "--weights", "timm_tf:{inputs}/other.safetensors"],
     r"needs padding='same'.*mobilenet_v3_small:padding=same"),
    ("weights_small", ["mobilenet_v2", "--input", "3,32,32", "--weights", "timm:{inputs}/other.safetensors"],
     r"input_size=32; build it larger, as with --input 3,224,224"),
    ("no_file", ["{inputs}/none.py:build"], r"no file .*none\.py"),
    ("no_module", ["no_such_package.x:build"], r"no module 'no_such_package'"),
    ("no_factory", ["{inputs}/net.py:digit"], r"has no 'digit'.*did you mean digits"),
    ("syntax", ["{inputs}/syntax.py:build"], r"SyntaxError.*syntax\.py:1"),
    ("factory_raises", ["{inputs}/net.py:broken"], r"raised RuntimeError: out of luck at .*net\.py:\d+"),
    ("factory_returns", ["{inputs}/net.py:number"], r"must return a torch\.nn\.Module, got int"),
    ("uncapturable", ["{inputs}/net.py:Branching"], r"Branching \(net\.py:\d+\): .*depends on a tensor's values"),
    ("seven_logits", ["{inputs}/net.py:seven"], r"gives \(1, 7\) for one image, digits needs one output of \(1, 10\)"),
    ("two_outputs", ["{inputs}/net.py:Pair"], r"gives a tuple for one image, digits needs one output of \(1, 10\)"),
    ("out_exists", ["lenet5", "--out", "{inputs}/taken"], r"taken exists and is never overwritten"),
    ("saved_empty", ["{inputs}/empty"], r"cannot read .*empty/config\.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "message"), WRONG_JOBS, ids=[row[0] for row in WRONG_JOBS])
def test_a_wrong_job_is_one_clear_line_and_nothing_is_written(
    name: str,
    words: list[str],
    message: str,
    inputs: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    aerogel: Aerogel,
) -> None:
    if name == "corrupt_data":
        monkeypatch.setenv("AEROGEL_DATA", str(inputs / "corrupt"))
    given = [word.format(inputs=inputs) for word in words]
    for option, value in {"--data": "digits", "--target": "macs=0.5"}.items():
        if option not in words and name != "no_data":
            given += [option, value]
    check_refused(aerogel("compress", *given), message)
    assert list(work.iterdir()) == []


def test_a_missing_target_is_told_before_anything_is_read(aerogel: Aerogel) -> None:
    outcome = aerogel("compress", "lenet5", "--data", "digits")
    check_refused(outcome, r"--target is missing; say what to reach")
    assert outcome.out == ""


def test_wrong_input_prints_nothing_on_the_machines_stdout(aerogel: Aerogel) -> None:
    outcome = aerogel("compress", "lenet6", "--data", "digits", "--target", "macs=0.5", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1].startswith("error: model 'lenet6' ")


def check_refused(outcome: Any, message: str) -> None:
    """Exit code 1 and one line on stderr, which matches; no traceback anywhere."""
    lines = outcome.err.splitlines()
    assert outcome.code == 1
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.out + outcome.err
    assert "unexpected" not in lines[0] or "unexpected extra argument" in lines[0]
    assert re.search(message, lines[0]), lines[0]


def test_an_error_cannot_control_the_terminal(aerogel: Aerogel) -> None:
    outcome = aerogel("cost", "lenet5\x1b[2J\nnext")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "\x1b" not in outcome.err
    assert "lenet5" in outcome.err


def test_an_error_nobody_foresaw_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of a kind")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "zoo_row", fail)
    outcome = aerogel("nets")
    assert (outcome.code, outcome.out) == (1, "")
    file = tmp_path / f"aerogel-{os.getpid()}.txt"
    assert outcome.err == f"error: unexpected ZeroDivisionError: of a kind (its traceback is in {file})\n"
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("raised", "code"),
    [(Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 75), (KeyboardInterrupt(), 130)],
    ids=["ctrl-c", "sigterm", "second-ctrl-c"],
)
def test_exit_codes_of_signals(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    def stop(*_: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "zoo_row", stop)
    assert aerogel("nets") == (code, "", "")


def test_sigterm_outside_a_run_ends_the_command_and_its_handler_goes(
    monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    def hit(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "zoo_row", hit)
    assert aerogel("nets").code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_zoo_as_a_table_and_for_machines(monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel) -> None:
    monkeypatch.setattr("aerogel.nets.NETS", {name: NETS[name] for name in ("lenet5", "vgg16")})
    lenet, vgg = json.loads(aerogel("nets", "--json").out)
    assert (lenet["net"], lenet["params"], lenet["macs"]) == ("lenet5", 431_080, 2_293_000)
    assert (vgg["net"], vgg["input"], vgg["macs"]) == ("vgg16", [1, 3, 224, 224], 15_470_264_320)
    assert lenet["args"] == build("lenet5").spec["args"]
    table = aerogel("nets").out.splitlines()
    ours, papers = ["params", "MACs", "access", "peak"], ["paper:", "params", "MACs", "top-1"]
    assert table[0].split() == ["net", "input", *ours, *papers]
    assert [line.split()[:4] for line in table[1:]] == [
        ["lenet5", "1x28x28", "431", "K"],
        ["vgg16", "3x224x224", "138", "M"],
    ]


def test_the_cost_of_a_network_as_a_table_and_for_machines(inputs: Path, aerogel: Aerogel) -> None:
    words = ("cost", f"{inputs}/net.py:digits", "--input", "1,28,28")
    found = json.loads(aerogel(*words, "--json").out)
    assert found["model"] == f"{inputs}/net.py:digits"
    assert found["input"] == [1, 1, 28, 28]
    assert (found["params"], found["macs"]) == (784 * 16 + 16 + 16 * 10 + 10, 784 * 16 + 16 * 10)
    assert found["uncounted"] == []
    assert {"flops", "access_bytes", "peak_bytes", "layers"} <= found.keys()
    table = aerogel(*words).out
    assert "12,544" in table
    assert "params 12,730   MACs 12,704" in table


def test_names_in_a_table_are_printed_as_they_are(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (inputs / "odd.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Flatten())\n"
        "    net.add_module('[bold]:smile:\\x1b[2J', nn.Linear(784, 10))\n"
        "    return net\n"
    )
    table = aerogel("cost", f"{inputs}/odd.py:build", "--input", "1,28,28").out
    assert r"[bold]:smile:\x1b[2J" in table
    assert "\x1b" not in table


def test_the_help_of_weights_names_every_source(aerogel: Aerogel) -> None:
    for verb in ("cost", "train", "compress", "export"):
        text = aerogel(verb, "--help").out
        assert all(f"{source}:FILE" in text for source in SOURCES), text


def test_what_another_librarys_checkpoint_reads_is_what_training_on_it_reads(work: Path, aerogel: Aerogel) -> None:
    for i, name in enumerate(f"{part}/{kind}/{i}" for part in ("train", "test") for kind in "ab" for i in range(8)):
        (work / f"images/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (8 * i, 0, 255 - 8 * i)).save(work / f"images/{name}.png")
    net = build("mobilenet_v3_small", width=0.25, num_classes=2, padding="same")
    names = LAYOUTS["mobilenet_v3_small"]["timm_tf"].rename(list(net.state_dict()))
    save_file({names[key]: tensor.clone() for key, tensor in net.state_dict().items()}, "tf.safetensors")
    words = ("mobilenet_v3_small:width=0.25,padding=same", "--weights", "timm_tf:tf.safetensors", "--input", "3,64,64")
    outcome = aerogel("train", *words, "--data", "folder:images", "--epochs", "1", "--out", "tuned", "--json")
    assert outcome.code == 0, outcome.err
    config = json.loads((work / "tuned/config.json").read_text())
    assert config["input"] == {"shape": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    assert config["args"]["padding"] == "same"


def test_an_exported_network_is_one_file_that_is_checked(inputs: Path, work: Path, aerogel: Aerogel) -> None:
    words = ("export", f"{inputs}/net.py:digits", "--input", "1,28,28", "--out", "net.onnx", "--json")
    found = json.loads(aerogel(*words).out)
    assert [file.name for file in work.iterdir()] == ["net.onnx"]
    assert found["bytes"] == (work / "net.onnx").stat().st_size
    assert found["ok"]
    assert found["samples"] == 64
    assert found["max_abs_diff"] <= found["tolerance"]
    check_refused(aerogel(*words), r"net\.onnx exists and is never overwritten")


def test_a_file_that_computes_something_else_never_appears(
    inputs: Path, work: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    monkeypatch.setattr("aerogel.export.verify.TOLERANCE", -1.0)
    outcome = aerogel("export", f"{inputs}/net.py:digits", "--input", "1,28,28", "--out", "net.onnx")
    check_refused(outcome, r"export: the file gives other outputs than the network .*top-1 agreement")
    assert list(work.iterdir()) == []


def test_waiting_threads_do_not_spin_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aerogel", "--help"])
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if before:
            monkeypatch.setenv("OMP_WAIT_POLICY", before)
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == after
