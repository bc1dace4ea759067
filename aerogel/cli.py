"""The command `aerogel`: one verb a job, thin. Heavy imports wait until a verb runs, so that --help answers at once.

Exit codes: 0 done, goal met; 2 goal missed, the best result is written; 1 error; 130 interrupted; 75 preempted.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.errors import AerogelError, Interrupted
from aerogel.imports import one_line

if TYPE_CHECKING:
    from aerogel.console import Console

app = typer.Typer(
    name="aerogel", help="Makes neural networks light: measure, distil, prune and ship, with proof.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

Model = Annotated[
    str, typer.Argument(help="zoo name (lenet5, mobilenet_v2:width=0.5), saved folder, or file.py:factory")
]
RunModel = Annotated[
    str | None, typer.Argument(help="zoo name, saved folder, or file.py:factory", show_default=False)
]
Data = Annotated[
    str | None, typer.Option(help="digits, mnist, fashion_mnist, cifar10, folder:PATH, or file.py:factory")
]
Weights = Annotated[str | None, typer.Option(help="saved folder, .safetensors, or a .pt state dict")]
Out = Annotated[Path | None, typer.Option(help="folder to write; never overwritten")]
Size = Annotated[
    str | None, typer.Option("--input", metavar="C,H,W", help="input size; images are resized to it")
]
Seed = Annotated[int | None, typer.Option(help="of initial weights, data order, augmentation")]
Epochs = Annotated[float | None, typer.Option(help="of training the original")]
BatchSize = Annotated[int | None, typer.Option(help="images a step")]
Rate = Annotated[float | None, typer.Option("--lr", help="peak learning rate")]
Threads = Annotated[int | None, typer.Option(help="of the measured runtime (default 1)")]
Json = Annotated[bool, typer.Option("--json", help="machine output on stdout, nothing else there")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file with any option; the command line wins")]
Trust = Annotated[bool, typer.Option(help="import the factory that a saved folder names")]


@app.command()
def nets(json: Json = False) -> None:
    """The networks of the zoo, with what they cost."""
    from aerogel.nets import NETS, build
    from aerogel.report.tables import zoo_table

    rows = [zoo_row(name, build) for name in NETS]
    emit(rows, json, lambda: zoo_table(rows))


@app.command()
def cost(
    model: Model, weights: Weights = None, input: Size = None, trust: Trust = False, json: Json = False
) -> None:
    """What a network costs: parameters, MACs, FLOPs, access bytes, peak bytes, by layer."""
    from aerogel.export import input_of, open_model
    from aerogel.report.tables import cost_table

    shape = parse_size(input)
    opened = open_model(model, input_shape=shape, weights=weights, trust=trust)
    found = costed(opened.model, shape or input_of(opened.model, opened.input))
    emit({"model": model, **found}, json, lambda: cost_table(model, found))


@app.command()
def train(
    model: RunModel = None, data: Data = None, out: Out = None, weights: Weights = None, input: Size = None, seed: Seed = None,
    epochs: Epochs = None, batch_size: BatchSize = None, lr: Rate = None, config: ConfigFile = None, json: Json = False,
) -> None:  # fmt: skip
    """Trains a network with hard labels and saves it as a folder."""
    from aerogel.compress.plain import train_and_save
    from aerogel.compress.settings import resolve

    options = {"model": model, "data": data, "weights": weights, "input": parse_size(input), "seed": seed,
               "train": recipe_options(epochs, batch_size, lr, seed)}  # fmt: skip
    found = train_and_save(resolve(options, config), out, console(json))
    emit(found, json, lambda: "")


@app.command()
def compress(
    model: RunModel = None, data: Data = None,
    target: Annotated[list[str], typer.Option(help="latency=0.5, latency=2.5ms, macs=150M, params=0.1 ...; repeatable")] = [],  # noqa: B006
    max_drop: Annotated[float | None, typer.Option(help="points of accuracy that may be lost (default 1)")] = None,
    weights: Weights = None, out: Out = None, input: Size = None, seed: Seed = None, epochs: Epochs = None,
    batch_size: BatchSize = None, lr: Rate = None, threads: Threads = None, config: ConfigFile = None,
    trust: Trust = False, json: Json = False,
) -> None:  # fmt: skip
    """Makes a network smaller and faster to a goal, with proof. Trains it first when no weights are given."""
    from aerogel.compress import compress as run_compress
    from aerogel.compress.settings import resolve

    options = {"model": model, "data": data, "target": target or None, "max_drop": max_drop, "weights": weights,
               "input": parse_size(input), "seed": seed, "threads": threads, "trust": trust or None,
               "train": recipe_options(epochs, batch_size, lr, seed)}  # fmt: skip
    finish(run_compress(resolve(options, config), out, console(json)), json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="the folder a stopped run printed")], json: Json = False
) -> None:
    """Finishes a run that was stopped."""
    from aerogel.compress import resume as run_resume

    finish(run_resume(run, console(json)), json)


@app.command()
def export(
    model: Model, out: Annotated[Path, typer.Option(help="the .onnx file to write")], weights: Weights = None,
    input: Size = None, trust: Trust = False, json: Json = False,
) -> None:  # fmt: skip
    """Writes a network as one ONNX file and checks that it computes the same."""
    from aerogel.compress.plain import export_and_check

    found = export_and_check(model, weights, parse_size(input), trust, out)
    emit(
        found,
        json,
        lambda: f"{found['file']}  {found['bytes']:,} bytes  largest difference {found['max_abs_diff']:.1e}",
    )


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="a run, a saved folder, or an .onnx file")],
    second: Annotated[Path | None, typer.Argument(help="another .onnx file or folder to time against the first")] = None,
    threads: Threads = None, trust: Trust = False, json: Json = False,
) -> None:  # fmt: skip
    """Checks a result again on this machine; given two files, times them interleaved."""
    from aerogel.compress.plain import compare_two, verify_folder

    if second is not None:
        found = compare_two(first, second, threads or 1)
    else:
        found = verify_folder(first, trust, console(json))
    emit(found, json, lambda: found["text"])
    if found.get("pass") is False:
        raise typer.Exit(2)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder")], json: Json = False) -> None:
    """Writes a run's report.html again from its report.json."""
    from aerogel.files import read_json
    from aerogel.report import terminal, write

    held = read_json(run / "report.json")
    page, _ = write(held, run)
    emit(held, json, lambda: f"{terminal(held)}\n{page}")


