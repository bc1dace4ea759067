"""kill -9 at random moments, many inside a save: the resumed run ends bit for bit where the unbroken one does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from aerogel.train.checkpoint import damage

PATIENCE = 60.0  # seconds without a word from a child, and for the survivors of a killed rank
QUICK, FULL, FULL_RANKS = 20, 200, 50
SCRIPT = Path(__file__).with_name("zygote.py")
LEAST_INSIDE = 0.3  # of the kills
TRIES = 10  # on a busy machine the word that a run shall be killed at may be heard after its end


class Zygote:
    """The warm process, and the lines it says."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env={**os.environ, "AEROGEL_TEST_LOOPBACK": "1"},  # where two ranks meet
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a killed rank's partner complains, as it should
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._rest = b""
        self._lines: list[list[str]] = []
        assert self.next(5 * PATIENCE) == ["ready"]

    def start(self, folder: Path, ranks: int) -> dict[int, int]:
        """rank -> pid of what now trains in `folder`."""
        job = {"folder": str(folder / "checkpoints"), "final": str(folder / "final"), "ranks": ranks, "port": port()}
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        self.process.stdin.flush()
        pids: dict[int, int] = {}
        while len(pids) < ranks:
            word, rank, pid = self.next()
            assert word == "child"
            pids[int(rank)] = int(pid)
        return pids

    def next(self, seconds: float = PATIENCE) -> list[str]:
        """The words of the next line. Lines said by now come at once."""
        end = time.monotonic() + seconds
        while not self._lines:
            assert time.monotonic() < end, "a child says nothing"
            if self._selector.select(1.0):
                *lines, self._rest = (self._rest + os.read(self._out, 2**16)).split(b"\n")
                self._lines += [line.decode().split(" ") for line in lines]
        return self._lines.pop(0)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Life(NamedTuple):
    """What was heard of one start until all its processes were gone."""

    heard: list[list[str]]
    statuses: dict[int, int]
    seconds: float  # from the kill to the end of the last process

    @property
    def inside(self) -> bool:
        """Whether a save had begun and was not done when it ended."""
        words = [line[0] for line in self.heard]
        return words.count("save") > words.count("saved")

    @property
    def saved(self) -> int:
        return max((int(line[2]) for line in self.heard if line[0] == "saved"), default=0)


def live(zygote: Zygote, folder: Path, ranks: int, dice: random.Random | None = None, total: int = 0) -> Life:
    """Trains; killed at a moment of `total` steps that the dice choose, or to its end without them."""
    pids = zygote.start(folder, ranks)
    heard: list[list[str]] = []
    statuses: dict[int, int] = {}
    kill_at = dice.randrange(1, total) if dice else None
    word = "save" if dice and dice.random() < 0.6 else "saved"
    delay = dice.random() * (0.02 if word == "save" else 0.01) if dice else 0.0
    victim = dice.randrange(ranks) if dice and word == "saved" else 0  # rank 0 saves
    seen, killed = 0, time.monotonic()
    while len(statuses) < ranks:
        line = zygote.next()
        assert line[0] != "damaged", line
        if line[0] == "exit":
            statuses[int(line[1])] = int(line[2])
            continue
        heard.append(line)
        seen += line[0] == word
        if kill_at is not None and seen == kill_at:
            time.sleep(delay)
            os.kill(pids[victim], signal.SIGKILL)
            kill_at, killed = None, time.monotonic()
    return Life(heard, statuses, time.monotonic() - killed)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    warm = Zygote()
    yield warm
    warm.close()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def killed(zygote: Zygote, run: Path, ranks: int, dice: random.Random, total: int) -> list[Life]:
    """One or two lives of a run, those of them that a kill ended: one that was done before its moment came is none."""
    run.mkdir()
    found = []
    for _ in range(dice.choice((1, 2))):
        life = live(zygote, run, ranks, dice, total)
        if -signal.SIGKILL in life.statuses.values():
            found.append(life)
        steps = sorted((run / "checkpoints").glob("step_*"))
        assert [damage(path) for path in steps] == [None] * len(steps)
        newest = int(steps[-1].name[5:]) if steps else 0
        assert newest >= life.saved  # what was said to be saved is
    return found


def check_kills(zygote: Zygote, folder: Path, ranks: int, runs: int) -> dict[str, float]:
    """Every one of `runs` runs is killed once or twice, resumed, and ends as the unbroken one."""
    (folder / "whole").mkdir()
    whole = live(zygote, folder / "whole", ranks)
    assert whole.statuses == dict.fromkeys(range(ranks), 0)
    assert whole.saved >= 10
    expected = digest(folder / "whole" / "final")
    kills: list[Life] = []
    for number in range(runs):
        dice = random.Random(number)
        for again in range(TRIES):
            run = folder / f"{number}_{again}"
            if lives := killed(zygote, run, ranks, dice, whole.saved):
                break
        assert lives, "it was always done before its moment came"
        kills += lives
        last = live(zygote, run, ranks)
        assert last.statuses == dict.fromkeys(range(ranks), 0)
        assert digest(run / "final") == expected, number
        assert not list((run / "checkpoints").glob(".*"))  # nothing half-written is left
    inside, slowest = sum(life.inside for life in kills), max(life.seconds for life in kills)
    assert runs < QUICK or inside >= LEAST_INSIDE * len(kills), (inside, len(kills))
    assert slowest <= PATIENCE
    return {"runs": runs, "kills": len(kills), "inside a save": inside, "slowest end": round(slowest, 1)}


def test_killed_and_resumed_it_ends_as_if_unbroken(zygote: Zygote, tmp_path: Path) -> None:
    check_kills(zygote, tmp_path, 1, QUICK)


@pytest.mark.distributed
def test_two_ranks_killed_and_resumed_end_as_if_unbroken(zygote: Zygote, tmp_path: Path) -> None:
    check_kills(zygote, tmp_path, 2, 2)


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "runs"), [(1, FULL), pytest.param(2, FULL_RANKS, marks=pytest.mark.distributed)])
def test_all_kills(ranks: int, runs: int, zygote: Zygote, tmp_path: Path, faults_result: dict[str, object]) -> None:
    faults_result.update(check_kills(zygote, tmp_path, ranks, runs))
