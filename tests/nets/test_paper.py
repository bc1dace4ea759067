"""Every number that the papers print is what the net counts, or is known not to be, with the reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from aerogel.nets import NETS, build, parse
from aerogel.nets.paper import KNOWN, PAPER


@cache
def count(spec: str) -> tuple[int, int]:
    """Parameters and MACs of convolutions and linear layers for one image.

    The net runs on an empty batch: every shape is the true one, and nothing is computed.
    """
    name, arguments = parse(spec)
    with torch.device("meta"):
        net = build(name, **arguments).eval()
    macs = []

    def hook(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        macs.append(layer.weight.numel() * output.shape[2:].numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    side = net.spec["args"]["input_size"]
    with torch.no_grad():
        net.to_empty(device="cpu")(torch.empty(0, net.spec["args"]["in_channels"], side, side))
    return sum(p.numel() for p in net.parameters()), sum(macs)


def digits(printed: float) -> int:
    """The decimals of a number as it was printed: 1 of 2.0, 2 of 1.32, 0 of 569."""
    return len(str(printed).partition(".")[2])


@pytest.mark.parametrize("spec", PAPER)
def test_our_count_is_the_papers_or_known_not_to_be(spec: str) -> None:
    row = PAPER[spec]
    params, macs = count(spec)
    ours = {"params_M": params / 1e6, "madds_M": macs / 1e6}
    wrong = {key: value for key, value in ours.items() if key in row and round(value, digits(row[key])) != row[key]}
    if spec in KNOWN:
        assert wrong, f"{spec} is in KNOWN, but now counts what the paper prints"
    else:
        assert not wrong, f"{spec}: the paper prints {row}"


def test_the_tables_are_of_nets_that_exist() -> None:
    assert {parse(spec)[0] for spec in PAPER} <= set(NETS)
    assert set(KNOWN) <= set(PAPER)
    assert all(reason.strip() for reason in KNOWN.values())


@pytest.mark.parametrize("spec", PAPER)
def test_every_row_has_a_source_an_accuracy_and_a_count(spec: str) -> None:
    row = PAPER[spec]
    assert row["source"].startswith("arXiv:")
    assert 40 < row["top1"] < 80
    assert "madds_M" in row


def test_a_wider_net_or_a_larger_image_is_printed_as_more_accurate() -> None:
    """A slip of the pen in the table would break the order."""
    for family in (
        [f"mobilenet_v1:width={width}" for width in (0.25, 0.5, 0.75)] + ["mobilenet_v1"],
        [f"mobilenet_v1:input_size={size}" for size in (128, 160, 192)] + ["mobilenet_v1"],
        ["mobilenet_v2", "mobilenet_v2:width=1.4"],
        ["mobilenet_v3_small:width=0.75", "mobilenet_v3_small", "mobilenet_v3_large:width=0.75", "mobilenet_v3_large"],
        [f"shufflenet_v2:width={width}" for width in (0.5, 1.0, 1.5, 2.0)],
    ):
        for key in ("madds_M", "top1"):
            values = [PAPER[spec][key] for spec in family]
            assert values == sorted(values), f"{key} of {family}"