def recipe_options(
    epochs: float | None, batch_size: int | None, lr: float | None, seed: int | None
) -> dict[str, Any]:
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """C,H,W as three whole numbers. Raises AerogelError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise AerogelError(
            f"--input must be C,H,W, three positive whole numbers, got {text!r}; write --input 3,224,224"
        )
    channels, height, width = map(int, parts)
    return channels, height, width


def costed(model: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    import torch

    from aerogel.cost import count
    from aerogel.graph import capture

    return {"input": [1, *shape], **count(capture(model, (torch.zeros(1, *shape),))).to_json()}


def zoo_row(name: str, build: Any) -> dict[str, Any]:
    """One network of the zoo with its default arguments, counted on the meta device: no weights are made."""
    import torch

    from aerogel.export import input_of

    with torch.device("meta"):
        model = build(name)
        found = costed(model, input_of(model))
    return {
        "net": name,
        "args": model.spec["args"],
        **{k: found[k] for k in ("input", "params", "macs", "access_bytes", "peak_bytes")},
    }


def console(json: bool) -> Console:
    """Where progress goes: stdout, or stderr when stdout is for the machine."""
    from aerogel.console import Console

    return Console(sys.stderr if json else sys.stdout)


def emit(found: Any, json: bool, text: Any) -> None:
    line = jsonlib.dumps(found) if json else text()
    if line:
        print(line)


def finish(report: dict[str, Any], json: bool) -> None:
    emit(report, json, lambda: "")
    if not report["verdict"]["pass"]:
        raise typer.Exit(2)


def main() -> None:
    """Runs the command; every failure is one line on stderr."""
    # Read when torch starts its threads: on a shared machine, threads that spin while they wait for one that was
    # put aside slow training down several times (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except AerogelError as error:
        code = fail(str(error))
    except Interrupted as stop:
        code = 130 if stop.signal == signal.SIGINT else 75
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `aerogel nets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = fail(_explain(error))
    sys.exit(code or 0)


def _explain(error: Exception) -> str:
    """A wrong command line in its own words; for a fault of ours, where the traceback is kept."""
    if hasattr(error, "format_message"):
        return str(error.format_message())
    with tempfile.NamedTemporaryFile("w", prefix="aerogel-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {one_line(error)} (a fault of aerogel's; details in {file.name})"


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
