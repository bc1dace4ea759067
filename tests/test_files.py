"""Writes are whole or absent, and on the disk before they are said to be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.files import (
    new_folder,
    read_json,
    read_toml,
    refuse_existing,
    replacing,
    sha256,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and rename as (call, name of the file or folder), in order."""
    calls: list[tuple[str, str]] = []

    def recorded(call: str, name: Callable[..., str]) -> None:
        real = getattr(os, call)

        def record(*args: Any, **options: Any) -> Any:
            calls.append((call, name(*args)))
            return real(*args, **options)

        monkeypatch.setattr(os, call, record)

    recorded("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    recorded("replace", lambda source, target: Path(target).name)
    recorded("rename", lambda source, target: Path(target).name)
    return calls


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, trace: list[tuple[str, str]]
) -> None:
    with replacing(tmp_path / "a.txt") as temp:
        assert temp.parent == tmp_path  # one disk: the rename is atomic
        temp.write_text("new")
    assert trace == [("fsync", temp.name), ("replace", "a.txt"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_all_of_a_folder_is_synced_before_it_is_renamed(tmp_path: Path, trace: list[tuple[str, str]]) -> None:
    with new_folder(tmp_path / "a", "test") as temp:
        assert temp.parent == tmp_path
        (temp / "sub").mkdir()
        (temp / "sub" / "one").write_text("1")
        (temp / "two").write_text("2")
        trace.clear()
    assert {("fsync", name) for name in ("one", "two", "sub", temp.name)} == set(trace[:4])
    assert trace[3:] == [("fsync", temp.name), ("rename", "a"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a" / "sub" / "one").read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_a_file_is_replaced_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temp:
            temp.write_text("half")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
    write_text(path, "näw")
    assert path.read_bytes() == "näw".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_folder_that_fails_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "a", "test") as temp:
            (temp / "file").write_text("half")
            raise error("mine")

    with pytest.raises((RuntimeError, KeyboardInterrupt, AerogelError), match="mine"):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_is_told_in_one_line(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    if call == "open":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(
        AerogelError, match=r"^cannot write .*/a\.txt: No space left on device; \d+ MiB are free"
    ) as caught:
        write_text(path, "new")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_folder_on_a_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(AerogelError, match=r"^cannot write .*/a: No space left on device; \d+ MiB are free"),
        new_folder(tmp_path / "a", "test") as temp,
    ):
        (temp / "file").write_text("whole")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_text", denied)
    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(AerogelError, match=r"^cannot write .*/a: Permission denied; .*make room or write elsewhere$"):
        write_text(tmp_path / "a", "")
    with (
        pytest.raises(AerogelError, match=r"^cannot write .*/b: Permission denied; .*make room or write elsewhere$"),
        new_folder(tmp_path / "b", "test"),
    ):
        pass


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AerogelError, match=r"cannot write .*/file/a: Not a directory"):
        write_text(tmp_path / "file" / "a", "")
    with (
        pytest.raises(AerogelError, match=r"cannot write .*/file/a: Not a directory"),
        new_folder(tmp_path / "file" / "a", "t"),
    ):
        pass
    with pytest.raises(AerogelError, match=r"cannot write .*: Is a directory"):
        write_text(tmp_path, "")
    with pytest.raises(AerogelError, match=r"cannot write .*/nowhere/a: No such file or directory"):
        write_text(tmp_path / "nowhere" / "a", "")


def test_a_folder_makes_its_parents(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b" / "c", "test") as temp:
        (temp / "file").write_text("1")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "1"


def make_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize(
    "make",
    [make_file, Path.mkdir, lambda path: path.symlink_to(path.parent), lambda path: path.symlink_to("nowhere")],
    ids=["file", "folder", "link", "dangling link"],
)
def test_nothing_is_overwritten(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path)
    before = path.lstat()
    with (
        pytest.raises(AerogelError, match=r"^save: .*/a exists and is never overwritten; name another"),
        new_folder(path, "save"),
    ):
        pytest.fail("entered")
    with pytest.raises(AerogelError, match=r"^save: .*/a exists and is never overwritten; name another"):
        refuse_existing(path, "save")
    assert path.lstat() == before
    assert names(tmp_path) == ["a"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(AerogelError, match=r"cannot write .*/a: Not a directory"), new_folder(path, "save"):
        make_file(path)
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def private_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("private_umask")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with new_folder(tmp_path / "folder", "test") as temp:
        (temp / "inside").write_text("")
    found = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/inside")}
    assert found == {"file": 0o640, "folder": 0o750, "folder/inside": 0o640}


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ä"], "b": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    assert json.loads((tmp_path / "a.json").read_text()) == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "not JSON compliant"), (object(), "not JSON serializable"), ({(1,): 2}, "keys must be")],
)
def test_what_json_cannot_hold_is_refused_before_writing(value: object, reason: str, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(AerogelError, match=rf"^cannot write .*/a\.json: .*{reason}.*; give finite numbers"):
        write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_what_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(AerogelError, match=r"^[^\n]*/a\.json is not JSON \([^\n]*\); it is corrupt[^\n]*$"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"^cannot read .*/a\.json: No such file or directory$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(AerogelError, match=r"^cannot read .*: Is a directory$"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"), [(b"steps: 3\n", "line 1"), (b"\xff\xfe\x00", "0xff"), (b"a = " + b"[" * 100_000, "recursion")]
)
def test_what_is_not_toml_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(
        AerogelError, match=rf"^[^\n]*/a\.toml is not TOML: [^\n]*{told}[^\n]*; name an existing TOML file$"
    ):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(AerogelError, match=rf"^lint: [^\n]*/a\.toml is not TOML: [^\n]*{told}[^\n]*; give allow$"):
        read_toml(tmp_path / "a.toml", "lint", "give allow")


def test_a_missing_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        AerogelError, match=r"^cannot read .*/a\.toml: No such file or directory; name an existing TOML"
    ):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(AerogelError, match=r"^--budget: cannot read .*: Is a directory; name another$"):
        read_toml(tmp_path, "--budget", "name another")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aerogel")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"aerogel").hexdigest()


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    """SIGKILL between writing and renaming: the old file is whole, the new folder absent."""
    write_text(tmp_path / "a", "old")
    script = (
        "import os, pathlib, sys; from aerogel.files import new_folder, replacing; path = pathlib.Path(sys.argv[1])\n"
        "with replacing(path / 'a') as file, new_folder(path / 'b', 'test') as folder:\n"
        "    file.write_text('half'); (folder / 'c').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "a").read_text() == "old"
    assert not (tmp_path / "b").exists()
    assert all(name == "a" or (name.startswith(".") and name.endswith(".tmp")) for name in names(tmp_path))
