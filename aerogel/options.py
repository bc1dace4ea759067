"""The options of the command line, a type each, so that a verb's signature reads as its usage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_FORMS = "zoo name (lenet5, mobilenet_v2:width=0.5), saved folder, file.py:factory; hf:TYPE to count"
Model = Annotated[str, typer.Argument(help=MODEL_FORMS)]
RunModel = Annotated[str | None, typer.Argument(help=MODEL_FORMS, show_default=False)]
DATA_FORMS = "digits, mnist, fashion_mnist, cifar10, folder:PATH, packed:FOLDER, hf:NAME, wds:SHARDS, file.py:factory"
Data = Annotated[str | None, typer.Option(help=DATA_FORMS)]
DataSpec = Annotated[str, typer.Argument(metavar="DATA", help=DATA_FORMS)]
Target = Annotated[
    list[str] | None, typer.Option(help="latency=0.5, latency=2.5ms, macs=150M, params=0.1 ...; repeatable")
]
Drop = Annotated[float | None, typer.Option(help="points of accuracy that may be lost (default 1)")]
NoDrop = Annotated[
    float | None, typer.Option("--max-drop", help="points of accuracy that may be lost (default: told, not judged)")
]
Method = Annotated[
    str | None,
    typer.Option(
        help="slimming, magnitude (= l2, the default), l1, bn_scale, taylor, fpgm, hessian, lamp, random ...; with "
        "--sparsity magnitude, lamp, taylor, movement, snip, random"
    ),
]
Schedule = Annotated[
    str | None, typer.Option(help="one-shot, iterative (default), linear, gradual; with --sparsity also rewind")
]
Steps = Annotated[int | None, typer.Option(help="cuts (default: 3; gradual 8, rewind 5, one-shot 1)")]
Sparse = Annotated[
    float | None,
    typer.Option("--sparsity", help="share of single weights that goes, as 0.9, instead of channels; 0 to scan alone"),
]
Scan = Annotated[
    bool,
    typer.Option("--scan", help="accuracy against the share removed, of each group of channels or layer of weights"),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="saved folder, .safetensors or .pt state dict; torchvision:FILE, timm:FILE, "
        "timm_tf:FILE or megvii:FILE for another library's"
    ),
]
Out = Annotated[Path | None, typer.Option(help="folder to write; never overwritten")]
Size = Annotated[str | None, typer.Option("--input", metavar="C,H,W", help="input size; images are resized to it")]
Seed = Annotated[int | None, typer.Option(help="of initial weights, data order, augmentation")]
Epochs = Annotated[float | None, typer.Option(help="of training the original")]
BatchSize = Annotated[int | None, typer.Option(help="images a step")]
Rate = Annotated[float | None, typer.Option("--lr", help="peak learning rate")]
Threads = Annotated[int | None, typer.Option(help="of the measured runtime (default 1)")]
Json = Annotated[bool, typer.Option("--json", help="machine output on stdout, nothing else there")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file with any option; the command line wins")]
By = Annotated[str | None, typer.Option(help="rows of the table: layer (default), module, op or family")]
Depth = Annotated[int | None, typer.Option(help="modules down to so many parts of their path, as --depth 2")]
OnDevice = Annotated[
    str | None, typer.Option("--device", help="predict times: a profile's name, FILE.toml, or this (this machine)")
]
Measure = Annotated[bool, typer.Option("--measure", help="time the exported file, whole and by layer")]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="measure this machine as a device (about a minute), for --device this")
]
Against = Annotated[str | None, typer.Option(metavar="MODEL", help="the network to compare with, layer by layer")]
Budget = Annotated[
    str | None,
    typer.Option(help="macs<=320M,params<=4M,peak<=6MiB,latency<=3ms, or a TOML file; exit code 2 when it is broken"),
]
Csv = Annotated[str | None, typer.Option("--csv", metavar="FILE", help="the table as CSV; - is stdout")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Markdown on stdout, as for a comment")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="one self-contained page with plots")]
LintDevice = Annotated[
    str | None,
    typer.Option("--device", help="a profile's name, FILE.toml, or this (the default where it was calibrated)"),
]
FailOn = Annotated[list[str] | None, typer.Option(metavar="RULE=SHARE%", help="exit code 2 above it: G1=5%")]
Allow = Annotated[list[str] | None, typer.Option(metavar="RULE:MODULES", help="left out: G2:features.*")]
LintConfig = Annotated[Path | None, typer.Option("--config", help="TOML file with device, allow, fail_on")]
Trust = Annotated[bool, typer.Option("--trust", help="import the code that a saved folder or a run names")]
Teacher = Annotated[
    list[str] | None, typer.Option(help="saved folder, hf:FOLDER, file.py:factory, zoo name with weights; repeatable")
]
TeacherWeights = Annotated[
    list[str] | None, typer.Option(help="as --weights, of each --teacher that is no saved folder, in their order")
]
Student = Annotated[str | None, typer.Option(help="the network to train: zoo name, saved folder, file.py:factory")]
Loss = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=WEIGHT],...", help="kd=0.9,hard=0.1 (the default), dkd, dist, at, hint, crd ..."),
]
Temperature = Annotated[float | None, typer.Option(help="of soft targets (default 4)")]
Tap = Annotated[
    list[str] | None,
    typer.Option(metavar="STUDENT=TEACHER", help="modules whose features at, hint, crd ... compare; repeatable"),
]
ExploreTemperature = Annotated[
    bool,
    typer.Option("--explore-temperature", help="train nothing: what T does to the teacher's answers, and which to try"),
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", metavar="FOLDER", help="keeps the teachers' answers: another run asks them nothing"),
]
Mixup = Annotated[bool, typer.Option("--mixup", help="both see mixed images, as in function matching; without labels")]
Alone = Annotated[bool, typer.Option("--alone", help="train the same student with labels only, too, for comparison")]
StudentEpochs = Annotated[float | None, typer.Option("--epochs", help="of training the student")]
Written = Annotated[Path, typer.Option(help="the .onnx file, or the folder, to write; never overwritten")]
To = Annotated[str, typer.Option("--to", help="onnx; sparse: a folder small by its zeros; dense: the inverse")]
Bits = Annotated[int | None, typer.Option(help="sparse: weights share 2^BITS values a tensor (default: as they are)")]
BitsDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="sparse with --data: points of validation accuracy that bits may cost (0.1)"),
]
