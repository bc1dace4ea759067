"""The command `aerogel`: one verb a job, thin. Heavy imports wait until a verb runs, so that --help answers at once.

Exit codes: 0 done, goal met; 2 goal missed, the best result is written; 1 error; 130 interrupted; 75 preempted.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel import options as o
from aerogel.errors import AerogelError, Interrupted

if TYPE_CHECKING:
    from torch import nn

    from aerogel.console import Console

GOAL_MISSED, ERROR, PREEMPTED, INTERRUPTED = 2, 1, 75, 130

app = typer.Typer(
    name="aerogel", help="Makes neural networks light: measure, distil, prune and ship, with proof.",
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

data_app = typer.Typer(
    help="Image sets: pack one for speed and memory, find its bad files.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


@app.command()
def nets(json: o.Json = False) -> None:
    """The networks of the zoo, with what they cost."""
    from aerogel.nets import NETS
    from aerogel.report.tables import zoo_table

    rows = [zoo_row(name) for name in NETS]
    emit(rows, zoo_table(rows), json)


@app.command()
def cost(
    model: o.RunModel = None, weights: o.Weights = None, input: o.Size = None, by: o.By = None, depth: o.Depth = None,
    device: o.OnDevice = None, measure: o.Measure = False, threads: o.Threads = None, against: o.Against = None,
    budget: o.Budget = None, csv: o.Csv = None, markdown: o.Markdown = False, html: o.Html = None,
    trust: o.Trust = False, calibrate: o.Calibrate = False, json: o.Json = False,
) -> None:  # fmt: skip
    """What a network costs: parameters, MACs, FLOPs, access, peak memory, time; compared, in budget."""
    from aerogel.console import printable
    from aerogel.report.cost_job import Asked, run, run_calibration
    from aerogel.report.cost_text import verdict_line
    from aerogel.report.costing import within_budget

    options: dict[str, Any] = {"weights": weights, "input": input, "by": by, "depth": depth, "device": device,
                               "measure": measure, "against": against, "budget": budget, "csv": csv,
                               "markdown": markdown, "html": html, "trust": trust}  # fmt: skip
    threads = 1 if threads is None else threads
    if calibrate:
        given = [repr(model)] if model is not None else []
        given += [f"--{name}" for name, value in options.items() if value is not None and value is not False]
        if given:
            rule = "--calibrate measures this machine, not a network, and goes with --threads and --json alone"
            raise AerogelError(f"{rule}; leave out {' and '.join(given)}")
        profile = run_calibration(threads, lambda text: console(json).say("calibrate", text))
        emit(profile.model_dump(), f"{profile.title}: kept for --device this; {profile.source}", json)
        return
    if model is None:
        raise AerogelError("cost needs a MODEL (aerogel cost lenet5), or --calibrate to measure this machine")
    found, text = run(Asked(model=model, threads=threads, json=json, **options))
    if json or csv == "-":  # stdout is for the machine: say on stderr what is missed
        for verdict in found.get("budget", []):
            if not verdict["met"]:
                print(printable(verdict_line(verdict)), file=sys.stderr)
    finish(found, text, json, passed=within_budget(found))


@app.command()
def lint(
    model: o.Model, device: o.LintDevice = None, fail_on: o.FailOn = None, allow: o.Allow = None,
    config: o.LintConfig = None, weights: o.Weights = None, input: o.Size = None, trust: o.Trust = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """What to change: ShuffleNetV2's four guidelines and practice, each finding with its price on a device."""
    from aerogel.report.findings import as_text, run

    found = run(model, device, allow or [], fail_on or [], config, weights=weights, input=input, trust=trust)
    if json:  # stdout is for the machine: say on stderr what is over its limit
        for line in found["exceeded"]:
            print(line, file=sys.stderr)
    finish(found, as_text(found), json, passed=not found["exceeded"])


