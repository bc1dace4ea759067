"""Importing a user's factory, and telling whose mistake it is when that fails."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aerogel.errors import AerogelError
from aerogel.imports import import_factory, user_error


@pytest.fixture(autouse=True)
def clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder; forget the modules and search paths of the test afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


def test_module_in_the_current_folder() -> None:
    write("own_pkg/__init__.py", "")
    write("own_pkg/nets.py", "def build(width=1):\n    return width * 2\n")
    assert import_factory("own_pkg.nets:build")(3) == 6


def test_file_with_its_neighbour_and_a_class_that_pickles() -> None:
    write("code/helper_of_file.py", "VALUE = 5\n")
    write("code/own.py", "import helper_of_file\nclass Net:\n    value = helper_of_file.VALUE\n")
    net = import_factory("code/own.py:Net")
    assert net().value == 5
    assert type(pickle.loads(pickle.dumps(net()))) is net
    assert import_factory(str(Path("code/own.py").resolve()) + ":Net") is net  # one import a version


def test_same_file_name_in_two_folders_and_a_changed_file() -> None:
    write("a/own.py", "def f():\n    return 'a'\n")
    write("b/own.py", "def f():\n    return 'b'\n")
    assert import_factory("a/own.py:f")() == "a"
    assert import_factory("b/own.py:f")() == "b"
    write("a/own.py", "def f():\n    return 'changed'\n")
    os.utime("a/own.py", ns=(1, 1))
    assert import_factory("a/own.py:f")() == "changed"


def test_nothing_installed_is_shadowed() -> None:
    write("json.py", "raise RuntimeError('shadowed')\n")
    assert import_factory("json:dumps") is json.dumps
    assert sys.path[0] != str(Path.cwd())


@pytest.mark.parametrize("spec", ["", "name", ":f", "pkg:", "pkg:f.g", "pkg.:f", ".pkg:f", "a b:f", "own-net:f", "x:1"])
def test_malformed_spec_is_refused(spec: str) -> None:
    with pytest.raises(AerogelError, match=r"spec must be package.module:name or path/file.py:name"):
        import_factory(spec)


def test_missing_file_module_and_attribute() -> None:
    write("own.py", "def build_net(): ...\nWIDTH = 3\n")
    with pytest.raises(AerogelError, match=r"no file nowhere.py, got 'nowhere.py:f'; it is looked for from /"):
        import_factory("nowhere.py:f")
    with pytest.raises(AerogelError, match=r"no module 'no_such_pkg', got 'no_such_pkg.sub:f'; install it"):
        import_factory("no_such_pkg.sub:f")
    with pytest.raises(AerogelError, match=r"no module 'own.sub'"):
        import_factory("own.sub:f")
    with pytest.raises(AerogelError, match=r"own.py has no 'build_nte', .*did you mean build_net"):
        import_factory("own.py:build_nte")
    with pytest.raises(AerogelError, match=r"'own.py:WIDTH' must name a callable, got a int"):
        import_factory("own.py:WIDTH")


@pytest.mark.parametrize("spec", ["bad_own.py:f", "bad_own:f"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nimport no_such_dependency\n",
            "raised ModuleNotFoundError: No module named 'no_such_dependency' at .*bad_own.py:2;",
        ),
        ("x = 1\n\nx.y\n", "raised AttributeError: .* at .*bad_own.py:3;"),
        ("def g():\n    raise ValueError('one\\ntwo')\ng()\n", "raised ValueError: one at .*bad_own.py:2;"),
        ("import json\njson.loads('{')\n", "raised JSONDecodeError: .* at .*bad_own.py:2;"),
        ("def f(:\n", "raised SyntaxError: .* at .*bad_own.py:1;"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit: 3 at .*bad_own.py:2;"),
        ("raise RuntimeError\n", "raised RuntimeError: no message at .*bad_own.py:1;"),
    ],
)
def test_error_in_the_users_module_is_told_with_its_line(spec: str, text: str, message: str) -> None:
    write("bad_own.py", text)
    before = set(sys.modules)
    with pytest.raises(AerogelError, match=message) as caught:
        import_factory(spec)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not any("bad_own" in name for name in set(sys.modules) - before)


def test_interrupt_is_passed_on_and_leaves_no_half_module() -> None:
    write("own.py", "raise KeyboardInterrupt\n")
    before = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        import_factory("own.py:f")
    assert set(sys.modules) == before


def test_user_error_names_the_callers_line() -> None:
    write("own.py", "def f(x):\n    return 1 / x\n")
    factory = import_factory("own.py:f")
    try:
        factory(0)
    except ZeroDivisionError as error:
        told = user_error("own.py:f", error)
    assert "raised ZeroDivisionError: division by zero at " in str(told)
