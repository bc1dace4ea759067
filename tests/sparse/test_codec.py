"""The codec: every bit of any tensor comes back; near the entropy; damage and lies are refused."""

from __future__ import annotations

import contextlib
import math
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.sparse import bits, codec, entropy, gaps, rans
from aerogel.sparse.codec import DTYPES, decode, encode, header, iid_bits, layout

SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: NaN as NaN, -0 as -0."""
    view = SIGNED[one.dtype.itemsize]
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.reshape(-1).view(view), other.reshape(-1).view(view))


def random_tensor(shape: tuple[int, ...], density: float, dtype: torch.dtype, shared: int, seed: int) -> Tensor:
    """Any bit patterns at all, NaN and denormals among them; of `shared` different ones where that is not 0."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    words = rng.integers(0, 256, (size, dtype.itemsize), np.uint8)
    if shared and size:
        words = words[rng.integers(0, min(shared, size), size)]
    words[rng.random(size) >= density] = 0
    if dtype == torch.bool:
        words &= 1
    return torch.from_numpy(words.reshape(-1)).view(dtype).reshape(shape)


@given(
    shape=st.lists(st.integers(0, 17), max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    shared=st.sampled_from([0, 1, 2, 16, 256, 257]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None)
def test_every_bit_comes_back(
    shape: tuple[int, ...], density: float, dtype: torch.dtype, shared: int, seed: int
) -> None:
    tensor = random_tensor(shape, density, dtype, shared, seed)
    data = encode(tensor)
    assert same(decode(data), tensor)
    assert header(data) == (dtype, shape)


@given(st.lists(st.floats(width=32, allow_subnormal=True), max_size=40), st.sampled_from(FLOATS))
@settings(max_examples=100, deadline=None)
def test_floats_come_back(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    assert same(decode(encode(tensor)), tensor)


@given(st.lists(st.integers(0, 2**18), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_huge_gaps(steps: list[int]) -> None:
    positions = np.cumsum(np.array(steps) + 1) - 1
    tensor = torch.zeros(int(positions[-1]) + 3)
    tensor[torch.from_numpy(positions)] = torch.arange(1.0, len(steps) + 1)
    assert same(decode(encode(tensor)), tensor)


@pytest.mark.parametrize("gap", [0, 15, 16, 17, 2**20 - 1, 2**20, 2**32, 2**33 + 5, 2**34 - 2])
def test_gaps_of_every_length(gap: int) -> None:
    positions = np.array([gap, gap + 1])
    symbols, plain = gaps.encode(positions)
    assert gaps.decode(symbols, plain, gap + 2).tolist() == positions.tolist()
    with pytest.raises(AerogelError, match=rf"^position {gap + 1} of {gap + 1}$"):
        gaps.decode(symbols, plain, gap + 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [-0.0, 0.0, -0.0],
        [1e-45, -1e-45, 1e-40, 6e-8],
        [math.inf, -math.inf, math.nan, 0.0],
    ],
    ids=["empty", "zero", "negative zero", "denormal", "not finite"],
)
def test_odd_values(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    assert same(decode(encode(tensor)), tensor)


def test_the_payload_of_a_nan_comes_back() -> None:
    tensor = torch.tensor([0x7FC00001, 0x7F800001, -1, 0, -(2**31)], dtype=torch.int32).view(torch.float32)
    assert same(decode(encode(tensor)), tensor)


def test_a_scalar_and_strides() -> None:
    assert same(decode(encode(torch.tensor(3.5))), torch.tensor(3.5))
    turned = torch.arange(12.0).view(3, 4).t()
    assert same(decode(encode(turned)), turned.contiguous())


def test_what_was_decoded_can_be_written_to() -> None:
    tensor = decode(encode(torch.arange(300.0)))
    tensor.add_(1)
    assert tensor[0] == 1


@pytest.mark.parametrize("kind", [torch.complex64, torch.float8_e4m3fn])
def test_a_type_that_is_not_known(kind: torch.dtype) -> None:
    with pytest.raises(AerogelError, match=r"^sparse: a tensor of torch\.\w+ cannot be coded; convert it to float32$"):
        encode(torch.zeros(2, dtype=kind))


# How small ---------------------------------------------------------------------------------------------------------


def pruned(size: int, density: float, shared: int, seed: int = 0) -> Tensor:
    """Normal weights, the small ones zero, the others of `shared` values in equal steps."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=size)
    w[np.abs(w) < np.quantile(np.abs(w), 1 - density)] = 0
    step = np.abs(w).max() / (shared // 2)
    return torch.from_numpy(np.where(w != 0, np.float16(np.ceil(np.abs(w) / step) * step) * np.sign(w), 0)).float()


@pytest.mark.parametrize("density", [0.01, 0.03, 0.08, 0.2, 0.5, 0.9, 1.0])
def test_within_five_per_cent_of_the_entropy(density: float) -> None:
    tensor = pruned(235_200, density, 32)
    assert 8 * len(encode(tensor)) <= 1.05 * iid_bits(tensor)


def test_what_the_entropy_is() -> None:
    tensor = torch.tensor([0.0, 0.0, 1.0, 2.0])  # the mask has 4 bits, its values 2
    assert iid_bits(tensor) == pytest.approx(6)
    assert iid_bits(torch.zeros(9)) == iid_bits(torch.zeros(0)) == 0


def test_the_layout_follows_the_density() -> None:
    assert [layout(encode(pruned(235_200, d, 32))) for d in (0.01, 0.3, 1.0)] == ["gaps", "mask", "dense"]


def test_nothing_but_zeros_takes_no_bytes() -> None:
    assert len(encode(torch.zeros(1000, 1000))) < 10


def test_what_cannot_be_made_smaller_grows_by_little() -> None:
    tensor = random_tensor((100_000,), 1.0, torch.float32, 0, 0)
    assert len(encode(tensor)) < 400_000 * 1.001


def test_a_float32_that_float16_holds_costs_two_bytes_in_the_codebook() -> None:
    exact, not_exact = torch.arange(1.0, 257.0) / 256, torch.arange(1.0, 257.0) / 255
    assert len(encode(not_exact.repeat(20))) - len(encode(exact.repeat(20))) >= 512


# What is wrong is refused ------------------------------------------------------------------------------------------


def samples() -> list[bytes]:
    made = [pruned(3000, d, 16) for d in (0.02, 0.3, 1.0)]
    made += [random_tensor((500,), d, torch.float32, 0, 1) for d in (0.1, 1.0)]
    return [encode(tensor) for tensor in made]


@pytest.mark.parametrize("number", range(5))
def test_damage_never_crashes(number: int) -> None:
    """Whatever byte is another or missing: an AerogelError, or a tensor of the shape that the header tells."""
    good = samples()[number]
    rng = np.random.default_rng(number)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        refused += survives(bytes(bad))
    assert number == 4 or refused > 30  # the last holds plain bytes: any are as good
    assert all(survives(good[:cut]) for cut in range(0, len(good), 7))
    assert survives(good + b"\0")


def survives(data: bytes) -> bool:
    """Whether it was refused. The file's checksum finds what is not."""
    try:
        shape = header(data).shape
        if math.prod(shape) > 10**6:
            return True
        assert decode(data).shape == shape
    except AerogelError:
        return True
    return False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "2 more bytes are needed, 0 are left"),
        (b"\xff\x00", "a type 255 that is not known"),
        (b"\x00\x01" + b"\xff" * 9 + b"\x01", "a number of more than 63 bits"),
        (b"\x00\x02" + bits.varint(2**33) + bits.varint(2), r"more than 2\^34 elements"),
        (b"\x00\x03" + bits.varint(0) + bits.varint(2**40) + bits.varint(2), r"more than 2\^34 elements"),
        (b"\x00\x01\x04\x09", "a layout 9 that is not known"),
        (b"\x00\x01\x04\x00\x05", "5 values in a tensor of 4"),
        (b"\x00\x01\x04\x00\x00\x00", "1 bytes are left over"),
        (b"\x00\x01\x04\x01\x02\x00\x80", "2 more bytes are needed|1 more bytes are needed|a mask of 1 values where 2"),
        (b"\x00\x01\x04\x02\x04", "values of a kind 4 that is not known"),
        (b"\x01\x01\x04\x02\x02", "values of a kind 2 that is not known"),
        (b"\x00\x01\x04\x02\x01\x00" + b"\0" * 4 + b"\x00\x01", "index 1 into a codebook of 1"),
        (b"\x00\x01\x04\x02\x00\x09", "a code 9 that is not known|more bytes are needed"),
        (b"\x09\x01\x04\x02\x00\x00\x04", "a bool of 2"),
        (b"\x00\x01\x00\x02\x01\x00" + b"\0" * 4 + b"\x00\x00", "values in a tensor of none"),
        (b"\x00\x01\x20\x00\x02\x00\x10\x00", "position 33 of 32"),
    ],
)
def test_lies_are_named(data: bytes, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        decode(data)


def test_a_stream_that_promises_more_than_it_holds() -> None:
    symbols = np.repeat(np.arange(40, dtype=np.uint8), 50)
    packed = entropy.pack(symbols)
    assert entropy.unpack(bits.Cursor(packed), len(symbols)).tolist() == symbols.tolist()
    for count in (1, len(symbols) - 1, len(symbols) + 1, 10 * len(symbols)):
        with pytest.raises(AerogelError):
            entropy.unpack(bits.Cursor(packed), count)


MIB = 1 << 20
FRAME = zstandard.ZstdCompressor().compress(bytes(16 * MIB))  # 500 bytes that say how much they hold


def peak_of(data: bytes, message: str | None = None) -> int:
    """The most bytes that decoding took at once."""
    tracemalloc.start()
    try:
        with pytest.raises(AerogelError, match=message) if message else contextlib.nullcontext():
            decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08\x01\x0a\x02\x00\x02" + bits.sized(FRAME), "16777216 symbols where 10 were written"),
        (b"\x08\x01\x0a\x02\x00\x03" + bits.sized(b"\xd0\xff" + bits.sized(bytes(MIB))), "a table of 1048576 bytes"),
        (b"\x08\x01" + bits.varint(MIB) + b"\x00" + bits.varint(MIB) + b"\x00\x10\x00", "position 17825791 of 1048576"),
    ],
    ids=["zstandard", "table", "gaps"],
)
def test_a_stream_that_swells_is_refused_before_it_does(data: bytes, message: str) -> None:
    assert peak_of(data, message) < 4 * MIB


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
def test_decoding_needs_no_more_than_the_header_says(kind: torch.dtype, density: float) -> None:
    data = encode(random_tensor((MIB // 4,), density, kind, 0, 1))
    head = header(data)
    assert peak_of(data) < head.dense_bytes + head.working_bytes


# The parts ---------------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.integers(0, 2**40), min_size=1, max_size=200).filter(any),
    depth=st.integers(8, rans.DEEPEST),
)
@settings(max_examples=150, deadline=None)
def test_frequencies_sum_to_a_power_of_two(weights: list[int], depth: int) -> None:
    found = rans.normalise(weights, depth)
    assert found.sum() == 1 << depth
    assert ((found > 0) == (np.array(weights) > 0)).all()


@pytest.mark.parametrize("count", [1, 2, 1000, rans.ALONE - 1, rans.ALONE, rans.ALONE + 1, 200_001])
def test_rans_is_its_own_inverse_and_near_the_entropy(count: int) -> None:
    symbols = np.minimum(np.random.default_rng(count).geometric(0.3, count) - 1, 40).astype(np.uint8)
    counts = np.bincount(symbols)
    frequencies = rans.normalise(counts.tolist(), 14)
    data = rans.encode(symbols, frequencies, 14)
    assert (rans.decode(data, count, frequencies, 14) == symbols).all()
    assert len(data) <= 1.002 * entropy.entropy_bits(counts) / 8 + 3 * rans.lanes(count) + 4
    if count > 1:
        with pytest.raises(AerogelError, match="entropy code"):
            rans.decode(data[:-2], count, frequencies, 14)


@given(st.lists(st.integers(0, 32), max_size=300), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_numbers_of_a_few_bits(widths: list[int], seed: int) -> None:
    wide = np.array(widths, np.int64)
    values = np.random.default_rng(seed).integers(0, 2**32, len(wide)) & ((1 << wide) - 1)
    packed = bits.pack(values, wide)
    assert len(packed) == (sum(widths) + 7) // 8
    assert (bits.unpack(packed, wide, len(wide)) == values).all()


def test_a_geometric_model_is_the_masks_entropy() -> None:
    """d (1 - d)^gap: what the gaps cost is what the mask costs."""
    size, density = 400_000, 0.02
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    symbols, plain = gaps.encode(positions)
    model = np.array(gaps.geometric(size, len(positions), int(symbols.max())), float)
    cost = -np.log2((model / model.sum())[symbols]).sum() + 8 * len(plain)
    bound = entropy.entropy_bits(np.array([len(positions), size - len(positions)]))
    assert cost == pytest.approx(bound, rel=0.01)


def test_block_boundaries() -> None:
    """More values than are packed, or looked at, together."""
    tensor = torch.arange(codec.BLOCK + 5, dtype=torch.int32) % 7
    assert same(decode(encode(tensor)), tensor)
    values = np.arange(bits.BLOCK * 2 + 3) % 32
    assert (bits.unpack(bits.pack(values, 5), 5, len(values)) == values).all()
