"""Hostile files: nothing in them runs, and every verb that takes a path refuses each with one clear line."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bombs
import pytest

from aerogel.compress.recover import frontier
from aerogel.compress.run import Run
from aerogel.compress.settings import Settings

Aerogel = Callable[..., Any]
LEAST = 60
TRAIN = ("--data", "digits", "--out", "out")
TEACHER = ("--teacher", f"{Path(__file__).with_name('teacher.py')}:build")
STUDENT = ("--student", "lenet5", *TRAIN)
SMALLER = ("--target", "macs=0.5", *TRAIN)
# Every place in a command line where a path may stand; {} is it.
SLOTS: dict[str, tuple[str, ...]] = {
    "cost MODEL": ("cost", "{}", "--input", "1,28,28"),
    "cost --weights": ("cost", "lenet5", "--weights", "{}"),
    "cost --weights timm:": ("cost", "mobilenet_v2", "--weights", "timm:{}"),
    "cost --against": ("cost", "lenet5", "--against", "{}"),
    "cost --budget": ("cost", "lenet5", "--budget", "{}"),
    "cost --device": ("cost", "lenet5", "--device", "{}"),
    "lint MODEL": ("lint", "{}", "--input", "1,28,28"),
    "lint --weights": ("lint", "lenet5", "--weights", "{}"),
    "lint --config": ("lint", "lenet5", "--config", "{}"),
    "train MODEL": ("train", "{}", *TRAIN),
    "train --weights": ("train", "lenet5", "--weights", "{}", *TRAIN),
    "train --config": ("train", "--config", "{}", *TRAIN),
    "train --data": ("train", "lenet5", "--data", "{}", "--out", "out"),
    "train --data folder:": ("train", "lenet5", "--data", "folder:{}", "--out", "out"),
    "compress MODEL": ("compress", "{}", *SMALLER),
    "compress --weights": ("compress", "lenet5", "--weights", "{}", *SMALLER),
    "compress --config": ("compress", "--config", "{}", *SMALLER),
    "prune MODEL": ("prune", "{}", *SMALLER),
    "prune --weights": ("prune", "lenet5", "--weights", "{}", *SMALLER),
    "prune --config": ("prune", "--config", "{}", *SMALLER),
    "distill --teacher": ("distill", "--teacher", "{}", "--student", "lenet5", *TRAIN),
    "distill --teacher hf:": ("distill", "--teacher", "hf:{}", "--student", "lenet5", *TRAIN),
    "distill --teacher-weights": ("distill", "--teacher", "lenet5", "--teacher-weights", "{}", *STUDENT),
    "distill --student": ("distill", *TEACHER, "--student", "{}", *TRAIN),
    "distill --weights": ("distill", *TEACHER, "--weights", "{}", *STUDENT),
    "distill --config": ("distill", *TEACHER, "--config", "{}", *STUDENT),
    "distill --cache": ("distill", *TEACHER, "--cache", "{}", *STUDENT),
    "distill --explore-temperature": ("distill", "--explore-temperature", "--teacher", "{}", "--data", "digits"),
    "resume": ("resume", "{}"),
    "export MODEL": ("export", "{}", "--out", "out.onnx"),
    "export --weights": ("export", "lenet5", "--weights", "{}", "--out", "out.onnx"),
    "export --to sparse": ("export", "{}", "--to", "sparse", "--out", "out"),
    "export --to dense": ("export", "{}", "--to", "dense", "--out", "out"),
    "verify": ("verify", "{}"),
    "verify two": ("verify", "{}", "{}"),
    "report": ("report", "{}"),
    "data check": ("data", "check", "{}"),
    "data check folder:": ("data", "check", "folder:{}"),
    "data check packed:": ("data", "check", "packed:{}"),
    "data check wds:": ("data", "check", "wds:{}"),
    "data check hf:": ("data", "check", "hf:{}"),
    "data pack": ("data", "pack", "folder:{}", "--out", "out"),
}
OWN: dict[str, tuple[str, ...]] = {  # where each kind would do its harm
    "pickle": ("cost --weights", "export --weights"),
    "header": ("cost --weights", "export --weights"),
    "toml": ("train --config", "lint --config", "cost --budget", "cost --device"),
    "onnx": ("verify two",),
    "endless": ("cost --weights", "verify two", "train --config", "cost --device", "cost --budget"),
    "name": ("cost --weights",),
    "saved": ("cost MODEL", "export MODEL", "verify"),
    "run": ("resume", "verify", "report", "cost MODEL"),
    "data": ("train --data folder:", "data check wds:", "data pack"),
}
MANY = ("pickle", "header")  # of these, one of their places in turn
HARM = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
        "pickle.find_class", "shutil.unpack_archive", "ctypes.dlopen", "webbrowser.open", "socket.connect",
        "shutil.rmtree", "shutil.copyfile")  # fmt: skip
ESCAPES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Watch:
    """What the interpreter was asked to do while it listened."""

    def __init__(self) -> None:
        self.on, self.found, self.home = False, [], ""
        sys.addaudithook(self._hear)  # no hook can be taken away again

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "import" and arguments[0].startswith(bombs.LOADED):
            self.found.append(f"import {arguments[0]}")
        if (
            event == "open"
            and isinstance(arguments[1], str)
            and set(arguments[1]) & set("wax+")
            and arguments[0] != os.devnull
            and not str(arguments[0]).startswith(f"{os.environ['XDG_CACHE_HOME']}/huggingface/")  # its copy of a set
        ):
            self.found.append(f"open {arguments[0]!r} to write")
        own = event == "shutil.rmtree" and str(arguments[0]).startswith(f"{tempfile.gettempdir()}/tmp")
        if event in HARM and not own:  # torch unpacks an old archive into a folder of its own, and removes it
            self.found.append(f"{event} {arguments[:2]!r}"[:200])


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / f"{bombs.LOADED}.py").write_text(bombs.module())
    return bombs.make(folder)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: nothing in it but a module that explodes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AEROGEL_DATA", str(tmp_path))
    (tmp_path / f"{bombs.LOADED}.py").write_text(bombs.module())
    return tmp_path


def problem(slot: str, path: Path, work: Path, watch: Watch, aerogel: Aerogel) -> str | None:
    """What is wrong with how a hostile path is met there; None when it is refused as it should be."""
    words = [word.replace("{}", str(path)) for word in SLOTS[slot]]
    watch.found, watch.on = [], True
    try:
        outcome = aerogel(*words)
    finally:
        watch.on = False
    left = sorted(p.name for p in work.iterdir() if p.name not in (f"{bombs.LOADED}.py", "__pycache__"))
    gone = [canary for canary in (work / bombs.CANARY, path.parent / bombs.CANARY) if canary.exists()]
    for canary in gone:
        canary.unlink()
    listed = slot.startswith("data check") and outcome.code == 2  # what that verb does with files it cannot use
    for name, wrong in {
        "executed": gone or watch.found,
        "left files": left,
        "was not refused": outcome.code != 1 and not listed,
        "said more than a line": not listed and (outcome.err.count("\n") != 1 or not outcome.err.startswith("error: ")),
        "was not foreseen": "unexpected" in outcome.err or "Traceback" in outcome.err + outcome.out,
        "controls the terminal": ESCAPES.search(outcome.out + outcome.err),
        "tells a secret": "root:" in outcome.out + outcome.err,
    }.items():
        if wrong:
            return f"{slot} {path.name!r} {name}: {wrong!r} {outcome.code} {outcome.err[-300:]!r}"
    return None


def kind_of(path: Path) -> str:
    return path.name.partition("_")[0].partition(".")[0].partition("\x1b")[0]


def test_the_bombs_are_live(work: Path, hostile: dict[str, list[Path]]) -> None:
    """Read the careless way, they explode: else the rest of this file proves nothing."""
    import pickle

    import numpy as np
    import torch

    def careless(path: Path) -> Any:
        return torch.load(path, weights_only=False)

    live = {path.name: path for path in hostile["file"]}
    readers: dict[str, Callable[[Path], Any]] = {
        "pickle_zip.pt": careless,
        "pickle_legacy.pt": careless,
        "pickle_state_and_bomb.pt": careless,
        "pickle_broken_stream.pt": lambda path: pickle.loads(path.read_bytes()),
        "pickle_objects_npy.pt": lambda path: np.load(path, allow_pickle=True),
    }
    readers |= {
        f"pickle_channel_{name}.pt": lambda path: pickle.loads(path.read_bytes())
        for name in ("os", "eval", "exec", "subprocess", "dotted", "import", "timeit")
    }
    for name, read in readers.items():
        try:
            sys.path.insert(0, str(work))
            read(live[name])
        except Exception:
            pass
        finally:
            sys.path.remove(str(work))
            sys.modules.pop(bombs.LOADED, None)
        assert (work / bombs.CANARY).exists(), name
        (work / bombs.CANARY).unlink()


def test_there_are_enough(hostile: dict[str, list[Path]]) -> None:
    assert sum(map(len, hostile.values())) >= LEAST
    assert {verb.split()[0] for verb in SLOTS} >= {
        "cost", "lint", "train", "compress", "prune", "distill", "resume", "export", "verify", "report", "data",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "saved", "run", "data"])
def test_what_is_hostile_is_refused_where_it_would_do_harm(
    kind: str, hostile: dict[str, list[Path]], work: Path, watch: Watch, aerogel: Aerogel
) -> None:
    """Every file in the places it is made for, and every third in one more that changes from file to file."""
    problems = []
    for number, path in enumerate(hostile[kind]):
        more = list(SLOTS)[number % len(SLOTS) : number % len(SLOTS) + (number % 3 == 0)]
        own = OWN[kind_of(path)]
        own = own if kind_of(path) not in MANY else own[number % len(own) :][:1]
        for slot in dict.fromkeys((*own, *more)):
            problems.append(problem(slot, path, work, watch, aerogel))
    found = [line for line in problems if line]
    assert not found, "\n".join(found)


@pytest.mark.faults
def test_all_hostile_files_in_all_places(
    hostile: dict[str, list[Path]], work: Path, watch: Watch, aerogel: Aerogel, faults_result: dict[str, object]
) -> None:
    paths = [path for kind in hostile.values() for path in kind]
    problems = [problem(slot, path, work, watch, aerogel) for slot in SLOTS for path in paths]
    found = [line for line in problems if line]
    assert not found, "\n".join(found)
    faults_result.update({"files": len(paths), "places": len(SLOTS), "refused": len(problems), "executed": 0})


def test_names_in_a_runs_state_lead_nowhere(work: Path) -> None:
    """What a run removes follows from its own numbering, never from a name that its files hold."""
    victim = work / "victim"
    for folder in (victim, work / "run/candidates/001"):
        folder.mkdir(parents=True)
    numbers = dict.fromkeys(("val_accuracy", "params", "macs", "flops", "access_bytes", "peak_bytes", "channels"), 1.0)
    numbers |= {"file_bytes": 1.0, "latency_ratio": 1.0, "target": 1.0}
    held = {f"candidate {k:03d}": numbers | {"name": str(victim), "val_accuracy": float(k)} for k in (1, 2)}
    run = Run(work / "run", Settings(model="lenet5", data="digits"), {"baseline": numbers, **held})
    marked = frontier(SimpleNamespace(size_key="macs"), run, 2)  # type: ignore[arg-type]
    assert [one["name"] for one in marked] == ["000", "001", "002"]
    assert victim.is_dir()
    assert not (work / "run/candidates/001").exists()  # beaten


@pytest.mark.parametrize("begun", [True, False])
def test_code_that_a_run_names_is_imported_only_where_it_was_begun(
    begun: bool, work: Path, monkeypatch: pytest.MonkeyPatch, aerogel: Aerogel
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    settings = Settings(model=f"{work}/{bombs.LOADED}.py:build", data="digits", target=["macs=0.5"])
    run = Run.create(settings, work / "run", {"data": "0" * 64, "check": {}})
    if not begun:  # as on another machine, or for another user
        monkeypatch.setenv("XDG_CACHE_HOME", str(work / "elsewhere"))
    outcome = aerogel("resume", run.path)
    assert outcome.code == 1
    assert ("canary_module.py:build', which is code, and was not begun by you" in outcome.err) is not begun
    assert (work / bombs.CANARY).exists() is begun
    assert aerogel("resume", run.path, "--trust").code == 1
    assert (work / bombs.CANARY).exists()
