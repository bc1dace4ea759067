"""What a pruned network's file takes: ours beside the others, and the entropy bound. Han et al. 2016, arXiv:1510.00149.

    python benchmarks/sparse_storage.py [--epochs 1] [--densities 1 0.5 0.2 0.08 0.03 0.01] [--bits 5] [--big 100]
        [--only rows|big] [--nets FOLDER ...]

LeNet-300-100 and LeNet-5 are trained a little on MNIST ($AEROGEL_DATA), pruned by magnitude in one ranking and trained
again; --nets: these saved networks of MNIST are taken instead, as those that reproduce/han2015_mnist.py keeps. Then
their weights share 2^bits values. For each, bytes of
- ours, values as they are (lossless) and shared, the whole file with its header; of the shared ones also
- safetensors; safetensors + zstandard -19 (also of what we call lossless);
- coordinates: torch's COO with int64 indices, and float32 values;
- bitmask: a bit a weight, values in `bits` bits, codebook in float16;
- the bound: entropy of mask and values (`aerogel.sparse.iid_bits`), which no code beats that knows only how often each
  value is there; codebook, tables, names and checksums not counted.
Then `big` million weights in one tensor: the time to decode it, and bytes of dense output a second.
Writes benchmarks/results/sparse_storage.json and the table in docs/sparse.md; `--table` only the latter.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import nn

import aerogel as ag
from aerogel.cost.latency import cpu_name
from aerogel.files import write_json, write_text
from aerogel.prune.masks import Masks
from aerogel.sparse import codec, iid_bits, share
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sparse_storage.json"
PAGE = ROOT / "docs" / "sparse.md"
BEGIN, END = "<!-- table:sparse_storage -->", "<!-- /table -->"
NETS = ("lenet_300_100", "lenet5")
ROUNDS = 5


def trained(net: nn.Module, data: Any, epochs: float, masks: Masks | None = None, lr: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    state = start(net, HardLabels(), data, Recipe(epochs=epochs, batch_size=128, lr=lr))
    if masks is not None:
        masks.put_on(state)
    return fit(state, data)


def largest(net: nn.Module, density: float) -> Masks:
    """The largest weights of the whole network, that share of them."""
    weights = {name: w.detach() for name, w in net.named_parameters() if w.ndim > 1}
    all_of_them = torch.cat([w.abs().flatten() for w in weights.values()])
    least = all_of_them.kthvalue(max(1, round((1 - density) * len(all_of_them)))).values
    return Masks({name: w.abs() > least if density < 1 else torch.ones_like(w).bool() for name, w in weights.items()})


def file_bytes(net: nn.Module, sparse: bool) -> tuple[int, float]:
    """Of the weights' file; and the milliseconds of processor time to read its tensors, the best of a few."""
    with TemporaryDirectory() as folder:
        path = ag.save(net, Path(folder) / "net", sparse=sparse) / "model.safetensors"
        times = []
        for _ in range(ROUNDS):
            begin = time.process_time()
            ag.sparse.read(path).decode() if sparse else safetensors.torch.load_file(path)
            times.append(1e3 * (time.process_time() - begin))
        return path.stat().st_size, min(times)


