"""Device profiles: what is shipped, what is written comes back, and a roofline by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from aerogel.cost import count
from aerogel.cost.device import FALLBACK, Device, device, profiles, read, this_path, write
from aerogel.cost.roofline import kernel, roofline, total_ms
from aerogel.errors import AerogelError
from aerogel.graph import capture

USUAL = {"conv": 1.0, "depthwise": 1.0, "elementwise": 1.0}
FAMILIES = {"conv", "pointwise", "depthwise", "elementwise", *FALLBACK}


def made(**changes: object) -> Device:
    held = {
        "name": "it", "title": "it", "kind": "datasheet", "source": "a test", "simd": 8, "overhead_us": 2.0,
        "cache_bytes": 1000, "cache_gb_s": 10.0, "memory_gb_s": 1.0,
        "gmacs": {"conv": 2.0, "depthwise": 0.5, "elementwise": 1.0},
    }  # fmt: skip
    return Device(**(held | changes))


@pytest.mark.parametrize("name", profiles())
def test_a_shipped_profile_knows_every_family_and_says_where_it_is_from(name: str) -> None:
    held = device(name)
    assert held.name == name
    assert held.source
    assert held.memory_gb_s <= held.cache_gb_s
    assert all(held.speed(family) > 0 for family in FAMILIES)


def test_there_is_a_profile_for_every_kind_of_machine() -> None:
    assert set(profiles()) == {"laptop", "microcontroller", "phone", "raspberry_pi_4", "server_cpu"}
    assert device("server_cpu").kind == "measured"


def test_a_written_profile_comes_back(tmp_path: Path) -> None:
    write(made(), tmp_path / "new" / "it.toml")
    assert read(tmp_path / "new" / "it.toml") == made() == device(str(tmp_path / "new" / "it.toml"))


def test_a_machine_that_was_not_measured_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(AerogelError, match=r"has not been measured; run `aerogel cost --calibrate`"):
        device("this")
    write(made(name="this"), this_path())
    assert device("this").source == "a test"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 3", r"it\.toml: name"),
        ("not toml", r"^device: .*it\.toml is not TOML: .*; give a profile in TOML$"),
        ("speed = 3", r"it\.toml: \w+"),
    ],
)
def test_a_file_that_is_no_profile_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "it.toml").write_text(text)
    with pytest.raises(AerogelError, match=message):
        device(str(tmp_path / "it.toml"))


@pytest.mark.parametrize(
    ("gmacs", "message"),
    [
        ({"conv": 1.0, "depthwise": 1.0}, "gmacs.elementwise is missing"),
        ({"conv": 0.0, "depthwise": 1.0, "elementwise": 1.0}, "gmacs.conv must be above 0"),
        (USUAL | {"depthwize": 2.0}, r"gmacs\.depthwize: no family of kernels has that name; did you mean depthwise"),
    ],
)
def test_speeds_are_checked(gmacs: dict[str, float], message: str, tmp_path: Path) -> None:
    write(made(gmacs=gmacs), tmp_path / "it.toml")
    with pytest.raises(AerogelError, match=message):
        read(tmp_path / "it.toml")


@pytest.mark.parametrize("entry", ["memory_gb_s", "cache_gb_s", "overhead_us", "gmacs.conv", "kernel_us"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_profile_holds_finite_numbers(entry: str, value: str, tmp_path: Path) -> None:
    changes = {"gmacs": USUAL | {"conv": float(value)}} if entry == "gmacs.conv" else {entry: float(value)}
    write(made().model_copy(update=changes), tmp_path / "it.toml")
    with pytest.raises(AerogelError, match=rf"it\.toml: {entry}: .*finite number.*; see the profiles"):
        read(tmp_path / "it.toml")


def test_every_family_that_another_stands_in_for_may_have_a_speed(tmp_path: Path) -> None:
    write(made(gmacs=dict.fromkeys(FAMILIES, 1.0)), tmp_path / "it.toml")
    assert read(tmp_path / "it.toml").gmacs.keys() == FAMILIES


def test_an_unknown_name_has_its_neighbour_named() -> None:
    with pytest.raises(AerogelError, match=r"no profile is called 'phones'.*phone"):
        device("phones")


def test_a_family_without_a_number_takes_the_next_one_s() -> None:
    held = made()
    assert held.speed("grouped") == held.speed("recurrent") == held.speed("matmul") == 2e9
    assert held.speed("pool") == 1e9


@pytest.mark.parametrize(
    ("family", "operations", "size", "ms", "bound"),
    [
        ("conv", 2_000_000, 1000, 1.0 + 0.002, "compute"),  # 2e6 / 2e9 s
        ("depthwise", 500_000, 1000, 1.0 + 0.002, "compute"),
        ("conv", 2000, 1_000_000, 1.0 + 0.002, "memory"),  # 1e6 bytes at 1e9 a second: not in the cache
        ("conv", 2, 1000, 0.0001 + 0.002, "overhead"),  # 1000 bytes at 1e10 a second: in the cache
    ],
)
def test_roofline_by_hand(family: str, operations: int, size: int, ms: float, bound: str) -> None:
    found = kernel(family, operations, size, made())
    assert found.ms == pytest.approx(ms)
    assert found.bound == bound


def test_what_is_fused_or_a_view_takes_no_time_and_the_rest_adds_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    cost = count(capture(net, (torch.zeros(1, 3, 8, 8),)))
    found = [roofline(layer, made()) for layer in cost.layers]
    assert [timing.bound != "none" for timing in found] == [True, False, False, False, True]
    assert total_ms(cost.layers, made()) == pytest.approx(found[0].ms + found[-1].ms)


def test_the_old_rule_can_be_read_off() -> None:
    """FLOPs decide where memory is fast, access decides where it is slow (the notes' rule)."""
    net = nn.Conv2d(64, 64, 1)
    cost = count(capture(net, (torch.zeros(1, 64, 56, 56),)))
    fast, slow = made(memory_gb_s=1000.0, cache_gb_s=1000.0), made(memory_gb_s=0.001)
    assert roofline(cost.layers[0], fast).bound == "compute"
    assert roofline(cost.layers[0], slow).bound == "memory"
