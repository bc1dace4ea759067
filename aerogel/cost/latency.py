"""The time one run of an exported file takes, measured by ONNX Runtime on this machine's CPU.

Two things make naive timings lie, and both are met here.
- A session keeps for life the luck of its memory addresses, worth a few tenths of a percent. Two sessions of
  one file differ, and more runs only make that surer. So the time is split into rounds, each with fresh
  sessions; a round counts as one value, and intervals come from the rounds (order statistics, aerogel.stats).
- A shared machine changes its speed from one second to the next. So two files are compared in pairs of short
  blocks of runs, A B or B A by chance, and which file is opened first in a round is chance too. Of two equal
  files each round then favours either with probability 1/2, whatever the machine does, and "faster" (the
  whole interval of B / A below 1) is said wrongly in at most 2.5 % of the comparisons.

A block is about 2 ms of runs timed one by one, after one that is not timed; its value is the median. Inputs
are standard normal. Times are wall-clock milliseconds of one run of the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from aerogel.errors import AerogelError
from aerogel.export.verify import available_cores, flushing_denormals, open_session
from aerogel.imports import one_line
from aerogel.stats import Interval, median_interval

BLOCK_MS = 2.0
WARM_UP_RUNS, WARM_UP_SECONDS = 10, 0.1
MIN_ROUNDS, MAX_ROUNDS = 9, 20  # of 9 values the 95 % interval leaves out the smallest and the largest
BUFFERS = 4  # inputs take turns
NOISY = 0.1  # interquartile range over median

DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}

Blocks = list[np.ndarray]  # of one file in one round: the milliseconds of each run


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run. `low_ms` and `high_ms` are the 95 % interval of the median over rounds;
    `p90_ms` and `iqr_ms` are over all runs. `load` is the one-minute load average at the start.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    iqr_ms: float
    runs: int
    threads: int
    batch: int
    noisy: bool
    load: float
    runtime: str
    cpu: str

    def describe(self) -> str:
        """As in "0.412 ms [0.409, 0.416] p90 0.43 (1 thread, batch 1)"."""
        median, low, high, p90 = (
            f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in (self.median_ms, self.low_ms, self.high_ms, self.p90_ms)
        )
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{median} ms [{low}, {high}] p90 {p90} ({threads}, batch {self.batch})"


@dataclass(frozen=True)
class Ratio:
    """The time of B over the time of A with its 95 % interval, and both latencies from the same runs."""

    ratio: Interval
    a: Latency
    b: Latency
    pairs: int


def measure(path: Path, *, threads: int = 1, batch: int = 1, seconds: float = 1.0, seed: int = 0) -> Latency:
    """Time one file for about `seconds` (longer when 9 rounds do not fit).

    Raises AerogelError when the file is absent, corrupt or does not take the batch, or threads is below 1.
    """
    load = os.getloadavg()[0]
    (rounds,) = _measure((Path(path),), threads, batch, seconds, seed)
    return _latency(rounds, threads, batch, load)


def compare(
    path_a: Path, path_b: Path, *, threads: int = 1, batch: int = 1, seconds: float = 3.0, seed: int = 0
) -> Ratio:
    """Time two files side by side for about `seconds`; a ratio below 1 means that B is faster.

    Raises AerogelError as `measure` does.
    """
    load = os.getloadavg()[0]
    a, b = _measure((Path(path_a), Path(path_b)), threads, batch, seconds, seed)
    latency_a, latency_b = (_latency(rounds, threads, batch, load) for rounds in (a, b))
    return Ratio(_ratio(a, b), latency_a, latency_b, pairs=sum(len(blocks) for blocks in a))


def _measure(paths: tuple[Path, ...], threads: int, batch: int, seconds: float, seed: int) -> list[list[Blocks]]:
    """[file][round] -> blocks; all files take part in every round."""
    if not 0 < seconds < math.inf:
        raise AerogelError(f"measure: seconds must be above 0, got {seconds}")
    if batch < 1:
        raise AerogelError(f"measure: batch must be >= 1, got {batch}")
    rng = np.random.default_rng(seed)
    with no_garbage_collection(), flushing_denormals():
        setup_ms, run_ms = np.array([_probe(path, threads, batch, rng) for path in paths]).T
        # One block size for all: the first runs of a block are slower, so a longer block would look faster.
        runs = math.ceil(BLOCK_MS / float(np.exp(np.mean(np.log(run_ms)))))
        # Opening sessions takes at most half of the time, unless that leaves too few rounds.
        opening_ms = float(np.sum(setup_ms + (1 + runs) * run_ms))
        count = int(np.clip(1000 * seconds / (2 * opening_ms), MIN_ROUNDS, MAX_ROUNDS))
        rounds = [_round(paths, runs, threads, batch, seconds / count, rng) for _ in range(count)]
    return [list(blocks) for blocks in zip(*rounds, strict=True)]


def _round(
    paths: tuple[Path, ...],
    runs: int,
    threads: int,
    batch: int,
    seconds: float,
    rng: np.random.Generator,
) -> list[Blocks]:
    """Fresh sessions, then one block of each file in turn until the time is over. Every order is chance."""
    end = time.perf_counter() + seconds
    order = rng.permutation(len(paths))
    runners = {i: _Runner(paths[i], threads, batch, rng) for i in order}
    for i in order:
        runners[i].block(runs)
    blocks: list[Blocks] = [[] for _ in paths]
    while True:
        for i in rng.permutation(len(paths)):
            blocks[i].append(runners[i].block(runs))
        if time.perf_counter() >= end:
            return blocks


def _probe(path: Path, threads: int, batch: int, rng: np.random.Generator) -> tuple[float, float]:
    """Milliseconds to open a session and to run it once warm. What a file cannot do is told here."""
    start = time.perf_counter()
    runner = _Runner(path, threads, batch, rng)
    opened = time.perf_counter()
    runs: list[np.ndarray] = []
    try:
        while not runs or time.perf_counter() - opened < WARM_UP_SECONDS:
            runs.append(runner.block(WARM_UP_RUNS))
    except Exception as error:
        raise AerogelError(f"measure: {path} does not run with batch {batch}: {one_line(error)}") from error
    return 1000 * (opened - start), float(np.median(runs[len(runs) // 2 :]))


class _Runner:
    """A fresh session whose inputs are bound beforehand: the call into ONNX Runtime is all that is timed."""

    def __init__(self, path: Path, threads: int, batch: int, rng: np.random.Generator) -> None:
        self.session = open_session(path, threads=threads)
        feeds = self.session.get_inputs()
        fixed = next((size for feed in feeds[:1] for size in feed.shape[:1] if isinstance(size, int)), batch)
        if fixed != batch:
            raise AerogelError(
                f"measure: {path} takes batches of {fixed} only, got batch={batch}; "
                "pass that, or export a model that leaves the batch free"
            )
        self.bindings = [self.session.io_binding() for _ in range(BUFFERS)]
        for binding in self.bindings:
            for feed in feeds:
                binding.bind_cpu_input(feed.name, _example(path, feed, batch, rng))
            for output in self.session.get_outputs():
                binding.bind_output(output.name)

    def block(self, runs: int) -> np.ndarray:
        """Milliseconds of each of `runs` runs, after one that brings this model back into the caches."""
        run, clock = self.session.run_with_iobinding, time.perf_counter_ns
        run(self.bindings[-1])
        times = np.empty(runs)
        for i in range(runs):
            binding = self.bindings[i % BUFFERS]
            start = clock()
            run(binding)
            times[i] = clock() - start
        return times / 1e6


def example_feeds(
    path: Path, session: onnxruntime.InferenceSession, batch: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Inputs that the file runs on: standard normal, or zeros where it takes no floats."""
    return {feed.name: _example(path, feed, batch, rng) for feed in session.get_inputs()}