def others(net: nn.Module, bits: int) -> dict[str, int]:
    """Bytes of the same tensors in other formats."""
    tensors = {name: t.detach() for name, t in net.state_dict().items()}
    plain = safetensors.torch.save(tensors)
    found = {"safetensors": len(plain), "zstd": len(zstandard.ZstdCompressor(level=19).compress(plain))}
    found["coo"] = found["bitmask"] = 0
    for tensor in tensors.values():
        kept, every = int(tensor.count_nonzero()), tensor.numel()
        pruned = tensor.ndim > 1
        found["coo"] += kept * (8 * tensor.ndim + 4) if pruned else 4 * every
        found["bitmask"] += -(-every // 8) + -(-kept * bits // 8) + 2 * 2**bits if pruned else 2 * every
    return found


def bound(net: nn.Module) -> float:
    return sum(map(iid_bits, net.state_dict().values())) / 8


def row(name: str, data: Any, net: nn.Module, bits: int) -> dict[str, Any]:
    shared, masks = copy.deepcopy(net), Masks.of(net)
    share(shared, bits)
    lossless, lossless_ms = file_bytes(net, True)
    ours, ms = file_bytes(shared, True)
    found = {"net": name, "density": masks.survivors / masks.weights,
             "kept": sum(int(w.count_nonzero()) for w in net.parameters()),
             "top1": accuracy(net, data, "test"), "top1_shared": accuracy(shared, data, "test"),
             "lossless": lossless, "lossless_ms": lossless_ms, "zstd_of_lossless": others(net, 32)["zstd"],
             "ours": ours, "decode_ms": ms, "bound": bound(shared), **others(shared, bits)}  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def big(millions: int, density: float, bits: int | None) -> dict[str, Any]:
    """One tensor of so many normal weights: decoded, best of a few rounds by the processor's time and by the clock."""
    torch.manual_seed(0)
    weight = torch.randn(millions * 1000, 1000)
    if density < 1:
        weight[weight.abs() < float(np.quantile(weight.abs().flatten()[:1_000_000].numpy(), 1 - density))] = 0
    if bits is not None:
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight)
        share(layer, bits)
        weight = layer.weight.detach()
    data = codec.encode(weight)
    clock, processor = [], []
    for _ in range(3):
        begin, used = time.perf_counter(), time.process_time()
        decoded = codec.decode(data)
        clock.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    assert codec.same(decoded, weight)
    dense = weight.numel() * 4
    found = {"millions": millions, "density": density, "bits": bits, "layout": codec.layout(data), "bytes": len(data),
             "dense_bytes": dense, "seconds": min(clock), "cpu_seconds": min(processor), "bound": iid_bits(weight) / 8,
             "mb_per_s": dense / 1e6 / min(processor)}  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        f"| network | weights kept | top-1 | shared, {found['bits']} bits | ours | over the bound | bitmask "
        "| safetensors + zstd | COO | safetensors | decoded in | ours, lossless | zstd of it |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found["rows"]:
        over = 100 * (one["ours"] / one["bound"] - 1)
        sizes = " | ".join(f"{one[key] / 1e3:,.1f}" for key in ("bitmask", "zstd", "coo", "safetensors"))
        lines.append(
            f"| {one['net']} | {100 * one['density']:.2g} % | {one['top1']:.2f} % | {one['top1_shared']:.2f} % "
            f"| **{one['ours'] / 1e3:,.1f}** | {over:+.1f} % | {sizes} | {one['decode_ms']:.0f} ms "
            f"| {one['lossless'] / 1e3:,.1f} | {one['zstd_of_lossless'] / 1e3:,.1f} |"
        )
    lines += ["", f"{found['rows_by']}.", "", "One tensor of 100 million float32 weights, normal, the smallest zero; "
              "seconds of processor time, dense output a second:", ""]  # fmt: skip
    lines += [
        "| weights kept | values | MB | over the bound | decoded in | dense output |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["big"]:
        values = f"{one['bits']} bits" if one["bits"] else "lossless"
        over = f"{100 * (one['bytes'] / one['bound'] - 1):+.1f} %" if one["bits"] else ""
        lines.append(
            f"| {100 * one['density']:g} % | {values} | {one['bytes'] / 1e6:.1f} of {one['dense_bytes'] / 1e6:.0f} "
            f"| {over} | {one['cpu_seconds']:.2f} s | {one['mb_per_s']:.0f} MB/s |"
        )
    return "\n".join([*lines, "", f"{found['big_by']}."])


def put(found: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    inside = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    write_text(PAGE, inside.sub(lambda match: f"{BEGIN}\n{table(found)}\n{END}", page, count=1))


def measure_rows(given: argparse.Namespace, found: dict[str, Any]) -> None:
    data = ag.data.load("mnist")
    found |= {"bits": given.bits, "rows": []}
    for folder in given.nets:
        found["rows"].append(row("/".join(folder.parts[-2:]), data, ag.load(folder), given.bits))
        keep("rows", found)
    for name in () if given.nets else NETS:
        torch.manual_seed(0)
        net = trained(ag.nets.build(name), data, given.epochs)
        for density in sorted(given.densities, reverse=True):  # each from the one before
            masks = largest(net, density)
            net = trained(net, data, given.epochs, masks, lr=0.02) if density < 1 else net
            found["rows"].append(row(name, data, net, given.bits))
            keep("rows", found)


def measure_big(given: argparse.Namespace, found: dict[str, Any]) -> None:
    found["big"] = []
    for density, bits in ((0.1, given.bits), (0.1, None), (0.03, given.bits)):
        found["big"].append(big(given.big, density, bits))
        keep("big", found)


def keep(part: str, found: dict[str, Any]) -> None:
    """What was measured so far; each half says how, when and where."""
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    found[f"{part}_by"] = f"{cpu_name()}, one thread, {load}, {datetime.date.today()}, `{command}`"
    write_json(RESULTS, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--densities", type=float, nargs="+", default=[1, 0.5, 0.2, 0.08, 0.03, 0.01])
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--big", type=int, default=100, help="millions of weights")
    parser.add_argument("--nets", type=Path, nargs="+", default=[], help="saved networks instead")
    parser.add_argument("--only", choices=("rows", "big"), help="that half; the other stays as it was measured")
    parser.add_argument("--table", action="store_true", help="only the table, from what was measured before")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "big": []}
    if not given.table:
        for part, measure in (("rows", measure_rows), ("big", measure_big)):
            if given.only in (None, part):
                measure(given, found)
    put(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
