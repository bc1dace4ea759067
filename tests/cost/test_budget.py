"""Budgets: what a user may type, what is refused and how, and what a verdict says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aerogel.cost import Cost, count, device
from aerogel.cost.budget import MEASURES, Limit, judge, parse_budget
from aerogel.cost.roofline import total_ms
from aerogel.errors import AerogelError
from aerogel.graph import capture

PI = device("raspberry_pi_4")


def small() -> Cost:
    """Two layers: 2 x 3 x 8 = 48 MACs, 2 x 8 x 5 = 80 MACs; 32 and 45 parameters."""
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
    return count(capture(net, (torch.zeros(2, 3),)))


class Inverse(nn.Module):
    """linalg_inv has no formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x)


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("macs<=320M", "macs", 320e6),
        ("macs <= 320000000", "macs", 320e6),
        ("flops<=2.3M", "flops", 2_300_000),
        ("params<=4M", "params", 4e6),
        ("peak<=6MiB", "peak", 6 * 2**20),
        ("peak_bytes<=6MB", "peak", 6e6),
        ("access_bytes<=1.5 KiB", "access", 1536),
        ("latency<=3ms", "latency", 3.0),
        ("latency<=800us", "latency", 0.8),
    ],
)
def test_what_a_user_types(text: str, measure: str, limit: float) -> None:
    (found,) = parse_budget(text)
    assert (found.measure, found.limit) == (measure, limit)


def test_several_limits_keep_their_order() -> None:
    limits = parse_budget("macs<=320M, params<=4M,peak<=6MiB,latency<=3ms")
    assert [limit.measure for limit in limits] == ["macs", "params", "peak", "latency"]


def test_a_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text('macs = "320M"\nparams = 4000000\npeak = "6MiB"\n')
    assert parse_budget(str(file)) == tuple(
        Limit(limit.measure, limit.limit, text)
        for limit, text in zip(
            parse_budget("macs<=320M,params<=4M,peak<=6MiB"),
            ["macs<=320M", "params<=4000000", "peak<=6MiB"],
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--budget '' must be MEASURE<=VALUE or a \.toml file; write macs<=320M"),
        ("macs", r"--budget 'macs' must be MEASURE<=VALUE"),
        ("macs<5M", r"--budget 'macs<5M' must be MEASURE<=VALUE"),
        ("macs<=5M,", r"--budget '' must be MEASURE<=VALUE"),
        ("mac<=5M", r"'mac' is no measure; did you mean macs\?"),
        ("macs<=5MiB", r"macs<=5MiB: the limit must be a positive number with its unit; write macs<=3K or macs<=3M"),
        ("macs<=0", r"macs<=0: the limit must be a positive number"),
        ("macs<=-5M", r"macs<=-5M: the limit must be a positive number"),
        ("macs<=1e999", r"macs<=1e999: the limit must be a positive number"),
        ("peak<=6", r"peak<=6: the limit must be .*peak<=3KB or peak<=3MB"),
        ("latency<=3", r"latency<=3: the limit must be .*latency<=3us or latency<=3ms or latency<=3s"),
        ("macs<=5M,macs<=6M", r"each measure is given once, got macs twice in 'macs<=5M,macs<=6M'"),
        ("peak<=5MiB,peak_bytes<=6MiB", r"got peak twice"),
        ("none.toml", r"--budget: cannot read none\.toml: No such file"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        parse_budget(text)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("macs: 3\n", r"b\.toml is not TOML"),
        ("", r"b\.toml: the file limits nothing"),
        ("macs = true\n", r"macs<=True: the limit must be a positive number"),
        ('[limits]\nmacs = "3M"\n', r"'limits' is no measure"),
    ],
)
def test_a_file_that_is_no_budget_is_refused(held: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(held)
    with pytest.raises(AerogelError, match=message):
        parse_budget(str(tmp_path / "b.toml"))


def test_a_broken_limit_names_the_layer_that_costs_most() -> None:
    macs, params = judge(parse_budget("macs<=100,params<=77"), small())
    assert (macs.met, macs.value, macs.layer, macs.op, macs.layer_value) == (False, 128, "2", "linear", 80)
    assert (params.met, params.value, params.layer_value) == (True, 77, 45)
    assert macs.basis == "counted"


def test_access_and_peak_are_those_of_the_folded_view() -> None:
    cost = small()
    access, peak = judge(parse_budget("access<=1B,peak<=1B"), cost)
    assert (access.value, peak.value) == (cost.access_bytes, cost.peak_bytes)
    assert peak.layer == cost.peak_op
    assert access.layer_value == max(layer.access_bytes for layer in cost.layers)


class Grow(nn.Module):
    """Two ops of one module: the peak is reached in the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x + 1] * 3)


def test_a_missed_peak_names_the_op_of_the_module_that_reaches_it() -> None:
    (peak,) = judge(parse_budget("peak<=1B"), count(capture(nn.Sequential(Grow()), (torch.zeros(2, 3),))))
    assert (peak.layer, peak.op) == ("0", "cat")


def test_latency_is_predicted_on_a_device_unless_it_was_measured() -> None:
    cost = small()
    limits = parse_budget("latency<=1us")
    (predicted,) = judge(limits, cost, PI)
    assert (predicted.value, predicted.basis) == (total_ms(cost.layers, PI), "predicted on raspberry_pi_4")
    (measured,) = judge(limits, cost, PI, 0.5, {cost.layers[0].node: 0.4})
    assert (measured.value, measured.basis, measured.met) == (0.5, "measured", False)
    assert (measured.layer, measured.layer_value) == ("0", 0.4)
    with pytest.raises(AerogelError, match=r"--budget latency<=1us: nothing tells the latency; name a device"):
        judge(limits, cost)


def test_what_is_not_counted_never_meets_a_budget() -> None:
    cost = count(capture(Inverse(), (torch.zeros(3, 3),)))
    macs, params, latency = judge(parse_budget("macs<=1G,params<=1M,latency<=1s"), cost, PI)
    assert (macs.met, macs.missing, macs.layer) == (False, ("linalg_inv",), "")
    assert (params.met, params.missing) == (True, ())
    assert (latency.met, latency.missing) == (False, ("linalg_inv",))
    (measured,) = judge(parse_budget("latency<=1s"), cost, measured_ms=1.0)
    assert measured.met


@given(
    measure=st.sampled_from(sorted(MEASURES)),
    share=st.sampled_from([0.5, 0.999, 1.0, 1.001, 2.0]),
)
def test_a_limit_is_met_exactly_when_the_value_is_within_it(measure: str, share: float) -> None:
    cost = COST
    value = judge([Limit(measure, 1.0, "")], cost, PI)[0].value
    assert judge([Limit(measure, value * share, "")], cost, PI)[0].met is (share >= 1)


COST = small()
