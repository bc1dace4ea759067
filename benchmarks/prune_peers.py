"""What can be cut, and how fast, beside Torch-Pruning: over many networks, on five large ones, and a 7B decoder.

    python benchmarks/prune_peers.py [networks|speed|decoder ...] [--only NAME ...] [--rounds 3] [--limit 120]

networks  every convolutional network of aerogel.nets and the Hugging Face families of tests/prune/families.py, small
          and random: how many rows of the weights can be cut, why not the others, the largest error of cuts to 90,
          70, 50, 10 % of the channels and to half in five steps; and what Torch-Pruning makes of removing half.
speed     ResNet-50, DenseNet-121, VGG-16, MobileNetV2, ViT-B/16 at 224 x 224: capture, couple, plan, cut and proof,
          each of them timed, with and without the proof, against building Torch-Pruning's pruner and one step of it:
          half of the channels by L2 norm, layer by layer. In turns within one process, in random order, after one
          round that is not timed. Peak memory in processes of their own.
decoder   a Llama configuration of 7B parameters on the meta device: seconds to capture and to couple.

Torch-Pruning is asked as its README says: the layers that make the outputs are ignored, and it is told the number of
heads of every query, key and value layer, of which it then removes whole ones. Nothing is repaired by hand
afterwards. Its result is compared with the whole network in which the same indices are zero, in float64; which
indices those are is read from the numbers that are left. Where they differ, once more with norms that take
their statistics over what is left, which cannot be exact: "exact but for norms".

The peer is installed for this alone:  pip install --target PEERS --no-deps torch-pruning;  PYTHONPATH=PEERS python ...
Results go to benchmarks/results/prune_peers.json, and from there into docs/pruning.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aerogel.cost.latency import cpu_name
from aerogel.files import write_json
from aerogel.graph import capture, tensor_names
from aerogel.graph.capture import quiet
from aerogel.nets import build
from aerogel.prune import cut
from aerogel.prune.attributes import readings
from aerogel.prune.coupling import Coupling, couple
from aerogel.prune.cut import Trial, made
from aerogel.prune.plan import plan
from aerogel.prune.proof import named_weights, to_tensors
from aerogel.prune.rank import find_criterion, scores

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "prune_peers.json"
PAGE = ROOT / "docs" / "pruning.md"
sys.path.insert(0, str(ROOT / "tests" / "prune"))
from families import NETWORKS, WAYS, Case, outcome, random_like, rows  # noqa: E402
from reference import Kept, answers, largest, masked, masked_but_for_norms, named  # noqa: E402

EXACT = 1e-4
PATIENCE = 60.0  # seconds for Torch-Pruning's half of a small network; where it ends, it takes under one
ENDS = ("network output", "tied to the network's input or to a constant")  # why what every network has stays whole
QUERIES = re.compile(r"(^|\.)(query|key|value|[qkv]|qkv|query_key_value)(_proj|_lin)?$")

# ---------------------------------------------------------------- Torch-Pruning


def torch_pruning() -> Any:
    """The peer. Raises SystemExit where it is not installed, saying how to."""
    try:
        import torch_pruning
    except ImportError:
        raise SystemExit(
            "prune_peers: torch-pruning is not installed; pip install --target PEERS --no-deps torch-pruning, and put "
            "PEERS on PYTHONPATH"
        ) from None
    return torch_pruning


def prune_half(net: nn.Module, inputs: Any, outputs: list[nn.Module], heads: dict[nn.Module, int]) -> None:
    """Half of the channels by L2 norm, in place, in every layer but those that make the outputs."""
    tp = torch_pruning()
    options: dict[str, Any] = {}
    if heads:
        options = {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    pruner = tp.pruner.BasePruner(
        net, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=outputs,
        output_transform=lambda out: sum(t.sum() for t in tree_leaves(out) if t.is_floating_point()), **options,
    )  # fmt: skip
    pruner.step()


def heads_of(net: nn.Module) -> dict[nn.Module, int]:
    """The number of heads of every linear layer that makes queries, keys or values, as the modules around it say."""
    found = {}
    for name, module in net.named_modules():
        match = QUERIES.search(name)
        if not (match and isinstance(module, nn.Linear)):
            continue
        around = [net.get_submodule(name.rsplit(".", n)[0]) for n in (1, 2) if name.count(".") >= n]
        holders = [holder for one in (*around, net) for holder in (one, getattr(one, "config", None))]
        number = _first_number(holders, "num_attention_heads", "num_heads", "n_heads")
        if number is not None:
            fewer = _first_number(holders, "num_key_value_heads") or number
            found[module] = number if match[2].startswith("q") else fewer
    return found


def _first_number(holders: list[Any], *names: str) -> int | None:
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def output_layers(net: nn.Module, coupling: Coupling) -> list[nn.Module]:
    """The modules that make what the network gives out: along their rows, an embedding along its columns."""
    names, found = tensor_names(net), []
    for module in net.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            dim = 1 if isinstance(module, nn.Embedding) else 0
            if coupling.frozen.get(f"{names[id(weight)]} dim {dim}") == "network output":
                found.append(module)
    return found


def kept_by_values(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Kept:
    """Which indices are left, read from the numbers, no two of which are the same. Raises LookupError."""
    kept: dict[str, tuple[Tensor | None, ...]] = {}
    for name, old in before.items():
        new = after[name]
        if old.shape == new.shape:
            continue
        place = {value: i for i, value in enumerate(old.flatten().tolist())}
        dims: list[Tensor | None] = []
        for dim, (size, left) in enumerate(zip(old.shape, new.shape, strict=True)):
            line = new[tuple(slice(None) if d == dim else 0 for d in range(new.ndim))].tolist()
            if not all(value in place for value in line):
                raise LookupError(f"{name} holds other numbers than before")
            index = torch.tensor([np.unravel_index(place[value], old.shape)[dim] for value in line])
            dims.append(None if size == left else index)
        kept[name] = tuple(dims)
    return kept


def distinct(net: nn.Module) -> nn.Module:
    """In place: float64, and no two numbers of a weight alike."""
    net = net.double()
    with torch.no_grad():
        for tensor in named(net).values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-6 * torch.rand_like(tensor))
    return net


def of_peer(case: Case, coupling: Coupling) -> str:
    """What Torch-Pruning makes of a network: one short line."""
    net, _, inputs = case
    torch.manual_seed(0)
    net, inputs = distinct(net), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    whole, before = copy.deepcopy(net), {name: t.detach().clone() for name, t in named(net).items()}
    x = {name: t.to(inputs[name]) for name, t in random_like(inputs, 1).items()}
    try:
        with quiet(), at_most(PATIENCE):
            prune_half(net, inputs, output_layers(net, coupling), heads_of(net))
    except TimeoutError as error:
        return str(error)
    except Exception as error:
        return f"fails: {_brief(error)}"
    after = named(net)
    missing = [name for name in before if name not in after]
    if missing:  # it ties nothing: a tied weight has a name of its own afterwards
        return f"parts tied weights: {missing[0]}"
    if all(before[name].shape == after[name].shape for name in before):
        return "cuts nothing, says nothing"
    try:
        got = answers(net, x)
    except Exception as error:
        return f"cut network fails: {_brief(error)}"
    try:
        kept = kept_by_values(before, after)
    except LookupError as error:
        return f"cannot be compared: {error}"
    expected = answers(masked(whole, kept), x)
    if [e.shape for e in expected] != [g.shape for g in got]:
        return "cuts the outputs"
    error = largest(expected, got)
    if error <= EXACT:
        return "exact"
    if largest(answers(masked_but_for_norms(whole, net, kept), x), got) <= EXACT:
        return "exact but for norms"
    if _beyond_norms(whole, coupling):
        return f"differs by {error:.0e}: a statistic that is no norm's couples its channels"
    return f"wrong: outputs differ by {error:.0e}"


def _beyond_norms(net: nn.Module, coupling: Coupling) -> bool:
    """Whether a statistic over channels is taken elsewhere than in a norm, where the reference cannot follow it."""
    places = {match[1] for g in coupling.groups if (match := re.search(r"\((\S+)\) takes a statistic", g.inexact))}
    return any("Norm" not in type(net.get_submodule(place)).__name__ for place in places)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after that much time of the processor."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {seconds:.0f} s")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _brief(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:90]}"


# ---------------------------------------------------------------- over many networks


def one(name: str) -> None:
    """Prints two lines of JSON: what aerogel, and what Torch-Pruning makes of a network."""
    case = net, args, kwargs = NETWORKS[name]()
    start = time.perf_counter()
    coupling = couple(capture(net, args, kwargs))
    seconds = time.perf_counter() - start
    total, exact, inexact = rows(net, coupling)
    errors = {f"{keep} in {steps}": outcome(case, keep, steps)[0] for keep, steps in WAYS} if exact else {}
    why = Counter(_short(reason) for reason in coupling.frozen.values())
    start = time.perf_counter()
    cut(net, args, kwargs, target={"channels": 0.5}, ranking="local", allow_inexact=not exact)
    found = {"rows": total, "exact": exact, "inexact": inexact, "why": dict(why.most_common()), "errors": errors}
    print(json.dumps(found | {"couple_seconds": seconds, "cut_seconds": time.perf_counter() - start}), flush=True)
    start = time.perf_counter()
    said = of_peer(case, coupling)
    print(json.dumps({"outcome": said, "seconds": time.perf_counter() - start}), flush=True)


def _short(reason: str) -> str:
    """A reason without the names of places, so that equal ones count as one."""
    return re.sub(r" \([^)]*\)|^\d+ of \d+: |[\w.]+\.(?=weight|bias)", "", reason)


def networks(names: list[str], limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(network, {"aerogel": ..., "torch_pruning": ...}) as they are done, each network in a process of its own."""
    for name in names:
        command = [sys.executable, __file__, "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=_environment())
            said, failed = done.stdout, f"ends: {(done.stderr.strip().splitlines() or ['?'])[-1][:120]}"
        except subprocess.TimeoutExpired as error:
            said, failed = (error.stdout or b"").decode(), f"no end within {limit} s"
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        ours = lines[0] if lines else {"failed": failed}
        peer = lines[1] if len(lines) > 1 else {"outcome": failed, "seconds": None}
        print(f"{name:<24} {_cuttable(ours):<24} {_worst(ours):<10} | {peer['outcome']}", flush=True)
        yield name, {"aerogel": ours, "torch_pruning": peer}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _cuttable(ours: Mapping[str, Any]) -> str:
    if "failed" in ours:
        return str(ours["failed"])
    more = f" + {100 * ours['inexact'] / ours['rows']:.0f} % inexactly" if ours["inexact"] else ""
    return f"{100 * ours['exact'] / ours['rows']:.0f} %{more}"


def _worst(ours: Mapping[str, Any]) -> str:
    """The largest error of all ways, or the first exception."""
    said = list(ours.get("errors", {}).values())
    broken = [text for text in said if not re.fullmatch(r"[\d.e+-]+", text)]
    return broken[0][:60] if broken else f"{max(map(float, said)):.0e}" if said else "-"


# ---------------------------------------------------------------- speed


def vit_base() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000))


