"""Entropy coding with fixed frequencies: range asymmetric numeral systems, several of them interleaved.

Duda 2013, "Asymmetric numeral systems", arXiv:1311.2540, section 3 (rANS); interleaved as in Giesen 2014,
"Interleaved entropy coders", arXiv:1402.3392.

A state x in [2^16, 2^32) holds all symbols coded so far. With frequency f of symbol s out of M = 2^k, and c the sum of
the frequencies below s:
    encode: x <- (x // f) M + c + x mod f        decode: s = symbol whose slot x mod M is; x <- f (x // M) + x mod M - c
A state that would leave its range gives 16 bits to the stream, or takes 16 from it. Symbols are decoded in the order in
which they were given, so the encoder runs from the last to the first. An average symbol costs its cross-entropy with
f / M, up to 1e-4 bits; a lane costs about 2 bytes more.

Symbol i belongs to lane i mod L; the lanes run side by side as one numpy operation. One lane is a plain loop, and the
faster way for fewer than about 60,000 symbols.
Data: L final states (u32), then the words (u16) in the order in which the decoder reads them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aerogel.errors import AerogelError

LOW = 1 << 16  # the smallest state; where every lane begins
DEEPEST = 14  # the largest k
ALONE, A_LANE, MOST_LANES = 1 << 16, 1 << 10, 1 << 12

Symbols = NDArray[np.uint8]
Frequencies = NDArray[np.int64]


def lanes(count: int) -> int:
    """How many lanes code so many symbols: their cost stays below about half a per cent."""
    return 1 if count < ALONE else min(MOST_LANES, 1 << (count // A_LANE).bit_length() - 1)


def normalise(weights: list[int], depth: int) -> Frequencies:
    """Frequencies that sum to 2^depth, near to proportional to `weights`; none is 0 whose weight is not.

    In whole numbers alone, because every machine must find the same. At most 2^depth weights may be above 0.
    Raises AerogelError when none is.
    """
    total, slots = sum(weights), 1 << depth
    if not total:
        raise AerogelError("frequencies that are all 0")
    found = [max(1, weight * slots // total) if weight else 0 for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    left = slots - sum(found)
    while left:
        for i in order:
            step = max(-(found[i] - 1), min(left, -(-left // 8) if left > 0 else left // 8)) if found[i] else 0
            found[i] += step
            left -= step
            if not left:
                break
    return np.array(found, np.int64)


def encode(symbols: Symbols, frequencies: Frequencies, depth: int) -> bytes:
    """Every symbol must have a frequency above 0; they sum to 2^depth."""
    below = np.cumsum(frequencies) - frequencies
    count, width = len(symbols), lanes(len(symbols))
    if width == 1:
        return _encode_alone(symbols, frequencies.tolist(), below.tolist(), depth)
    states = np.full(width, LOW, np.int64)
    limit = frequencies << 32 - depth
    words: list[NDArray[np.uint16]] = []
    for start in range((count - 1) // width * width, -1, -width):
        now = symbols[start : start + width]
        x, f = states[: len(now)], frequencies[now]
        full = x >= limit[now]
        words.append(x[full].astype("<u2"))
        x[full] >>= 16
        whole = x // f
        x += whole * ((1 << depth) - f) + below[now]
    return states.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes()


def decode(data: bytes, count: int, frequencies: Frequencies, depth: int) -> Symbols:
    """The `count` symbols. Raises AerogelError when the data are not what `encode` writes for so many."""
    width, slots = lanes(count), 1 << depth
    if len(data) < 4 * width or len(data) % 2:
        raise AerogelError(f"{len(data)} bytes of entropy code, at least {4 * width} in pairs were written")
    states = np.frombuffer(data, "<u4", width).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * width).astype(np.int64)
    owner = np.repeat(np.arange(len(frequencies), dtype=np.uint8), frequencies)
    share = frequencies[owner]
    rest = np.arange(slots) - (np.cumsum(frequencies) - frequencies)[owner]
    if width == 1:
        return _decode_alone(int(states[0]), words.tolist(), count, owner, share.tolist(), rest.tolist(), depth)
    found = np.empty(count, np.uint8)
    slot, taken = np.empty_like(states), np.empty_like(states)
    at = 0
    for start in range(0, count, width):
        now = min(width, count - start)
        x, s, t = states[:now], slot[:now], taken[:now]
        np.bitwise_and(x, slots - 1, out=s)
        owner.take(s, out=found[start : start + now], mode="clip")
        x >>= depth
        x *= share.take(s, out=t, mode="clip")
        x += rest.take(s, out=t, mode="clip")
        empty = np.flatnonzero(x < LOW)
        more = words[at : at + len(empty)]
        at += len(empty)
        if len(more) < len(empty):
            raise AerogelError("the entropy code ends too early")
        x[empty] = x[empty] << 16 | more
    if at != len(words) or (states != LOW).any():
        raise AerogelError("the entropy code does not end where it should")
    return found


def _encode_alone(symbols: Symbols, frequencies: list[int], below: list[int], depth: int) -> bytes:
    x, words = LOW, []
    for symbol in reversed(symbols.tolist()):
        f = frequencies[symbol]
        if x >= f << 32 - depth:
            words.append(x & 0xFFFF)
            x >>= 16
        x = (x // f << depth) + below[symbol] + x % f
    return x.to_bytes(4, "little") + np.array(words[::-1], "<u2").tobytes()


def _decode_alone(
    x: int, words: list[int], count: int, owner: Symbols, share: list[int], rest: list[int], depth: int
) -> Symbols:
    mask, read, slots = (1 << depth) - 1, iter(words), [0] * count
    try:
        for i in range(count):
            slots[i] = slot = x & mask
            x = share[slot] * (x >> depth) + rest[slot]
            if x < LOW:
                x = x << 16 | next(read)
    except StopIteration as error:
        raise AerogelError("the entropy code ends too early") from error
    if x != LOW or next(read, None) is not None:
        raise AerogelError("the entropy code does not end where it should")
    return owner[np.array(slots, np.int64)]
