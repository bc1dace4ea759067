"""A tensor with many zeros, or with few different values, in few bytes. Every bit of it comes back.

Han, Mao, Dally 2016, "Deep Compression", arXiv:1510.00149: what is not zero is kept as gaps (`gaps.py`) and, where at
most 256 values are shared, as indices into a codebook (`codebook.py` makes it so); both are entropy-coded
(`entropy.py`). Differs: rANS or zstandard for Huffman; gaps without filler zeros; and for each tensor the smallest of
- GAPS: gaps and values, where few weights are left;
- MASK: one bit a weight and values;
- DENSE: all values, zeros among them;
or the one that is faster to decode, where it is at most one part in 128 longer.
Only +0 counts as zero: -0.0, denormals and NaN with their payload are values like any other.

Values are a codebook and indices, or else planes of bytes: rotated by one bit, so that the exponent, which says much
of itself, has a byte of its own, and each plane coded alone.
A coded tensor: type and number of dimensions (a byte each), shape, layout, number of values, positions, values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.sparse import entropy, gaps
from aerogel.sparse.bits import Cursor, sized, varint

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
GAPS, MASK, DENSE = range(3)
PLANES, CODEBOOK, HALF, BRAIN = range(4)  # a codebook as it is, or of float32 that float16 or bfloat16 hold exactly
NARROWED = {HALF: torch.float16, BRAIN: torch.bfloat16}
WORKING = 32  # bytes an element that decoding needs for a while, at most
DIMENSIONS = 64  # as many as numpy has
SHARED = 256  # values of a codebook
FEW = 1 << 16  # elements of a tensor for which every layout is tried
BLOCK = 1 << 18  # values looked at together
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Bits = NDArray[np.unsignedinteger]


class Header(NamedTuple):
    """What a coded tensor says of itself before anything is allotted."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        return self.numel * WORKING


def encode(tensor: Tensor) -> bytes:
    """The tensor, of any shape. Raises AerogelError for a type that is not in `DTYPES`, or 2^34 elements."""
    if tensor.dtype not in DTYPES:
        raise AerogelError(f"sparse: a tensor of {tensor.dtype} cannot be coded; convert it to float32")
    if tensor.numel() >= gaps.LARGEST:
        raise AerogelError(f"sparse: a tensor of {tensor.numel():,} elements cannot be coded; the most are 2^34 - 1")
    head = bytes([DTYPES.index(tensor.dtype), tensor.ndim]) + b"".join(map(varint, tensor.shape))
    flat = _as_bits(tensor)
    positions = np.flatnonzero(flat)
    values = flat[positions]
    if not len(values):
        return head + bytes([GAPS]) + varint(0)
    coded = _encode_values(values, tensor.dtype)
    count = varint(len(values))
    found = []  # the faster to decode come first
    if 2 * len(values) > len(flat):
        found.append(bytes([DENSE]) + (coded if len(values) == len(flat) else _encode_values(flat, tensor.dtype)))
    if 16 * len(values) > len(flat):  # with fewer, the bytes of a mask are more than the gaps
        found.append(bytes([MASK]) + count + _encode_mask(flat, len(values)) + coded)
    if 2 * len(values) <= len(flat) or len(flat) <= FEW:
        found.append(bytes([GAPS]) + count + _encode_gaps(positions, len(flat)) + coded)
    least = min(map(len, found))
    return head + next(data for data in found if len(data) <= least * (1 + 1 / entropy.TOLERATED))


def decode(data: bytes) -> Tensor:
    """The tensor of `encode`. Raises AerogelError for anything else.

    Allots what the header says, and up to WORKING bytes more for each element.
    """
    cursor = Cursor(data)
    head = _header(cursor)
    flat = np.zeros(head.numel, _UNSIGNED[head.dtype.itemsize])
    layout = cursor.byte()
    if layout == DENSE and not len(flat):
        raise AerogelError("values in a tensor of none")
    if layout == DENSE:
        flat = _decode_values(cursor, len(flat), head.dtype)
    elif layout in (GAPS, MASK):
        count = cursor.varint()
        if count > len(flat):
            raise AerogelError(f"{count} values in a tensor of {len(flat)}")
        if count:
            where = (_decode_gaps if layout == GAPS else _decode_mask)(cursor, len(flat), count)
            flat[where] = _decode_values(cursor, count, head.dtype)
    else:
        raise AerogelError(f"a layout {layout} that is not known")
    cursor.end()
    return _from_bits(flat, head.dtype).reshape(head.shape)


def header(data: bytes) -> Header:
    """Type and shape of a coded tensor. Raises AerogelError where it begins with something else."""
    return _header(Cursor(data))


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: -0 is not 0, and a NaN is itself."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and bool((_as_bits(one) == _as_bits(other)).all())


def layout(data: bytes) -> str:
    """ "gaps", "mask" or "dense": which was the smallest."""
    cursor = Cursor(data)
    _header(cursor)
    return ("gaps", "mask", "dense")[cursor.byte()]


def iid_bits(tensor: Tensor) -> float:
    """n times the entropy of the mask, plus that of the values kept: what no code beats that knows only how often
    each value is there, codebook and tables not counted."""
    flat = _as_bits(tensor)
    values = flat[np.flatnonzero(flat)]
    if not len(flat):
        return 0.0
    mask = entropy.entropy_bits(np.array([len(values), len(flat) - len(values)]))
    return mask + entropy.entropy_bits(np.unique(values, return_counts=True)[1])