LARGE: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: build("resnet50"),
    "DenseNet-121": lambda: build("densenet121"),
    "VGG-16": lambda: build("vgg16"),
    "MobileNetV2": lambda: build("mobilenet_v2"),
    "ViT-B/16": vit_base,
}
IMAGE = (1, 3, 224, 224)


def by_aerogel(net: nn.Module) -> None:
    cut(net, (torch.zeros(IMAGE),), target={"channels": 0.5}, ranking="local")


def by_parts(net: nn.Module) -> dict[str, float]:
    """The same cut part by part: the seconds of each. Torch-Pruning has no proof: what it does is the sum without."""
    args, marks = (torch.zeros(IMAGE),), [time.perf_counter()]
    graph = capture(net, args)
    marks.append(time.perf_counter())
    coupling = couple(graph)
    coupling = dataclasses.replace(coupling, groups=tuple(g for g in coupling.groups if not g.inexact))
    marks.append(time.perf_counter())
    found = scores(coupling, named_weights(net), find_criterion("l2"))
    removed = plan(coupling, found, {"channels": 0.5}, ranking="local")
    marks.append(time.perf_counter())
    made(net, to_tensors(coupling.kept(removed)), next(iter(readings(net, coupling, removed))))
    marks.append(time.perf_counter())
    Trial(net, args, None)(coupling, removed)
    marks.append(time.perf_counter())
    return dict(zip(PARTS, np.diff(marks).tolist(), strict=True))


