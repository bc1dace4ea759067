"""Several processes make the steps that one would make; they stop, go back and end together."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from aerogel.errors import AerogelError
from aerogel.train.distributed import ALONE, current, lost_processes, started

SCRIPT = Path(__file__).with_name("ranks.py")
SAME = (
    "plain", "norms", "cumulative norms", "average, adamw, clipped", "in parts", "teacher and penalty",
    "objective's own weight",
)  # fmt: skip
MORE = (
    "own statistics", "stopped", "rolled back", "rolled back to a save", "in more parts than rows", "a norm of its own",
)  # fmt: skip
pytestmark = pytest.mark.distributed


class Told(NamedTuple):
    folder: Path
    ranks: list[dict[str, Any]]  # what each process wrote


def run(as_ranks: Callable[..., None], folder: Path, ranks: int, *names: str) -> Told:
    """The script in so many processes, as torchrun would start them."""
    folder.mkdir()
    as_ranks(SCRIPT, ranks, folder, *names)
    return Told(folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, as_ranks: Callable[..., None]) -> tuple[Told, Told]:
    """(one process, three of them) on the same jobs: 41 and 40 rows are no multiples of three."""
    base = tmp_path_factory.mktemp("ranks")
    names = (*SAME, *MORE)
    return run(as_ranks, base / "one", 1, *names), run(as_ranks, base / "three", 3, *names)


@pytest.mark.parametrize("name", SAME)
def test_three_processes_train_as_one(name: str, both: tuple[Told, Told]) -> None:
    one, three = both
    for ours, theirs in zip(three.ranks[0][name]["losses"], one.ranks[0][name]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert three.ranks[1][name] == three.ranks[0][name] == three.ranks[2][name], "all tell the whole batch's losses"
    expected, found = (load_file(told.folder / f"{name}.safetensors") for told in both)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_norms_may_keep_the_statistics_of_their_own_rows(both: tuple[Told, Told]) -> None:
    one, three = (load_file(told.folder / "own statistics.safetensors") for told in both)
    assert not torch.allclose(one["net.1.running_var"], three["net.1.running_var"], rtol=1e-3)
    synced = load_file(both[1].folder / "norms.safetensors")
    assert not torch.allclose(synced["net.1.weight"], three["net.1.weight"], rtol=1e-6)


def test_a_signal_to_one_stops_all_at_one_step(both: tuple[Told, Told]) -> None:
    one, three = both
    assert one.ranks[0]["stopped"] == {"stopped": 3, "signal": signal.SIGTERM}
    assert three.ranks[0]["stopped"] == {"stopped": 4, "signal": signal.SIGTERM}
    assert [told["stopped"]["stopped"] for told in three.ranks] == [4, 4, 4]


def test_a_loss_that_is_no_number_takes_all_back_once(both: tuple[Told, Told]) -> None:
    for told in both:
        for rank in told.ranks:
            found = rank["rolled back"]
            assert found["lr_scale"] == 0.5
            assert found["steps"] == 10
            (said,) = found["said"]
            assert said.endswith("back from step 6 to 0, on with half the learning rate")


def test_all_go_back_to_what_rank_0_saved(both: tuple[Told, Told]) -> None:
    for told in both:
        for rank in told.ranks:
            found = rank["rolled back to a save"]
            assert (found["lr_scale"], found["steps"], found["calls"]) == (0.5, 10, 11)
            assert found["said"][0].endswith("back from step 6 to 5, on with half the learning rate")


def test_a_batch_has_as_many_parts_in_every_process(both: tuple[Told, Told]) -> None:
    for told in both:
        assert "losses" in told.ranks[0]["in more parts than rows"]


def test_a_norm_that_computes_something_else_is_refused(both: tuple[Told, Told]) -> None:
    one, three = both
    assert "losses" in one.ranks[0]["a norm of its own"]
    for rank in three.ranks:
        said = rank["a norm of its own"]["error"]
        assert said.startswith("train: Act has a forward of its own")
        assert said.endswith("set sync_norms = false under [train]")


def test_torchruns_words_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started() == ALONE == current()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    assert (started().rank, started().ranks) == (5, 8)
    assert current() == ALONE, "nothing was joined"
    monkeypatch.setenv("RANK", "gold")
    assert started() == ALONE
    monkeypatch.delenv("RANK")
    assert started() == ALONE


def fails(text: str) -> Callable[[], None]:
    def raise_it() -> None:
        raise RuntimeError(text)

    return raise_it


def test_a_broken_connection_is_one_line_and_other_errors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    gone = "[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1234\nmore"
    told = r"rank 1 of 2 has lost another process .*pair.cc.*torchrun names the one"
    with pytest.raises(AerogelError, match=told), lost_processes(started()):
        fails(gone)()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), lost_processes(started()):
        fails("mat1 and mat2 shapes cannot be multiplied")()
    with pytest.raises(RuntimeError, match="closed by peer"), lost_processes(ALONE):
        fails(gone)()