@app.command()
def train(
    model: o.RunModel = None, data: o.Data = None, out: o.Out = None, weights: o.Weights = None, input: o.Size = None,
    seed: o.Seed = None, epochs: o.Epochs = None, batch_size: o.BatchSize = None, lr: o.Rate = None,
    config: o.ConfigFile = None, trust: o.Trust = False, json: o.Json = False,
) -> None:  # fmt: skip
    """Trains a network with hard labels and saves it as a folder."""
    from aerogel.compress.plain import train_and_save
    from aerogel.compress.settings import resolve
    from aerogel.export import parse_size

    options = {"model": model, "data": data, "weights": weights, "input": parse_size(input), "seed": seed,
               "trust": trust or None, "train": recipe_options(epochs, batch_size, lr)}  # fmt: skip
    found = train_and_save(resolve(options, config), out, console(json))
    emit(found, "", json)


@app.command()
def compress(
    model: o.RunModel = None, data: o.Data = None, target: o.Target = None, max_drop: o.Drop = None,
    weights: o.Weights = None, out: o.Out = None, input: o.Size = None, seed: o.Seed = None, epochs: o.Epochs = None,
    batch_size: o.BatchSize = None, lr: o.Rate = None, threads: o.Threads = None, config: o.ConfigFile = None,
    trust: o.Trust = False, json: o.Json = False,
) -> None:  # fmt: skip
    """Makes a network smaller and faster to a goal, with proof. Trains it first when no weights are given."""
    from aerogel.compress import compress as run_compress
    from aerogel.compress.settings import resolve
    from aerogel.export import parse_size

    options = {"verb": "compress", "model": model, "data": data, "target": target or None, "max_drop": max_drop,
               "weights": weights, "input": parse_size(input), "seed": seed, "threads": threads, "trust": trust or None,
               "train": recipe_options(epochs, batch_size, lr)}  # fmt: skip
    found = run_compress(resolve(options, config), out, console(json))
    finish(found, "", json, passed=found["verdict"]["pass"])


@app.command()
def prune(
    model: o.RunModel = None, data: o.Data = None, method: o.Method = None, target: o.Target = None,
    sparsity: o.Sparse = None, schedule: o.Schedule = None, steps: o.Steps = None, scan: o.Scan = False,
    max_drop: o.NoDrop = None, weights: o.Weights = None, out: o.Out = None, input: o.Size = None, seed: o.Seed = None,
    epochs: o.Epochs = None, batch_size: o.BatchSize = None, lr: o.Rate = None, threads: o.Threads = None,
    config: o.ConfigFile = None, trust: o.Trust = False, json: o.Json = False,
) -> None:  # fmt: skip
    """Cuts channels by a method, on a schedule, to a goal, or prunes single weights to a sparsity; or scans what each
    group of channels, or layer of weights, is worth."""
    from aerogel.compress import compress as run_compress
    from aerogel.compress.settings import resolve
    from aerogel.export import parse_size

    options = {"verb": "prune", "model": model, "data": data, "method": method, "target": target or None,
               "schedule": schedule, "steps": steps, "scan": scan or None, "max_drop": max_drop, "weights": weights,
               "input": parse_size(input), "seed": seed, "threads": threads, "trust": trust or None,
               "sparse": None if sparsity is None else {"sparsity": sparsity},
               "train": recipe_options(epochs, batch_size, lr)}  # fmt: skip
    found = run_compress(resolve(options, config), out, console(json))
    finish(found, "", json, passed=found["verdict"]["pass"] is not False)