def by_peer(net: nn.Module) -> None:
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    prune_half(net, torch.zeros(IMAGE), [last], heads_of(net))


TOOLS: dict[str, Callable[[nn.Module], Any]] = {"aerogel": by_aerogel, "by parts": by_parts, "torch_pruning": by_peer}
PARTS = ("capture", "couple", "plan", "cut", "proof")


def speed(rounds: int) -> dict[str, Any]:
    """{network: {"seconds": {tool or part: [...]}, "peak_mib": {tool: ...}}}; "unproven" is all parts but the proof."""
    rng, found = np.random.default_rng(0), {}
    for name, make in LARGE.items():
        seconds: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds + 1):
            for tool in rng.permutation(list(TOOLS)):
                torch.manual_seed(number)
                net = make().eval()
                start = time.perf_counter()
                with quiet():
                    parts = TOOLS[tool](net)
                took = parts or {str(tool): time.perf_counter() - start}
                for part, value in took.items() if number else ():
                    seconds[part].append(value)
        seconds["unproven"] = np.sum([seconds[part] for part in PARTS if part != "proof"], axis=0).tolist()
        peak = {tool: _peak(name, tool) for tool in ("nothing", "aerogel", "torch_pruning")}
        found[name] = {"seconds": dict(seconds), "peak_mib": peak}
        print(f"{name:<14}", *(f"{part} {np.median(held):.2f} s" for part, held in seconds.items()), peak, flush=True)
    return found


