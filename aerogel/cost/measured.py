"""A model's exported file on this machine: its latency, measured or predicted, whole and by layer.

By layer, kernels of the runtime are given to the layers of the captured graph through the module that both name. A
kernel computes several layers (a convolution with its norm and activation); its time goes to the one they are fused
into. Where one module holds several kernels, they are matched with its layers in the order they run, and what is left
over goes to the last of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aerogel.cost.count import Layer
from aerogel.cost.device import Device
from aerogel.cost.kernels import KernelTable
from aerogel.cost.latency import Latency
from aerogel.cost.predict import Prediction, predict
from aerogel.cost.runtime import read_runtime


@dataclass(frozen=True)
class OnThisMachine:
    """latency and measured_ms are measured, prediction and predicted_ms predicted; None where not asked for.

    measured_ms, predicted_ms: {layer's node: milliseconds}.
    """

    latency: Latency | None
    measured_ms: dict[str, float] | None
    prediction: Prediction | None
    predicted_ms: dict[str, float] | None


def on_this_machine(
    path: Path,
    layers: Iterable[Layer],
    *,
    latency: Latency | None = None,
    device: Device | None = None,
    threads: int = 1,
) -> OnThisMachine:
    """The exported file of a network with these layers, by layer.

    latency: of the whole, where it was measured: then the layers' measured times are told too. device: this machine's
    profile, to predict with.

    Kernels that the machine's table lacks are measured for a prediction. Raises AerogelError where the file cannot run.
    """
    layers = list(layers)
    runtime = read_runtime(path, threads=threads)
    prediction = predict(runtime, KernelTable(threads), device) if device else None
    in_place = [(kernel.module, kernel.ms) for kernel in runtime.kernels]
    return OnThisMachine(
        latency=latency,
        measured_ms=by_layer(in_place, layers) if latency else None,
        prediction=prediction,
        predicted_ms=by_layer(prediction.kernel_ms, layers) if prediction else None,
    )


def by_layer(kernels: Iterable[tuple[str, float]], layers: Iterable[Layer]) -> dict[str, float]:
    """{layer's node: milliseconds} of kernels, (module, milliseconds) in the order they run."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        host = layer.fused_into or layer.node
        if (layer.fused_into or layer.runs) and host not in hosts[layer.module]:
            hosts[layer.module].append(host)
    found: dict[str, float] = defaultdict(float)
    taken: dict[str, int] = defaultdict(int)
    for module, ms in kernels:
        module = _nearest(module, hosts)
        here = hosts.get(module, [])
        if here:
            found[here[min(taken[module], len(here) - 1)]] += ms
            taken[module] += 1
    return dict(found)


def _nearest(module: str, hosts: Mapping[str, list[str]]) -> str:
    """The module itself, or the innermost around it that has layers which run."""
    while module and not hosts.get(module):
        module = module.rpartition(".")[0]
    return module