@app.command()
def distill(
    teacher: o.Teacher = None, student: o.Student = None, data: o.Data = None, loss: o.Loss = None,
    temperature: o.Temperature = None, tap: o.Tap = None, mixup: o.Mixup = False, alone: o.Alone = False,
    cache: o.Cache = None, explore_temperature: o.ExploreTemperature = False, teacher_weights: o.TeacherWeights = None,
    weights: o.Weights = None, out: o.Out = None, input: o.Size = None, seed: o.Seed = None,
    epochs: o.StudentEpochs = None, batch_size: o.BatchSize = None, lr: o.Rate = None, config: o.ConfigFile = None,
    trust: o.Trust = False, json: o.Json = False,
) -> None:  # fmt: skip
    """Trains a small network by what big ones know, and measures what it gained."""
    from aerogel.compress import distill as run_distill
    from aerogel.compress.distil_settings import parse_losses, parse_taps
    from aerogel.compress.settings import resolve
    from aerogel.export import parse_size

    lesson = {"teacher": teacher or None, "teacher_weights": teacher_weights or None, "temperature": temperature,
              "losses": parse_losses(loss) if loss else None, "taps": parse_taps(tap) if tap else None,
              "mixup": mixup or None, "alone": alone or None, "cache": cache}  # fmt: skip
    options = {"verb": "distill", "model": student, "data": data, "weights": weights, "input": parse_size(input),
               "seed": seed, "trust": trust or None, "train": recipe_options(epochs, batch_size, lr),
               "distill": {name: value for name, value in lesson.items() if value is not None}}  # fmt: skip
    if explore_temperature:
        from aerogel.compress.exploring import STAND_IN, explore, refuse_others, student_of

        refuse_others({"--loss": loss, "--tap": tap, "--mixup": mixup, "--alone": alone, "--cache": cache,
                       "--epochs": epochs, "--batch-size": batch_size, "--lr": lr})  # fmt: skip
        student = student_of(student, config)
        options["model"] = student or STAND_IN
        emit(*explore(resolve(options, config), student is not None, out, console(json)), json)
        return
    found = run_distill(resolve(options, config), out, console(json))
    finish(found, "", json, passed=found["verdict"]["pass"] is not False)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="the folder a stopped run printed")], trust: o.Trust = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Finishes a run that was stopped."""
    from aerogel.compress import resume as run_resume

    found = run_resume(run, console(json), trust)
    finish(found, "", json, passed=found["verdict"]["pass"] is not False)


@data_app.command()
def pack(
    data: o.DataSpec, out: Annotated[Path, typer.Option(help="folder to write; never overwritten")],
    input: o.Size = None, json: o.Json = False,
) -> None:  # fmt: skip
    """Writes a set once as memory-mapped pixels, for --data packed:FOLDER, and measures how much faster that is."""
    from aerogel.data.pack import pack_and_measure
    from aerogel.export import parse_size

    emit(pack_and_measure(data, out, parse_size(input), lambda text: console(json).say("pack", text)), "", json)


@data_app.command()
def check(data: o.DataSpec, input: o.Size = None, json: o.Json = False) -> None:
    """Reads every file of a set once and lists those that cannot be used; exit code 2 when there are any."""
    from aerogel.data.check import as_text
    from aerogel.data.check import check as check_set
    from aerogel.export import parse_size

    found = check_set(data, parse_size(input))
    finish(found, as_text(found), json, passed=not found["bad_files"])


@app.command()
def export(
    model: o.Model, out: o.Written, to: o.To = "onnx", bits: o.Bits = None, data: o.Data = None,
    max_drop: o.BitsDrop = None, weights: o.Weights = None, input: o.Size = None, trust: o.Trust = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Writes a network as one ONNX file that computes the same, or as a folder small by its zeros, or dense again."""
    from aerogel.compress.plain import export_and_check
    from aerogel.compress.storing import check_kind, store
    from aerogel.export import parse_size

    check_kind(to, {"--bits": bits, "--data": data, "--max-drop": max_drop})
    if to != "onnx":
        found = store(model, weights, parse_size(input), trust, out, console(json), to=to, bits=bits, data=data,
                      max_drop=max_drop)  # fmt: skip
        emit(found, found["text"], json)
        return
    found = export_and_check(model, weights, parse_size(input), trust, out)
    emit(found, f"{out}  {found['bytes']:,} bytes  largest difference {found['max_abs_diff']:.1e}", json)


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="a run, a saved folder, or an .onnx file")],
    second: Annotated[Path | None, typer.Argument(help="another one, to time against the first")] = None,
    threads: o.Threads = None,
    trust: o.Trust = False,
    json: o.Json = False,
) -> None:
    """Checks a result again on this machine; given two files, times them interleaved."""
    from aerogel.compress.plain import compare_two, verify_folder

    if second is not None:
        found = compare_two(first, second, 1 if threads is None else threads)
    else:
        found = verify_folder(first, threads, trust, console(json))
    finish(found, found["text"], json, passed=found.get("pass", True))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder")], json: o.Json = False) -> None:
    """Writes a run's report.html again from its report.json."""
    from aerogel.files import read_json
    from aerogel.report import terminal, write

    held = run / "report.json"
    if not held.exists():
        raise AerogelError(f"report: there is no {held}; finish the run with `aerogel resume {quote(str(run))}`")
    found = read_json(held)
    page, _ = write(found, run)
    emit(found, f"{terminal(found)}\n{page}", json)