def ratios(held: Mapping[str, Any], ours: str, names: Iterable[str]) -> list[float]:
    """Our time over Torch-Pruning's, of all those networks together, in each round."""
    ours_s, theirs = (
        np.sum([held[name]["seconds"][tool] for name in names], axis=0) for tool in (ours, "torch_pruning")
    )
    return (ours_s / theirs).tolist()


def _peak(network: str, tool: str) -> float:
    """Peak memory in MiB of a process that builds the network and does this one thing."""
    command = [sys.executable, __file__, "--peak", network, tool]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
    return float(done.stdout.split()[-1])


def peak(network: str, tool: str) -> None:
    net = LARGE[network]().eval()
    if tool in TOOLS:
        with quiet():
            TOOLS[tool](net)
    print(peak_mib())


def peak_mib() -> float:
    """Of this process. getrusage would say that of the process that started it where that was more."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


# ---------------------------------------------------------------- a 7B decoder


def decoder() -> dict[str, Any]:
    """Llama-2-7B's configuration on the meta device: seconds, and peak memory of this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         vocab_size=32000, use_cache=False)  # fmt: skip
    with torch.device("meta"):
        net = LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 128, dtype=torch.long)
    start = time.perf_counter()
    graph = capture(net, (), {"input_ids": ids})
    captured = time.perf_counter()
    coupling = couple(graph)
    end = time.perf_counter()
    found = {
        "params": sum(p.numel() for p in net.parameters()),
        "ops": len(graph.ops),
        "capture_seconds": captured - start,
        "couple_seconds": end - captured,
        "groups": len(coupling.groups),
        "channels": sum(map(len, coupling.groups)),
        "peak_mib": peak_mib(),
    }
    print(found, flush=True)
    return found


# ---------------------------------------------------------------- the page


