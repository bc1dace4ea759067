"""Puts the tables of reproduce/results/*.json into README.md and docs/, between their markers. Never typed by hand.

python reproduce/tables.py          # after a reproduction; `--check` only says whether they are true
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import han2015_tables
from pictures import lines as lines_of
from results import rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "reproduce" / "results"


COLUMNS = {"accuracy_before": " %", "accuracy_after": " %", "drop": " pt", "latency": "x", "macs": "x", "params": "x"}


def first_light() -> str:
    """The main job's two goals: mean and standard deviation over seeds."""
    held = {row["row"]: row for row in rows(RESULTS / "first_light.json")}
    lines = [
        "| job | seeds | PASS | top-1 before | top-1 after | drop | latency | MACs | params | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in (
        ("lenet5_mnist_latency", "LeNet-5, MNIST, `latency=0.5`"),
        ("vgg11_fashion_macs", "VGG-11 (width 0.5), Fashion-MNIST, `macs=0.25`"),
    ):
        if f"{name}_drop" not in held:
            continue
        one = held[f"{name}_pass"]
        minutes = sum(one["seconds"]) / len(one["seconds"]) / 60
        cells = [_cell(held[f"{name}_{row}"], unit) for row, unit in COLUMNS.items()]
        lines.append(
            f"| {title} | {len(one['ours'])} | {sum(one['ours']):.0f} of {len(one['ours'])} "
            f"| {' | '.join(cells)} | {minutes:.0f} |"
        )
    last = list(held.values())[-1]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `python reproduce/first_light.py`."])


def _cell(row: dict[str, Any], unit: str) -> str:
    spread = f" ± {row['sd']:.2f}" if row["sd"] is not None else ""
    return f"x{row['mean']:.2f}{spread}" if unit == "x" else f"{row['mean']:.2f}{spread}{unit}"


LIGHT = {
    "mobilenet_v1": "MobileNetV1 x0.125",
    "mobilenet_v2": "MobileNetV2 x0.1",
    "mobilenet_v3_small": "MobileNetV3-small x0.25",
    "shufflenet_v2": "ShuffleNetV2 x0.2",
    "shufflenet_v1_g3": "ShuffleNetV1 x0.25, 3 groups",
    "shufflenet_v1_g3_unshuffled": "the same without shuffle",
    "shufflenet_v1_g8": "ShuffleNetV1 x0.25, 8 groups",
    "shufflenet_v1_g8_unshuffled": "the same without shuffle",
}


