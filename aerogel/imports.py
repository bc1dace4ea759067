"""Imports a user's own callable, named as `package.module:name` or `path/file.py:name`.

Only for what the user typed, never for text read from a saved file: importing runs code.
The folder of `file.py` (for a module: the current folder) joins the end of `sys.path`, so that the file's
neighbours import as they do under `python file.py` and no installed module is shadowed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from aerogel.errors import AerogelError, nearest

PACKAGE = str(Path(__file__).parent)


def import_factory(spec: str) -> Callable[..., Any]:
    """The callable that `spec` names.

    Raises AerogelError for a malformed spec, a missing file, module or attribute, an attribute that cannot be
    called, and for whatever the user's module raises while it is imported (with its file and line).
    """
    source, _, name = spec.rpartition(":")
    is_file = source.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in source.split("."))):
        raise AerogelError(
            f"import_factory: spec must be package.module:name or path/file.py:name, got {spec!r}; "
            "e.g. mypackage.models:build"
        )
    module = _import_file(spec, Path(source).expanduser()) if is_file else _import_module(spec, source)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise AerogelError(f"import_factory: {source} has no {name!r}, got {spec!r}; {nearest(name, public)}")
    factory = getattr(module, name)
    if not callable(factory):
        raise AerogelError(
            f"import_factory: {spec!r} must name a callable, got a {type(factory).__name__}; name a function"
        )
    return factory


def user_error(spec: str, error: BaseException) -> AerogelError:
    """What the user's own code raised, as one line with the file and line of that code."""
    line = _user_line(error)
    place = f" at {line}" if line else ""
    return AerogelError(f"{spec!r} raised {type(error).__name__}: {one_line(error)}{place}; mend it there")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, printable characters only: a library's may have many, ours has one."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return "".join(c for c in line if c.isprintable())[:300]


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise AerogelError(f"import_factory: no file {path}, got {spec!r}; it is looked for from {Path.cwd()}")
    path = path.resolve()
    # The name holds the time of change: one import per version of the file, its classes shared by all.
    tag = hashlib.sha256(f"{path}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"aerogel_user_{path.stem}_{tag}"
    if name in sys.modules:
        return sys.modules[name]
    _append_path(path.parent)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # a .py suffix always has a loader
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)):
            raise user_error(spec, error) from error
        raise
    return module


def _import_module(spec: str, source: str) -> ModuleType:
    _append_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise AerogelError(
                f"import_factory: no module {missing!r}, got {spec!r}; install it, or run where its folder is"
            ) from error
        raise user_error(spec, error) from error


def _append_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _user_line(error: BaseException) -> str | None:
    """`file:line`, the deepest of the first file in the traceback that is neither ours nor the importer's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    ours = (PACKAGE, "<frozen", importlib.__file__)
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    if not theirs:
        return None
    deepest = [frame for frame in theirs if frame.filename == theirs[0].filename][-1]
    return f"{deepest.filename}:{deepest.lineno}"
