"""The front door: quick to open, every name behind it, and errors that point at the right one."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aerogel
from aerogel.errors import LISTED, AerogelError, CaptureError, CutError, DataError, Interrupted, nearest


def test_importing_it_does_not_import_torch() -> None:
    script = (
        "import aerogel, sys; from aerogel import AerogelError; print({'torch', 'numpy', 'onnx'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
    assert found.stderr == ""


@pytest.mark.parametrize("name", aerogel.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(aerogel, name) is not None
    assert name in dir(aerogel)


def test_public_names_are_what_they_say() -> None:
    from aerogel.export import load, save
    from aerogel.graph import capture

    assert (aerogel.capture, aerogel.load, aerogel.save) == (capture, load, save)
    assert aerogel.AerogelError is AerogelError
    assert aerogel.nets.NETS
    assert callable(aerogel.cost.count)
    assert callable(aerogel.prune.cut)
    assert callable(aerogel.distill.soft_target_loss)
    assert callable(aerogel.train.fit)
    assert callable(aerogel.data.load)
    assert aerogel.export.save is aerogel.save
    assert sorted(aerogel.__all__) == aerogel.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aerogel' has no attribute 'prun'"):
        aerogel.prun  # noqa: B018
    assert not hasattr(aerogel, "_private")


def test_the_version_is_the_packages() -> None:
    assert aerogel.__version__ == importlib.metadata.version("aerogel")


@pytest.mark.parametrize("kind", [CaptureError, CutError, DataError])
def test_every_mistake_is_an_aerogel_error_and_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, AerogelError)
    assert issubclass(kind, ValueError)


def test_an_interruption_is_none_of_them_and_knows_its_signal() -> None:
    error = Interrupted(15)
    assert not isinstance(error, AerogelError)
    assert (error.signal, str(error)) == (15, "stopped by signal 15")
    assert pickle.loads(pickle.dumps(error)).signal == 15


def test_nearest_names_what_may_be_meant() -> None:
    assert nearest("resnet19", ["resnet18", "vgg16"]) == "did you mean resnet18?"
    assert nearest("vgg1", ["vgg19", "vgg16", "lenet"]) in (
        "did you mean vgg19 or vgg16?",
        "did you mean vgg16 or vgg19?",
    )
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("a", []) == "known: none"
    many = [f"layer{number:03d}" for number in range(LISTED + 5)]
    assert nearest("zzz", many) == f"known: {', '.join(many[:LISTED])} and 5 more"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1), min_size=1), st.data())
def test_nearest_finds_a_name_that_is_known(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    assert f"did you mean {name}" in nearest(name, known)