def _header(cursor: Cursor) -> Header:
    kind, ndim = cursor.take(2)
    if kind >= len(DTYPES) or ndim > DIMENSIONS:
        raise AerogelError(f"a type {kind} that is not known" if ndim <= DIMENSIONS else f"{ndim} dimensions")
    shape = tuple(cursor.varint() for _ in range(ndim))
    if math.prod(size for size in shape if size) >= gaps.LARGEST:
        raise AerogelError(f"a shape {shape} of more than 2^34 elements")
    return Header(DTYPES[kind], shape)


def _encode_gaps(positions: NDArray[np.int64], size: int) -> bytes:
    symbols, plain = gaps.encode(positions)
    return entropy.pack(symbols, lambda top: gaps.geometric(size, len(positions), top)) + sized(plain)


def _decode_gaps(cursor: Cursor, size: int, count: int) -> NDArray[np.int64]:
    symbols = entropy.unpack(cursor, count, lambda top: gaps.geometric(size, count, top))
    return gaps.decode(symbols, cursor.sized(), size)


def _encode_mask(flat: Bits, count: int) -> bytes:
    return entropy.pack(np.packbits(flat != 0), lambda top: _binomial(len(flat), count, top))


def _decode_mask(cursor: Cursor, size: int, count: int) -> NDArray[np.bool_]:
    packed = entropy.unpack(cursor, (size + 7) // 8, lambda top: _binomial(size, count, top))
    mask = np.unpackbits(packed, count=size).view(np.bool_)
    if np.count_nonzero(mask) != count:
        raise AerogelError(f"a mask of {np.count_nonzero(mask)} values where {count} were written")
    return mask


def _binomial(size: int, count: int, top: int) -> list[int]:
    """Weights of the bytes 0 .. top whose bits are 1 with probability count / size, each by itself."""
    here = [count**ones * (size - count) ** (8 - ones) for ones in range(9)]
    return [here[byte.bit_count()] for byte in range(top + 1)]


def _encode_values(values: Bits, dtype: torch.dtype) -> bytes:
    """The shorter of a codebook with indices and planes of bytes."""
    planes = bytes([PLANES]) + b"".join(entropy.pack(plane) for plane in _planes(values))
    shared = _shared(values)
    if shared is None:
        return planes
    kind = next((k for k, narrow in NARROWED.items() if _fits(shared, dtype, narrow)), CODEBOOK)
    book = _from_bits(shared, dtype).to(NARROWED[kind]) if kind != CODEBOOK else _from_bits(shared, dtype)
    index = np.empty(len(values), np.uint8)
    for begin in range(0, len(values), BLOCK):
        index[begin : begin + BLOCK] = np.searchsorted(shared, values[begin : begin + BLOCK])
    coded = bytes([kind, len(shared) - 1]) + _as_bits(book).tobytes() + entropy.pack(index)
    return min(coded, planes, key=len)


def _decode_values(cursor: Cursor, count: int, dtype: torch.dtype) -> Bits:
    kind = cursor.byte()
    unsigned = np.dtype(_UNSIGNED[dtype.itemsize])
    if kind == PLANES:
        return _joined([entropy.unpack(cursor, count) for _ in range(unsigned.itemsize)], unsigned)
    if kind not in (CODEBOOK, HALF, BRAIN) or (kind != CODEBOOK and dtype != torch.float32):
        raise AerogelError(f"values of a kind {kind} that is not known")
    size = cursor.byte() + 1
    held = NARROWED.get(kind, dtype)
    book = np.frombuffer(cursor.take(size * held.itemsize), _UNSIGNED[held.itemsize])
    shared = _as_bits(_from_bits(book, held).to(dtype))
    index = entropy.unpack(cursor, count)
    if index.max() >= size:
        raise AerogelError(f"index {index.max()} into a codebook of {size}")
    return shared[index]


def _shared(values: Bits) -> Bits | None:
    """The different values, rising; None when there are too many for a codebook."""
    found = values[:0]
    for begin in range(0, len(values), BLOCK):
        found = np.union1d(found, values[begin : begin + BLOCK])
        if len(found) > SHARED:
            return None
    return found


def _fits(shared: Bits, dtype: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether float32 values go there and back without the loss of a bit."""
    if dtype != torch.float32:
        return False
    return bool((_as_bits(_from_bits(shared, dtype).to(narrow).to(dtype)) == shared).all())


def _planes(values: Bits) -> list[NDArray[np.uint8]]:
    """Bytes from the highest down, after the sign went from the highest bit to the lowest."""
    width = 8 * values.itemsize
    turned = values << 1 | values >> (width - 1)
    return [(turned >> shift).astype(np.uint8) for shift in range(width - 8, -1, -8)]


def _joined(planes: list[NDArray[np.uint8]], unsigned: np.dtype) -> Bits:
    turned = np.empty((len(planes[0]), len(planes)), np.uint8)
    for place, plane in enumerate(reversed(planes)):
        turned[:, place] = plane
    values: Bits = turned.reshape(-1).view(unsigned.newbyteorder("<")).astype(unsigned, copy=False)
    low = values << 8 * unsigned.itemsize - 1
    values >>= 1
    values |= low
    return values


def _as_bits(tensor: Tensor) -> Bits:
    """Its elements in a row, as unsigned integers of the same bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    found: Bits = flat.view(signed).numpy().view(_UNSIGNED[flat.dtype.itemsize])
    return found


def _from_bits(flat: Bits, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool and flat.size and flat.max() > 1:
        raise AerogelError(f"a bool of {flat.max()}")
    signed = flat.view(f"i{flat.itemsize}") if flat.itemsize > 1 else flat
    return torch.from_numpy(signed if signed.flags.writeable else signed.copy()).view(dtype)