def light_nets() -> str:
    """Accuracy on Fashion-MNIST against what each network costs."""
    held = {row["row"]: row for row in rows(RESULTS / "light_nets.json")}
    lines = [
        "| network | seeds | top-1 | MACs | params | access | latency | of MobileNetV1's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in LIGHT.items():
        if f"{name}_top1" not in held or f"{name}_latency" not in held:
            continue
        top1, macs, params, access, ms, latency = (
            held[f"{name}_{row}"] for row in ("top1", "macs", "params", "access_bytes", "latency_ms", "latency")
        )
        lines.append(
            f"| {title} | {len(top1['ours'])} | {_cell(top1, ' %')} | {macs['mean'] / 1e6:.2f} M "
            f"| {params['mean'] / 1e3:.0f} k | {access['mean'] / 2**20:.2f} MiB | {ms['mean']:.3f} ms "
            f"| {_cell(latency, 'x')} |"
        )
    last = list(held.values())[-1]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `python reproduce/light_nets.py`."])


SLIMMING = {
    "unpruned": "unpruned",
    "sparse": "trained with the penalty",
    "slimmed": "slimmed, before fine-tuning",
    "tuned": "**slimmed, fine-tuned**",
    "uniform_macs": "uniform L1 to the same MACs, fine-tuned",
    "uniform_params": "uniform L1 to the same parameters, fine-tuned",
    "scratch_e": "the slimmed shapes from scratch, same epochs",
    "scratch_b": "the slimmed shapes from scratch, same compute",
    "unpruned_twice": "unpruned, twice the epochs",
}


def slimming(job: str = "fashion_vgg11") -> str:
    """What one job of liu2017_slimming.py left of accuracy, parameters and MACs."""
    held = {row["row"]: row for row in rows(RESULTS / "liu2017_slimming.json") if row["row"].startswith(f"{job}_")}
    if f"{job}_unpruned_top1" not in held:
        return "Not measured yet."
    lines = ["| network | top-1 by seed, % | mean ± sd | params | MACs |", "|---|---|---|---|---|"]
    for name, title in SLIMMING.items():
        if f"{job}_{name}_top1" not in held:
            continue
        top1, params, macs = (held[f"{job}_{name}_{row}"] for row in ("top1", "params", "macs"))
        left = [
            held[f"{job}_{name}_{row}"]["mean"] / held[f"{job}_unpruned_{row}"]["mean"] for row in ("params", "macs")
        ]
        fewer = [f" ({share - 1:+.1%})" if share != 1 else "" for share in left]
        by_seed = " ".join(f"{value:.2f}" for _, value in sorted(zip(top1["seeds"], top1["ours"], strict=True)))
        lines.append(
            f"| {title} | {by_seed} | {_cell(top1, ' %')} | {params['mean'] / 1e3:.0f} k{fewer[0]} "
            f"| {macs['mean'] / 1e6:.2f} M{fewer[1]} |"
        )
    last = held[f"{job}_unpruned_top1"]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `{last['command']}`."])


def slimming_tuning(job: str = "fashion_vgg11") -> str:
    """What every lambda and share of channels left, one seed, on the validation images."""
    held = {row["row"]: row for row in rows(RESULTS / "liu2017_slimming.json")}
    tried = sorted(
        {tuple(map(float, found)) for found in re.findall(rf"{job}_lambda=(\S+)_channels=(\S+)_params", " ".join(held))}
    )
    lines = [
        "| lambda | channels kept | params | MACs | after the penalty | cut | fine-tuned |",
        "|---|---|---|---|---|---|---|",
    ]
    for penalty, share in tried:
        name = f"{job}_lambda={penalty:g}_channels={share:g}"
        cells = [f"x{held[f'{name}_{metric}']['mean']:.3f}" for metric in ("params", "macs")]
        accuracies = (held.get(f"{name}_{stage}_val") for stage in ("sparse", "slimmed", "tuned"))
        cells += [f"{row['mean']:.2f} %" if row else "goals missed" for row in accuracies]
        lines.append(f"| {penalty:g} | {share:g} | {' | '.join(cells)} |")
    last = held[f"{job}_lambda={tried[-1][0]:g}_channels={tried[-1][1]:g}_params"]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `{last['command']}`."])


CIFAR = {  # the paper's Table 1: error of the whole network, of the pruned one; parameters, FLOPs removed
    "cifar_vgg19": ("VGG-19 x0.25", "VGG-19, 70 % of channels", (6.34, 6.20, -0.885, -0.510)),
    "cifar_resnet29": ("ResNet-29 x0.5, pre-activation", "ResNet-164, 60 %", (5.42, 5.27, -0.352, -0.449)),
    "cifar_densenet40": ("DenseNet-40, growth 4", "DenseNet-40, 40 %", (6.11, 5.19, -0.357, -0.284)),
}


def slimming_cifar() -> str:
    """The paper's three networks, scaled down, on CIFAR-10 (JPEG), each above the paper's own row."""
    held = {row["row"]: row for row in rows(RESULTS / "liu2017_slimming.json")}
    lines = [
        "| network | unpruned | with the penalty | slimmed | fine-tuned | params | MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    for job, (title, theirs, (whole, pruned, params, macs)) in CIFAR.items():
        if f"{job}_tuned_top1" not in held:
            continue
        cells = [f"{held[f'{job}_{row}_top1']['mean']:.2f} %" for row in ("unpruned", "sparse", "slimmed", "tuned")]
        cells += [
            f"{held[f'{job}_tuned_{metric}']['mean'] / held[f'{job}_unpruned_{metric}']['mean'] - 1:+.1%}"
            for metric in ("params", "macs")
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append(
            f"| the paper's {theirs} | {100 - whole:.2f} % | | | {100 - pruned:.2f} % | {params:+.1%} | {macs:+.1%} |"
        )
    if len(lines) == 2:
        return "Not measured yet."
    last = next(held[f"{job}_tuned_top1"] for job in CIFAR if f"{job}_tuned_top1" in held)
    return "\n".join([*lines, "", f"One seed; {last['hardware']}, {last['date']}; `{last['command']}` and so on."])


HINTON = {
    "teacher": "teacher 784-1200-1200-10: dropout, max-norm, images moved by up to 2 pixels",
    "teacher_first": "the same after the first 60 of its 360 epochs",
    "student_hard": "student 784-800-800-10, labels alone",
    "student_soft_T20": "student, labels and the teacher's soft targets, T = 20, images not moved",
    "student_soft_alone": "student, the soft targets alone, T = 20",
    "no_threes": "the student of labels and soft targets without 3s",
    "no_threes_on_3s": "of these on the 1,010 threes",
    "no_threes_bias_validation": "bias of 3 raised, by validation",
    "no_threes_bias_validation_on_3s": "of these on the threes",
    "no_threes_bias_test": "bias of 3 raised, *by the test images*, as in the paper",
    "no_threes_bias_test_on_3s": "of these on the threes",
    "only_7_8": "the student of labels and soft targets with 7s and 8s alone",
    "only_7_8_bias_validation": "biases of 7 and 8 lowered, by validation",
    "only_7_8_bias_test": "biases of 7 and 8 lowered, *by the test images*, as in the paper",
    "cnn": "one convolutional teacher of the student below, 0.65 M parameters",
    "cnn_ensemble": "these teachers together",
    "student_best": "**student 784-800-800-10, function matching on views, no labels**",
}


def hinton2015() -> str:
    """Test errors of 10,000 beside the paper's."""
    held = {row["row"]: row for row in rows(RESULTS / "hinton2015_mnist.json")}
    lines = ["| network | paper | ours, mean ± sd | by seed |", "|---|---|---|---|"]
    for name, title in HINTON.items():
        if name not in held:
            continue
        one = held[name]
        spread = f" ± {one['sd']:.1f}" if one["sd"] is not None else ""
        by_seed = " ".join(f"{value:.0f}" for _, value in sorted(zip(one["seeds"], one["ours"], strict=True)))
        paper = f"{one['paper']:.0f}" if one["paper"] is not None else ""
        lines.append(f"| {title} | {paper} | {one['mean']:.1f}{spread} | {by_seed} |")
    if len(lines) == 2:
        return "Not measured yet."
    last = list(held.values())[-1]
    return "\n".join([*lines, "", f"{last['hardware']}, {last['date']}; `{last['command']}`."])


def _grid() -> dict[tuple[float, float], dict[str, Any]]:
    """{(units, temperature): row}"""
    held = [row for row in rows(RESULTS / "hinton2015_mnist.json") if row["row"].startswith("grid_")]
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for row in held:
        units, temperature = row["row"].removeprefix("grid_").split("_T")
        found[float(units), float(temperature)] = row
    return found


def hinton2015_grid() -> str:
    """Validation errors by width (rows) and temperature (columns)."""
    cells = _grid()
    if not cells:
        return "Not measured yet."
    temperatures = sorted({temperature for _, temperature in cells})
    lines = [
        "| units | " + " | ".join(f"T = {temperature:g}" for temperature in temperatures) + " |",
        "|---" * (len(temperatures) + 1) + "|",
    ]
    for width in sorted({width for width, _ in cells}):
        row = (cells.get((width, temperature)) for temperature in temperatures)
        shown = (f"{one['mean']:.0f}" + (f" ± {one['sd']:.0f}" if one["sd"] else "") if one else "" for one in row)
        lines.append(f"| {width:.0f} | {' | '.join(shown)} |")
    seeds = max(len(row["ours"]) for row in cells.values())
    last = list(cells.values())[-1]
    return "\n".join(
        [*lines, "", "![Validation errors by temperature, a line a width](hinton2015.svg)", "",
         f"Errors of 10,000 validation images, seeds: {seeds}; {last['hardware']}, {last['date']}."]
    )  # fmt: skip


def hinton2015_picture() -> str | None:
    """The grid as a picture, SVG."""
    cells = _grid()
    if not cells:
        return None
    widths = sorted({width for width, _ in cells})
    series = {
        f"{width:.0f} units": [
            (t, row["mean"], row["sd"] or 0.0) for (w, t), row in sorted(cells.items()) if w == width
        ]
        for width in widths
    }
    return lines_of(series, "temperature", "validation errors of 10,000")


STUDENTS = {
    "mobilenet_v2": "MobileNetV2 x0.5",
    "shufflenet_v1": "ShuffleNetV1 x0.5, 3 groups",
    "shufflenet_v2": "ShuffleNetV2 x0.5",
}
STUDENT_LOSSES = {
    "alone": "alone", "kd": "KD", "fitnet": "FitNet", "at": "AT", "sp": "SP", "dkd": "DKD", "dist": "DIST",
}  # fmt: skip


def kd_students(prefix: str = "") -> str:
    """Test accuracy of each student by loss; bold: above KD by more than two standard errors of the difference."""
    held = {row["row"]: row for row in rows(RESULTS / "kd_students.json")}
    if f"{prefix}teacher" not in held:
        return "Not measured yet."
    lines = ["| student | " + " | ".join(STUDENT_LOSSES.values()) + " |", "|---" * (len(STUDENT_LOSSES) + 1) + "|"]
    for student, title in STUDENTS.items():
        cells = []
        for loss in STUDENT_LOSSES:
            one, plain = held.get(f"{prefix}{student}_{loss}"), held.get(f"{prefix}{student}_kd")
            shown = "" if one is None else f"{_cell(one, ' %')} ({len(one['ours'])})"
            cells.append(f"**{shown}**" if one and plain and _beyond(one, plain) else shown)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    last = held[f"{prefix}teacher"]
    seeds = len(last["ours"])
    return "\n".join(
        [*lines, "", f"Teacher: {_cell(last, ' %')} ({seeds}). In brackets: seeds. {last['hardware']}, {last['date']}; "
         f"`{last['command']}`."]
    )  # fmt: skip


def _beyond(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the mean is higher by more than two standard errors of the difference; never with one seed."""
    if one["sd"] is None or other["sd"] is None:
        return False
    error = (one["sd"] ** 2 / len(one["ours"]) + other["sd"] ** 2 / len(other["ours"])) ** 0.5
    return bool(one["mean"] - other["mean"] > 2 * error)


PAGE = ROOT / "docs" / "slimming.md"
SPARSE = ROOT / "docs" / "sparse.md"
TABLES = {
    "han2015_mnist": (SPARSE, han2015_tables.paper_table),
    "han2015_ladder": (SPARSE, han2015_tables.ladder_table),
    "han2015_tradeoff": (SPARSE, han2015_tables.tradeoff_table),
    "han2015_sensitivity": (SPARSE, han2015_tables.sensitivity_table),
    "first_light": (ROOT / "README.md", first_light),
    "light_nets": (ROOT / "docs" / "nets.md", light_nets),
    "liu2017_slimming": (PAGE, slimming),
    "slimming_tuning": (PAGE, slimming_tuning),
    "slimming_cifar": (PAGE, slimming_cifar),
    "hinton2015": (ROOT / "docs" / "hinton2015.md", hinton2015),
    "kd_students": (ROOT / "docs" / "hinton2015.md", kd_students),
    "kd_students_cifar": (ROOT / "docs" / "hinton2015.md", lambda: kd_students("cifar10_")),
    "hinton2015_grid": (ROOT / "docs" / "hinton2015.md", hinton2015_grid),
}
SOURCES = (
    dict.fromkeys(("slimming_tuning", "slimming_cifar"), "liu2017_slimming")
    | dict.fromkeys(("hinton2015", "hinton2015_grid"), "hinton2015_mnist")
    | {"kd_students_cifar": "kd_students"}
    | dict.fromkeys(("han2015_ladder", "han2015_tradeoff", "han2015_sensitivity"), "han2015_mnist")
)  # result files of other names
PICTURES = {
    ROOT / "docs" / "hinton2015.svg": hinton2015_picture,
    ROOT / "docs" / "han2015_tradeoff.svg": han2015_tables.tradeoff_picture,
}


def main() -> None:
    stale = []
    for name, (path, table) in TABLES.items():
        if not (RESULTS / f"{SOURCES.get(name, name)}.json").exists():
            continue
        text = path.read_text()
        if f"<!-- table:{name} -->" not in text:
            raise SystemExit(f"tables: {path.name} has no place for {name}; add <!-- table:{name} --> <!-- /table -->")
        block = f"<!-- table:{name} -->\n{table()}\n<!-- /table -->"
        new = re.sub(rf"<!-- table:{name} -->.*?<!-- /table -->", lambda _, b=block: b, text, flags=re.S)
        if new != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    for path, picture in PICTURES.items():
        drawn = picture()
        if drawn is not None and (not path.exists() or path.read_text() != drawn):
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(drawn)
    print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'nothing'}")
    if stale and "--check" in sys.argv:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
