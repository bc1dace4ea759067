"""Numbers of a few bits each, one after the other; and the cursor that reads a stream somebody may have tampered with.

Bits are laid from the lowest of each byte up. Widths up to 32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aerogel.errors import AerogelError

Bytes = NDArray[np.uint8]
BLOCK = 1 << 16  # values at a time, so that what is between stays in the cache


def pack(values: NDArray[np.integer], widths: NDArray[np.integer] | int) -> bytes:
    """`values` (n,), each below 2^width, of `widths` (n,) or one for all."""
    ends = _ends(widths, len(values))
    total = int(ends[-1])
    words = np.zeros((total + 31) // 32 + 2, np.uint64)
    for begin in range(0, len(values), BLOCK):
        here = slice(begin, begin + BLOCK)
        starts = ends[:-1][here]
        first = int(starts[0]) >> 5
        word = (starts >> 5) - first
        shifted = values[here].astype(np.uint64) << (starts & 31).astype(np.uint64)
        # No two values share a bit, so adding is joining; below 2^32 a double holds every sum exactly.
        for part in (shifted & np.uint64(2**32 - 1), shifted >> np.uint64(32)):
            sums = np.bincount(word, weights=part.astype(np.float64)).astype(np.uint64)
            words[first : first + len(sums)] |= sums
            word = word + 1
    return words.astype("<u4").tobytes()[: (total + 7) // 8]


def unpack(data: bytes, widths: NDArray[np.integer] | int, count: int) -> NDArray[np.uint64]:
    """The `count` values of `pack`. Raises AerogelError when there are too few or too many bytes."""
    ends = _ends(widths, count)
    total = int(ends[-1])
    if len(data) != (total + 7) // 8:
        raise AerogelError(f"{len(data)} bytes where {(total + 7) // 8} hold the bits")
    words = np.frombuffer(data + bytes(8 + -len(data) % 4), "<u4").astype(np.uint64)
    found = np.empty(count, np.uint64)
    for begin in range(0, count, BLOCK):
        starts, stops = ends[:-1][begin : begin + BLOCK], ends[1:][begin : begin + BLOCK]
        word = starts >> 5
        both = words[word] | words[word + 1] << np.uint64(32)
        mask = (np.uint64(1) << (stops - starts).astype(np.uint64)) - np.uint64(1)
        found[begin : begin + BLOCK] = both >> (starts & 31).astype(np.uint64) & mask
    return found


def _ends(widths: NDArray[np.integer] | int, count: int) -> NDArray[np.int64]:
    """Where each value begins, and at last where all end (count + 1,)."""
    ends = np.zeros(count + 1, np.int64)
    np.cumsum(np.broadcast_to(np.asarray(widths, np.int64), (count,)), out=ends[1:])
    return ends


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def sized(data: bytes) -> bytes:
    """Its length, then itself: what `Cursor.sized` reads."""
    return varint(len(data)) + data


class Cursor:
    """Reads bytes from front to back. Every method raises AerogelError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise AerogelError(f"{count} more bytes are needed, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise AerogelError("a number of more than 63 bits")

    def sized(self) -> bytes:
        return self.take(self.varint())

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def end(self) -> None:
        if self.at != len(self.data):
            raise AerogelError(f"{len(self.data) - self.at} bytes are left over")
