"""Settings: command line over --config over defaults, absolute paths, and errors that name the option."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.compress.settings import Settings, resolve, to_toml, validated
from aerogel.errors import AerogelError
from aerogel.train import Recipe

LEAST = {"model": "lenet5", "data": "digits"}


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, 'model = "vgg11"\ndata = "mnist"\nsteps = 5\nthreads = 2\n[train]\nlr = 0.3\nepochs = 7\n')
    settings = resolve({"model": "lenet5", "data": None, "threads": 1, "train": {"lr": 0.1}}, file)
    assert (settings.model, settings.data, settings.steps, settings.threads) == ("lenet5", "mnist", 5, 1)
    assert (settings.train.lr, settings.train.epochs) == (0.1, 7)
    assert settings.max_drop == Settings(**LEAST).max_drop == 1.0


def test_what_was_given_is_left_as_it_was() -> None:
    options: dict[str, Any] = {**LEAST, "seed": 3, "train": {"lr": 0.1}}
    resolve(options, None)
    assert options == {**LEAST, "seed": 3, "train": {"lr": 0.1}}


PRUNE = {**LEAST, "verb": "prune"}


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "", ("l2", 0, "iterative", 3)),
        ({"method": "magnitude"}, "", ("l2", 0, "iterative", 3)),
        ({"method": "taylor", "schedule": "gradual"}, "", ("taylor", 0, "gradual", 8)),
        ({"method": "slimming"}, "", ("bn_scale", 0, "one-shot", 1)),
        ({"method": "slimming", "schedule": "iterative", "steps": 2}, "", ("bn_scale", 0, "iterative", 2)),
        ({"method": "slimming"}, "penalty = 0.01\nschedule = 'linear'", ("bn_scale", 0.01, "linear", 3)),
        ({"method": "l1"}, "method = 'slimming'\npenalty = 0.01", ("l1", 0, "one-shot", 1)),
        ({"schedule": "one-shot"}, "steps = 5", ("l2", 0, "one-shot", 1)),
        ({}, "method = 'lamp'\nschedule = 'gradual'\nsteps = 5", ("lamp", 0, "gradual", 5)),
    ],
    ids=range(9),
)
def test_a_method_stands_for_several_options(
    options: dict[str, Any], text: str, expected: tuple[str, float, str, int], tmp_path: Path
) -> None:
    settings = resolve(PRUNE | options, config(tmp_path, text))
    assert (settings.criterion, settings.penalty, settings.schedule, settings.steps) == expected
    assert settings.slimming is (settings.method == "slimming") is (expected[0] == "bn_scale")


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(AerogelError, match=r"--method 'tailor' is unknown; did you mean taylor\?"):
        resolve(PRUNE | {"method": "tailor"}, None)


def test_only_compress_limits_the_drop_unasked(tmp_path: Path) -> None:
    assert resolve(PRUNE, None).max_drop is None
    assert resolve(PRUNE | {"max_drop": 0.5}, None).max_drop == 0.5
    assert resolve({**LEAST, "max_drop": None}, config(tmp_path, "verb = 'compress'")).max_drop == 1.0
    assert resolve(PRUNE | {"target": ["macs=0.5"]}, None).goal == "macs=0.5"
    assert resolve(PRUNE | {"scan": True}, None).goal == "sensitivity scan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "one-shot", "steps": 2}, r"^one-shot makes one cut; leave --steps out"),
        ({"schedule": "gradual", "recover": 0}, r"^gradual cuts within the recovery"),
        ({"method": "slimming", "normalize": "max"}, r"^slimming has one threshold on raw scales"),
        ({"method": "l2", "penalty": 0.1}, r"^penalty belongs to slimming; choose --method slimming"),
    ],
    ids=["one-shot", "gradual", "slimming", "penalty"],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        resolve(PRUNE | options, None)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({}, [6, 6, 20]), ({"schedule": "gradual"}, [20]), ({"schedule": "one-shot"}, [20]), ({"recover": 0}, [0, 0, 0])],
    ids=["iterative", "gradual", "one-shot", "none"],
)
def test_a_recovery_follows_every_cut_or_holds_them_all(options: dict[str, Any], epochs: list[float]) -> None:
    assert resolve(PRUNE | {"train": {"epochs": 10}} | options, None).recoveries == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("typed", "text", "seeds"),
    [
        (None, "", (0, 0)),
        (3, "", (3, 3)),
        (None, "seed = 4", (4, 4)),
        (3, "seed = 4\n[train]\nseed = 5", (3, 3)),
        (None, "seed = 4\n[train]\nseed = 5", (4, 5)),
    ],
)
def test_one_seed_is_the_seed_of_all(typed: int | None, text: str, seeds: tuple[int, int], tmp_path: Path) -> None:
    settings = resolve({**LEAST, "seed": typed}, config(tmp_path, text))
    assert (settings.seed, settings.train.seed) == seeds


def test_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    here = Path.cwd()
    (here / "small").mkdir()
    settings = resolve({"model": "net.py:build", "data": "folder:pets", "weights": "a/w.pt"}, None)
    assert (settings.model, settings.data) == (f"{here}/net.py:build", f"folder:{here}/pets")
    assert settings.weights == f"{here}/a/w.pt"
    assert resolve({"model": "small", "data": "digits"}, None).model == f"{here}/small"
    named = resolve({"model": "vgg11:width=0.5", "data": "package.module:make"}, None)
    assert (named.model, named.data, named.weights) == ("vgg11:width=0.5", "package.module:make", None)


def test_the_home_folder_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve({**LEAST, "data": "folder:~/pets"}, None).data == "folder:/home/someone/pets"


def test_the_data_root_is_the_environments_else_the_files_else_the_current_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(LEAST, None).data_root is None
    Path("data").mkdir()
    assert resolve(LEAST, None).data_root == str(Path("data").absolute())
    file = config(tmp_path, 'data_root = "/held"')
    assert resolve(LEAST, file).data_root == "/held"
    monkeypatch.setenv("AEROGEL_DATA", "sets")
    assert resolve(LEAST, file).data_root == str(Path("sets").absolute())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", r"option 'stepz' is unknown; did you mean steps\?"),
        ("[train]\nepoch = 3", r"option 'train\.epoch' is unknown; did you mean epochs\?"),
        ("threads = 0", r"option threads: .*greater than or equal to 1, got 0"),
        ("max_drop = -1", r"option max_drop: .*got -1"),
        ("max_drop = nan", r"option max_drop: .*got nan"),
        ("seconds = inf", r"option seconds: .*finite.*got inf"),
        ('steps = "many"', r"option steps: .*integer.*got 'many'"),
        ('target = "macs=0.5"', r"option target: .*list.*got 'macs=0.5'"),
        ("input = [3, 224]", r"option input\.2: Field required, got \[3, 224\]"),
        ("train = 3", r"option train: .*got 3"),
        ("[train]\nepochs = 0", r"option train\.epochs: .*greater than 0, got 0"),
        ("[train]\nlr = -0.1", r"option train\.lr: .*greater than 0, got -0.1"),
    ],
)
def test_an_option_at_fault_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=message):
        resolve(LEAST, config(tmp_path, text))


@pytest.mark.parametrize(
    ("left", "remedy"),
    [
        ({"data": "digits"}, "model is missing; name a MODEL, such as lenet5, or give it in --config"),
        ({"model": "lenet5"}, "data is missing; name a set with --data, or give it in --config"),
    ],
)
def test_what_is_missing_is_named_with_its_option(left: dict[str, str], remedy: str) -> None:
    with pytest.raises(AerogelError, match=remedy):
        resolve(left, None)


@given(
    st.builds(
        Settings,
        model=st.text(min_size=1),
        data=st.text(min_size=1),
        target=st.lists(st.text(), max_size=2),
        verb=st.sampled_from(["compress", "prune"]),
        max_drop=st.none() | st.floats(0, 100),
        weights=st.none() | st.text(),
        input=st.none() | st.tuples(*[st.integers(1, 512)] * 3),
        seed=st.integers(0, 2**63 - 1),
        protect=st.lists(st.text(), max_size=2),
        train=st.builds(Recipe, lr=st.floats(1e-9, 1e3), ema=st.none() | st.floats(0.1, 0.9), seed=st.integers(0, 9)),
    )
)
def test_what_a_run_writes_back_is_read_as_it_was(settings: Settings) -> None:
    assert validated(tomllib.loads(to_toml(settings))) == settings


def test_what_toml_cannot_hold_is_refused_and_not_changed_in_silence() -> None:
    with pytest.raises(AerogelError, match=r"cannot hold train\.clip = None; .*clip = 1e9"):
        to_toml(Settings(**LEAST, train=Recipe(clip=None)))


def test_titles_are_short() -> None:
    settings = Settings(model="/home/me/net.py:build", data="folder:/home/me/pets", target=["macs=0.5", "latency=2ms"])
    assert settings.title == "net.py:build on folder:pets"
    assert settings.short_model == "net.py:build"
    assert settings.goal == "macs=0.5, latency=2ms, drop <= 1 pt"
    assert Settings(model="/home/me/small", data="digits").title == "small on digits"


def test_another_librarys_weights_get_an_absolute_path_too() -> None:
    options = {"model": "lenet5", "data": "digits"}
    assert resolve(options | {"weights": "timm:w.pt"}, None).weights == f"timm:{Path.cwd() / 'w.pt'}"
    assert resolve(options | {"weights": "w.pt"}, None).weights == str(Path.cwd() / "w.pt")
