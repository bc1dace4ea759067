"""A stream of symbols in as few bytes as one of several codes needs: constant, fixed width, zstandard, rANS.

rANS has a table of frequencies, or a model that both sides know: a list of whole weights, one a symbol. zstandard is
taken where it is at most one part in 128 longer, because it is decoded ten times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import zstandard

from aerogel.errors import AerogelError
from aerogel.sparse import bits, rans
from aerogel.sparse.bits import Cursor, sized
from aerogel.sparse.rans import Frequencies, Symbols

CONSTANT, FIXED, ZSTD, TABLE, MODEL = range(5)
LEVEL, LEVEL_LONG, LONG = 12, 3, 1 << 18  # zstandard's; in a long stream there is little to find but frequencies
TOLERATED = 128
MODEL_DEPTH = 14
MOST_CODE = 8  # bytes of one frequency in a table; exponential Golomb codes need at most 29 bits
Model = Callable[[int], list[int]]  # the largest symbol -> weights of 0 .. that symbol


def pack(symbols: Symbols, model: Model | None = None) -> bytes:
    """`symbols` (n,), n >= 1. The number of them is not written."""
    top = int(symbols.max())
    if top == int(symbols.min()):
        return bytes([CONSTANT, top])
    counts = np.bincount(symbols, minlength=top + 1)
    width = top.bit_length()
    codes: dict[int, tuple[float, Callable[[], bytes]]] = {}  # bytes (rANS: very nearly), and how to make them
    packed = _zstd(symbols) if len(symbols) > 32 else bytes(len(symbols) + 32)
    codes[ZSTD] = (len(packed) * (1 - 1 / TOLERATED), lambda: packed)
    codes[FIXED] = ((len(symbols) * width + 7) // 8 + 1, lambda: bytes([width]) + bits.pack(symbols, width))
    table, frequencies, depth = _best_table(counts)
    start = 2.5 * rans.lanes(len(symbols))
    codes[TABLE] = (
        len(table) + start + _cost(counts, frequencies, depth) / 8,
        lambda: table + rans.encode(symbols, frequencies, depth),
    )
    if model is not None:
        known = rans.normalise(model(top), MODEL_DEPTH)
        if (known[counts > 0] > 0).all():
            codes[MODEL] = (
                1 + start + _cost(counts, known, MODEL_DEPTH) / 8,
                lambda: bytes([top]) + rans.encode(symbols, known, MODEL_DEPTH),
            )
    best = min(codes, key=lambda code: codes[code][0])
    return bytes([best]) + sized(codes[best][1]())


def unpack(cursor: Cursor, count: int, model: Model | None = None) -> Symbols:
    """The `count` symbols of `pack`, count >= 1. Raises AerogelError for anything else than `pack` writes."""
    code = cursor.byte()
    if code == CONSTANT:
        return np.full(count, cursor.byte(), np.uint8)
    inner = Cursor(cursor.sized())
    if code == FIXED:
        width = inner.byte()
        if width > 8:
            raise AerogelError(f"symbols of {width} bits")
        found = bits.unpack(inner.rest(), width, count).astype(np.uint8)
    elif code == ZSTD:
        found = _unzstd(inner.rest(), count)
    elif code == TABLE:
        frequencies, depth = _read_table(inner)
        found = rans.decode(inner.rest(), count, frequencies, depth)
    elif code == MODEL and model is not None:
        frequencies = rans.normalise(model(inner.byte()), MODEL_DEPTH)
        found = rans.decode(inner.rest(), count, frequencies, MODEL_DEPTH)
    else:
        raise AerogelError(f"a code {code} that is not known")
    return found


def entropy_bits(counts: np.ndarray) -> float:
    """n times the entropy in bits of symbols with these counts: what no code with fixed frequencies can beat."""
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())


def _cost(counts: np.ndarray, frequencies: Frequencies, depth: int) -> float:
    """Bits of rANS: the cross-entropy."""
    seen = counts > 0
    return float((counts[seen] * (depth - np.log2(frequencies[seen]))).sum())


def _zstd(symbols: Symbols) -> bytes:
    level = LEVEL if len(symbols) < LONG else LEVEL_LONG
    return _compressor(level).compress(symbols.tobytes())


@cache
def _compressor(level: int) -> zstandard.ZstdCompressor:
    """Without checksum and length: both are known."""
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=False)


def _unzstd(data: bytes, count: int) -> Symbols:
    try:
        told = zstandard.get_frame_parameters(data).content_size
        if told not in (count, zstandard.CONTENTSIZE_UNKNOWN):  # it would be allotted, whatever max_output_size says
            raise AerogelError(f"{told} symbols where {count} were written")
        found = zstandard.ZstdDecompressor().decompress(data, max_output_size=count)
    except (zstandard.ZstdError, MemoryError) as error:
        raise AerogelError(f"zstandard cannot read it ({error})") from error
    if len(found) != count:
        raise AerogelError(f"{len(found)} symbols where {count} were written")
    return np.frombuffer(found, np.uint8)


def _best_table(counts: np.ndarray) -> tuple[bytes, Frequencies, int]:
    """The table that makes table and data together shortest: fine frequencies cost more to write."""
    least = max(int((counts > 0).sum() - 1).bit_length(), 5)
    found = {depth: rans.normalise(counts.tolist(), depth) for depth in range(least, rans.DEEPEST + 1)}
    costs = {depth: _golomb_bits(f)[0] + _cost(counts, f, depth) for depth, f in found.items()}
    depth = min(costs, key=costs.__getitem__)
    return _write_table(found[depth], depth), found[depth], depth


def _write_table(frequencies: Frequencies, depth: int) -> bytes:
    """Depth and order in a byte, the largest symbol, then the frequencies as exponential Golomb codes."""
    _, order = _golomb_bits(frequencies)
    text = "".join(_golomb(f, order) for f in frequencies.tolist())
    body = int(text[::-1], 2).to_bytes((len(text) + 7) // 8, "little")
    return bytes([depth << 4 | order, len(frequencies) - 1]) + sized(body)


def _read_table(cursor: Cursor) -> tuple[Frequencies, int]:
    head, top = cursor.take(2)
    depth, order, body = head >> 4, head & 15, cursor.sized()
    if len(body) > MOST_CODE * (top + 1):
        raise AerogelError(f"a table of {len(body)} bytes for {top + 1} frequencies")
    text = f"{int.from_bytes(body, 'little'):0{8 * len(body)}b}"[::-1]
    found, at = [], 0
    for _ in range(top + 1):
        end = text.find("1", at)
        number = text[end : end + end - at + order + 1]
        if end < 0 or len(number) <= order or end - at > depth:
            raise AerogelError("a table of frequencies that ends too early")
        found.append(int(number, 2) - (1 << order))
        at = end + len(number)
    if depth > rans.DEEPEST or sum(found) != 1 << depth:
        raise AerogelError(f"frequencies that sum to {sum(found)}, not to {1 << depth}")
    return np.array(found, np.int64), depth


def _golomb_bits(numbers: Frequencies) -> tuple[int, int]:
    """The fewest bits of all of them, and the order that has them."""
    lengths = [2 * np.frexp((numbers + (1 << order)).astype(float))[1] - 1 - order for order in range(rans.DEEPEST)]
    sums = [int(length.sum()) for length in lengths]
    return min(sums), sums.index(min(sums))


def _golomb(number: int, order: int) -> str:
    digits = f"{number + (1 << order):b}"
    return "0" * (len(digits) - 1 - order) + digits