def _example(path: Path, feed: onnxruntime.NodeArg, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal numbers for a float input of the file, zeros for any other."""
    free = feed.shape and not isinstance(feed.shape[0], int)
    shape = [batch, *feed.shape[1:]] if free else feed.shape
    if feed.type not in DTYPES or not all(isinstance(size, int) for size in shape):
        raise AerogelError(
            f"measure: input {feed.name} of {path} is {feed.type} of shape {feed.shape}; "
            "only plain tensors with no free size but the batch can be timed"
        )
    dtype = DTYPES[feed.type]
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def _ratio(a: list[Blocks], b: list[Blocks]) -> Interval:
    """The time of B over that of A: the median over the pairs of a round, then over the rounds."""
    rounds = [
        np.median([np.median(y) / np.median(x) for x, y in zip(*pairs, strict=True)])
        for pairs in zip(a, b, strict=True)
    ]
    return median_interval(rounds)


def _latency(rounds: list[Blocks], threads: int, batch: int, load: float) -> Latency:
    middle = median_interval([np.median(np.concatenate(blocks)) for blocks in rounds])
    runs = np.concatenate([block for blocks in rounds for block in blocks])
    low, high, p90 = np.percentile(runs, [25, 75, 90])
    return Latency(
        median_ms=middle.value,
        low_ms=middle.low,
        high_ms=middle.high,
        p90_ms=float(p90),
        iqr_ms=float(high - low),
        runs=len(runs),
        threads=threads,
        batch=batch,
        noisy=bool(high - low > NOISY * middle.value or load > available_cores()),
        load=load,
        runtime=f"onnxruntime {onnxruntime.__version__}",
        cpu=cpu_name(),
    )


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, or as Python does where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def last_cache_bytes() -> int:
    """The size of the processor's last cache as Linux tells it; 8 MiB where it does not."""
    sizes = [8 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes[1:] or sizes)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