def recipe_options(epochs: float | None, batch_size: int | None, lr: float | None) -> dict[str, Any]:
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    return {name: value for name, value in given.items() if value is not None}


def costed(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The cost of one image of that shape, as JSON."""
    import torch

    from aerogel.cost import count
    from aerogel.graph import capture

    return {"input": [1, *shape], **count(capture(model, (torch.zeros(1, *shape),))).to_json()}


def zoo_row(name: str) -> dict[str, Any]:
    """One network of the zoo with its default arguments, counted on the meta device: no weights are made."""
    import torch

    from aerogel.export import input_of
    from aerogel.nets import build
    from aerogel.nets.paper import PAPER

    with torch.device("meta"):
        model: Any = build(name)
        found = costed(model, input_of(model))
    totals = {key: found[key] for key in ("input", "params", "macs", "access_bytes", "peak_bytes")}
    return {"net": name, "args": model.spec["args"], **totals, "paper": PAPER.get(name)}


def console(json: bool) -> Console:
    """Where progress goes: stdout, or stderr when stdout is for the machine."""
    from aerogel.console import Console

    return Console(sys.stderr if json else sys.stdout)


def emit(found: Any, text: str, json: bool) -> None:
    """Prints what was found: one JSON document, or the text if there is any."""
    line = jsonlib.dumps(found, allow_nan=False) if json else text
    if line:
        print(line)


def finish(found: dict[str, Any], text: str, json: bool, *, passed: bool) -> None:
    emit(found, text, json)
    if not passed:
        raise typer.Exit(GOAL_MISSED)


def main() -> None:
    """Runs the command; every failure is one line on stderr."""
    # Read when torch starts its threads. On a shared machine, threads that spin while they wait for one that was put
    # aside slow training down ten times (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "RANK" in os.environ:  # torchrun's; its processes would each print PyTorch's own remarks
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _sigterm_heard():
        code = run_command(sys.argv[1:] or ["--help"])
    if "aerogel.train.distributed" in sys.modules:
        sys.modules["aerogel.train.distributed"].dismiss(code)
    sys.exit(code)


def run_command(words: list[str]) -> int:
    """The exit code."""
    try:
        code = app(words, prog_name="aerogel", standalone_mode=False)
        sys.stdout.flush()
    except AerogelError as error:
        return fail(str(error))
    except Interrupted as stop:
        return INTERRUPTED if stop.signal == signal.SIGINT else PREEMPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `aerogel nets | head`: what is left unprinted has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong command line, in the parser's own words
            return fail(error.format_message())
        from aerogel.console import unexpected

        return fail(unexpected(error, Path(tempfile.gettempdir()) / f"aerogel-{os.getpid()}.txt"))
    return code or 0


def fail(message: str) -> int:
    from aerogel.console import printable

    rank = os.environ.get("RANK", "0")  # torchrun's
    where = f"error (rank {rank})" if rank.strip("0").isdecimal() else "error"
    print(f"{where}: {printable(' '.join(message.split()))}", file=sys.stderr)
    return ERROR


@contextmanager
def _sigterm_heard() -> Iterator[None]:
    """SIGTERM ends the command as an exit does: temporary files are removed. A run hears it at its own safe points."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(PREEMPTED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
