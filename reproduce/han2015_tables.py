"""The tables of han2015_mnist.py's results, for docs/sparse.md; `tables.py` puts them there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pictures import lines as lines_of
from results import rows

RESULTS = Path(__file__).parent / "results" / "han2015_mnist.json"
NETS = {
    "lenet_300_100": "LeNet-300-100",
    "lenet5": "LeNet-5 (Caffe's)",
    "alexnet": "AlexNet, a quarter as wide, Fashion-MNIST",
}
PAPER = {  # rows; errors; bytes with Deep Compression
    "lenet_300_100": (("dense", "1.64 %"), ("12x", "1.59 % at 12x; 27 KB")),
    "lenet5": (("dense", "0.80 %"), ("12x", "0.77 % at 12x; 44 KB")),
    "alexnet": (("dense", "ImageNet: 42.78 %"), ("9x", "ImageNet: 42.77 % at 9x; 6.9 MB of 240")),
}


def _held() -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in rows(RESULTS)}


def _error(row: dict[str, Any]) -> str:
    spread = f" ± {row['sd']:.2f}" if row["sd"] is not None else ""
    return f"{row['mean']:.2f}{spread} %"


def _by_seed(row: dict[str, Any]) -> str:
    return " ".join(f"{value:.2f}" for _, value in sorted(zip(row["seeds"], row["ours"], strict=True)))


def _signed(held: dict[str, dict[str, Any]]) -> str:
    last = list(held.values())[-1]
    return f"{last['hardware']}, {last['date']}; `python reproduce/han2015_mnist.py --net lenet5` and so on."


def _bytes(row: dict[str, Any], name: str) -> str:
    return f"{row[name] / 1000:.2f} KB" if name in row else ""


def paper_table() -> str:
    """Whole and at 12x, beside the paper."""
    held = _held()
    lines = [
        "| network | error by seed, % | mean ± sd | weights left | fewer | file | the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in NETS.items():
        for row, paper in PAPER[name]:
            one = held.get(f"{name}_{row}")
            if one is not None:
                what, kinds = "whole" if row == "dense" else "pruned", ""
                if row != "dense" and "conv_ratio" in one:
                    kinds = f" (convolutions x{one['conv_ratio']:.1f}, linear layers x{one['fc_ratio']:.1f})"
                lines.append(
                    f"| {title}, {what} | {_by_seed(one)} | {_error(one)} | {one['kept']:,.0f} "
                    f"| x{one['ratio']:.1f}{kinds} | {_bytes(one, 'bytes')} | {paper} |"
                )
    return "\n".join([*lines, "", _signed(held)]) if len(lines) > 2 else "Not measured yet."


def ladder_table() -> str:
    """Every rung: validation, by which the best was chosen, test, and the file."""
    held = _held()
    lines = [
        "| network | rung | seeds | validation error | test error | weights left | file, shared values | its error "
        "| lossless | iid bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in NETS.items():
        found = {int(m[1]): row for key, row in held.items() if (m := re.fullmatch(rf"{name}_ladder_(\d+)x", key))}
        for _, one in sorted(found.items()):
            file_error = f"{one['file_error']:.2f} %" if "file_error" in one else ""
            lines.append(
                f"| {title} | x{one['ratio']:.1f} | {len(one['ours'])} | {one['val']:.2f} % | {_error(one)} "
                f"| {one['kept']:,.0f} | {_bytes(one, 'bytes')} | {file_error} | {_bytes(one, 'bytes_lossless')} "
                f"| {_bytes(one, 'bytes_bound')} |"
            )
    return "\n".join([*lines, "", _signed(held)]) if len(lines) > 2 else "Not measured yet."


def tradeoff_table() -> str:
    """Figure 5, on LeNet-300-100: test error against the share of weights kept."""
    held, ways = _held(), {"none": "not retrained", "once": "pruned once, retrained", "iterative": "step by step"}
    points = {m[1] for key in held if (m := re.fullmatch(r"lenet_300_100_tradeoff_l2_none_([\d.]+)", key))}
    if not points:
        return "Not measured yet."
    shares = sorted(points, key=float, reverse=True)
    heads = " | ".join(f"{100 * float(share):g} % kept" for share in shares)
    lines = [f"| trained with | {heads} |", "|---" * (len(shares) + 1) + "|"]
    for norm in ("l1", "l2"):
        for way, title in ways.items():
            cells = [held.get(f"lenet_300_100_tradeoff_{norm}_{way}_{share}") for share in shares]
            shown = " | ".join(_error(cell) if cell else "" for cell in cells)
            lines.append(f"| {norm.upper()}, {title} | {shown} |")
    return "\n".join([*lines, "", _signed(held)])


def tradeoff_picture() -> str | None:
    """Figure 5 as SVG: test error against how many times fewer weights are left; bars of a standard deviation."""
    ways = {"none": "as pruned", "once": "once", "iterative": "step by step"}
    series: dict[str, list[tuple[float, float, float]]] = {}
    for key, row in _held().items():
        if match := re.fullmatch(r"lenet_300_100_tradeoff_(l[12])_(\w+)_([\d.]+)", key):
            name = f"{match[1].upper()}, {ways[match[2]]}"
            fewer = float(f"{1 / float(match[3]):.2g}")
            series.setdefault(name, []).append((fewer, row["mean"], row["sd"] or 0.0))
    if not series:
        return None
    series = {name: sorted(points) for name, points in sorted(series.items())}
    return lines_of(series, "weights over weights kept", "% errors on test")


def sensitivity_table() -> str:
    """Figure 6: validation error with one layer pruned and nothing retrained, mean over seeds."""
    held = _held()
    found = {key: row for key, row in held.items() if "_sensitivity_" in key}
    if not found:
        return "Not measured yet."
    shares = sorted((name for name in next(iter(found.values())) if name.startswith("at_")), key=lambda s: float(s[3:]))
    heads = " | ".join(f"{100 * float(share[3:]):g} %" for share in shares)
    lines = [f"| layer, share of its weights gone | {heads} |", "|---" * (len(shares) + 1) + "|"]
    for key, row in found.items():
        net, _, layer = key.partition("_sensitivity_")
        lines.append(f"| {NETS[net]} {layer.rpartition('.')[2]} | {' | '.join(f'{row[s]:.2f} %' for s in shares)} |")
    return "\n".join([*lines, "", _signed(held)])