def table(held: Mapping[str, Any]) -> str:
    """The tables of docs/pruning.md."""
    lines = [
        f"Beside {' and '.join(ENDS)}, which stay in every network:",
        "",
        "| network | rows that can be cut | what else stays | largest error | s | Torch-Pruning, half removed | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in held.get("networks", {}).items():
        ours, peer = row["aerogel"], row["torch_pruning"]
        why = "; ".join(f"{reason} ({n})" for reason, n in ours.get("why", {}).items() if reason not in ENDS)
        took = "" if peer["seconds"] is None else f"{peer['seconds']:.1f}"
        lines.append(
            f"| {name} | {_cuttable(ours)} | {why} | {_worst(ours)} | {ours.get('cut_seconds', 0):.1f} "
            f"| {_cell(peer['outcome'])} | {took} |"
        )
    if "networks" in held:
        lines += ["", _summary(held["networks"])]
    if "speed" in held:
        lines += ["", *_speed_table(held["speed"])]
    if "decoder" in held:
        one = held["decoder"]
        size, gib = one["params"] / 1e9, one["peak_mib"] / 1024
        lines += [
            "",
            f"A decoder of {size:.1f}B parameters on the meta device ({one['ops']} ops) is captured in "
            f"{one['capture_seconds']:.0f} s and coupled in {one['couple_seconds']:.0f} s ({one['channels']} channels "
            f"in {one['groups']} groups), in {gib:.1f} GiB.",
        ]
    last = held["last"]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `python benchmarks/prune_peers.py`."])


def _summary(held: Mapping[str, Any]) -> str:
    """How many of the networks each tool cut exactly, and what became of the others."""
    worst = max(float(said) for row in held.values() for said in row["aerogel"].get("errors", {}).values())
    some = sum(1 for row in held.values() if row["aerogel"].get("errors"))
    kinds = Counter(re.sub(r"( within|:| by).*", "", row["torch_pruning"]["outcome"]) for row in held.values())
    told = "; ".join(f"{kind}: {number}" for kind, number in kinds.most_common())
    return (
        f"Of {len(held)} networks aerogel cut {some} exactly (largest error {worst:.0e}) and the others only where "
        f"allow_inexact let it. Torch-Pruning: {told}."
    )


def _speed_table(held: Mapping[str, Any]) -> list[str]:
    """Medians over the rounds; the ratios of the whole, with the smallest and the largest."""
    lines = [
        f"| network, 224 x 224 | {', '.join(PARTS)}, s | without the proof | `cut` | Torch-Pruning | ratio without the "
        "proof | ratio | peak MiB: network, aerogel, Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for names in (*([name] for name in held), list(held)):
        middle = {tool: sum(float(np.median(held[name]["seconds"][tool])) for name in names) for tool in
                  (*PARTS, "unproven", "aerogel", "torch_pruning")}  # fmt: skip
        parts = ", ".join(f"{middle[part]:.2f}" for part in PARTS)
        shown = []
        for tool in ("unproven", "aerogel"):
            found = ratios(held, tool, names)
            shown.append(f"x{np.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]")
        memory = (f"{held[names[0]]['peak_mib'][tool]:.0f}" for tool in ("nothing", "aerogel", "torch_pruning"))
        lines.append(
            f"| {names[0] if len(names) == 1 else 'together'} | {parts} | {middle['unproven']:.2f} "
            f"| {middle['aerogel']:.2f} | {middle['torch_pruning']:.2f} | {' | '.join(shown)} "
            f"| {', '.join(memory) if len(names) == 1 else ''} |"
        )
    return lines


def _cell(text: str) -> str:
    """Short, and free of what ends a cell."""
    return (text if len(text) <= 70 else f"{text[:67]}...").replace("|", "/")


def write_page(held: Mapping[str, Any]) -> None:
    """Puts the tables between the markers of the page, where it has them."""
    text = PAGE.read_text() if PAGE.exists() else ""
    begin, end = "<!-- networks -->", "<!-- /networks -->"
    if begin not in text or end not in text:
        print(f"{PAGE.name} has no {begin} ... {end}: the tables are not put there", file=sys.stderr)
        return
    head, _, rest = text.partition(begin)
    PAGE.write_text(f"{head}{begin}\n{table(held)}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="networks, speed, decoder, page; all without any")
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help="of the networks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=900, help="seconds a network may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if given.one:
        return one(given.one)
    if given.peak:
        return peak(*given.peak)
    parts = given.parts or ["networks", "speed", "decoder"]
    if set(parts) & {"networks", "speed"}:
        torch_pruning()
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "networks" in parts:
        done = held.setdefault("networks", {})
        for name, found in networks(given.only or list(NETWORKS), given.limit):
            done[name] = found
            write_json(RESULTS, held)  # it takes an hour: what is done stays
        held["networks"] = {name: done[name] for name in NETWORKS if name in done}
    if "speed" in parts:
        held["speed"] = speed(given.rounds)
    if "decoder" in parts:
        held["decoder"] = decoder()
    if parts != ["page"]:
        hardware = f"{cpu_name()}, 1 thread, torch {torch.__version__}"
        held["last"] = {"hardware": hardware, "date": str(datetime.date.today())}
        write_json(RESULTS, held)
    write_page(held)
    return None


if __name__ == "__main__":
    main()
