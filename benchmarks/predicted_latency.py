"""How well `aerogel.cost.predict` tells the latency of networks from families that it was not calibrated with.

    python benchmarks/predicted_latency.py [--rounds 3] [--only NAME ...]

The constants come from the anchors of `aerogel.cost.calibrate` (ResNets, MobileNetV2, VGG); none of the networks below
is of their families. Kernels are measured one by one, then the whole file, for each network in turn, so that a machine
that slows down slows both; this is done `--rounds` times from nothing and the medians over rounds are compared. Prints
and writes benchmarks/results/predicted_latency.json: the prediction, the measurement with its interval, the error, and
how many are within 5 and 10 %, as nn-Meter reports it (Zhang et al. 2021: 99 % within 10 % on a phone's CPU).
`roofline` beside it is the profile alone, without any kernel measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from scipy.stats import spearmanr

from aerogel.cost.calibrate import ANCHORS, calibrate, export_zoo
from aerogel.cost.device import this_path, write
from aerogel.cost.kernels import KernelTable
from aerogel.cost.latency import measure
from aerogel.cost.predict import estimate, predict
from aerogel.cost.runtime import read_runtime
from aerogel.files import write_json

RESULTS = Path(__file__).parent / "results" / "predicted_latency.json"
NETS = (
    "lenet_300_100", "lenet5", "mlp", "alexnet",
    "densenet40", "densenet121", "densenet121:input_size=96",
    "mobilenet_v1", "mobilenet_v1:width=0.5", "mobilenet_v1:width=0.25,input_size=128",
    "mobilenet_v1:depthwise=false,width=0.5",
    "mobilenet_v3_large", "mobilenet_v3_large:minimalistic=true", "mobilenet_v3_small",
    "mobilenet_v3_small:width=0.5,input_size=160",
    "mnasnet_a1", "mnasnet_b1", "mnasnet_small",
    "shufflenet_v1", "shufflenet_v1:groups=1", "shufflenet_v1:groups=8,width=0.5",
    "shufflenet_v2:width=0.5", "shufflenet_v2", "shufflenet_v2:width=1.5", "shufflenet_v2:merged=false",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="for one measurement of a whole network")
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS))
    options = parser.parse_args()
    began = time.perf_counter()
    device = calibrate(say=lambda text: print("calibrating:", text, flush=True))
    write(device, this_path())
    print(f"latency = {device.kernel_scale} x sum + {device.kernel_us} us x kernels + {device.run_us} us", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in options.only:
            path = export_zoo(spec, Path(folder) / "net.onnx")
            predicted, measured = [], []
            for number in range(options.rounds):
                table = KernelTable(path=Path(folder) / f"{number}.json")  # from nothing
                table.ms.clear()
                runtime = read_runtime(path, seconds=0.2, seed=number)
                found = predict(runtime, table, device)
                predicted.append(found.ms)
                measured.append(measure(path, seconds=options.seconds, seed=number))
            ours, real = statistics.median(predicted), statistics.median(one.median_ms for one in measured)
            scale = device.kernel_scale
            alone = sum(scale * estimate(one, device) for one in runtime.kernels)
            row = {
                "net": spec, "kernels": found.kernels, "estimated": sum(found.estimated.values()), "predicted_ms": ours,
                "measured_ms": real, "measured_rounds": [[one.low_ms, one.median_ms, one.high_ms] for one in measured],
                "predicted_rounds": predicted, "error": ours / real - 1, "roofline_ms": alone,
                "roofline_error": alone / real - 1,
            }  # fmt: skip
            rows.append(row)
            print(f"{spec:45}{ours:10.3f} ms predicted{real:10.3f} ms measured  {100 * row['error']:+6.1f} %"
                  f"   roofline {100 * row['roofline_error']:+6.1f} %", flush=True)  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, summary(rows) | {
        "command": "python benchmarks/predicted_latency.py", "anchors": ANCHORS, "hardware": device.source,
        "cores": os.cpu_count(), "date": date.today().isoformat(), "seconds": round(time.perf_counter() - began),
        "device": device.model_dump(), "rows": rows,
    })  # fmt: skip


def summary(rows: list[dict]) -> dict[str, float]:
    errors = [abs(row["error"]) for row in rows]
    held = {
        "networks": len(rows),
        "within_5": sum(error <= 0.05 for error in errors) / len(rows),
        "within_10": sum(error <= 0.10 for error in errors) / len(rows),
        "mean_absolute_error": statistics.fmean(errors),
        "worst": max(errors),
        "spearman": float(spearmanr([r["predicted_ms"] for r in rows], [r["measured_ms"] for r in rows]).statistic),
        "roofline_within_10": sum(abs(row["roofline_error"]) <= 0.10 for row in rows) / len(rows),
        "roofline_mean_absolute_error": statistics.fmean(abs(row["roofline_error"]) for row in rows),
    }
    for name, value in held.items():
        print(f"{name:32}{value:.3f}")
    return held


if __name__ == "__main__":
    main()
