"""Where the weights that are not zero lie: as gaps between them.

Han, Mao, Dally 2016, "Deep Compression", arXiv:1510.00149, section 2: "we store the index difference instead of the
absolute position". There a gap has 5 or 8 bits, and a longer one a filler zero. Differs: a gap is a symbol and some
plain bits, as many as it needs: 0 .. 15 are symbols of their own, above that each octave has four, so that within one
the probability hardly changes. The symbols are entropy-coded.
Where weights are zero independently, gaps are geometric, p(gap) = d (1 - d)^gap with density d, and the symbols' and
plain bits' lengths together are the entropy of the mask; d follows from numbers that are written anyway.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aerogel.errors import AerogelError
from aerogel.sparse import bits

SINGLE = 16
LARGEST = 2**34  # elements of a tensor; the plain bits of one gap then fit 32
_SYMBOLS = SINGLE + 4 * (34 - 4)
FIRST = [*range(SINGLE), *((4 + i % 4) << (2 + i // 4) for i in range(_SYMBOLS - SINGLE))]  # the smallest gap of each
WIDTH = [0] * SINGLE + [2 + i // 4 for i in range(_SYMBOLS - SINGLE)]  # plain bits of each
_FIRST, _WIDTH = np.array(FIRST, np.int64), np.array(WIDTH, np.int64)
_STEP = _FIRST + 1
_FIXED = 32  # bits after the point of a probability


def encode(positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], bytes]:
    """Symbols (n,) and the plain bits, of `positions` (n,), which rise."""
    gaps = np.diff(positions, prepend=-1)
    gaps -= 1
    symbols = np.minimum(gaps, SINGLE).astype(np.uint8)
    long = np.flatnonzero(symbols == SINGLE)
    gaps = gaps[long]
    octave = np.frexp(gaps.astype(np.float64))[1].astype(np.int64) - 1
    symbols[long] = SINGLE + 4 * (octave - 4) + (gaps >> octave - 2) - 4
    return symbols, bits.pack(gaps - _FIRST[symbols[long]], _WIDTH[symbols[long]])


def decode(symbols: NDArray[np.uint8], plain: bytes, size: int) -> NDArray[np.int64]:
    """The positions (n,), all below `size`. Raises AerogelError for what `encode` does not write."""
    if len(symbols) and symbols.max() >= _SYMBOLS:
        raise AerogelError(f"a gap of kind {symbols.max()}")
    needed = len(symbols) + SINGLE * np.count_nonzero(symbols >= SINGLE)
    if needed > size:
        raise AerogelError(f"position {needed - 1} of {size}")
    long = np.flatnonzero(symbols >= SINGLE)
    positions = _STEP.take(symbols)
    positions[long] += bits.unpack(plain, _WIDTH[symbols[long]], len(long)).view(np.int64)
    np.cumsum(positions, out=positions)
    positions -= 1
    if len(positions) and not 0 <= positions[-1] < size:
        raise AerogelError(f"position {positions[-1]} of {size}")
    return positions


def geometric(size: int, count: int, top: int) -> list[int]:
    """Weights of the symbols 0 .. top for `count` of `size` weights: P(gap >= g) = (1 - count / size)^g.

    In whole numbers, so that every machine finds the same.
    """
    miss = ((size - count) << _FIXED) // size
    beyond = [_power(miss, FIRST[symbol]) for symbol in range(min(top, _SYMBOLS - 1) + 1)]
    return [max(1, here - after) for here, after in zip(beyond, [*beyond[1:], 0], strict=True)]


def _power(base: int, exponent: int) -> int:
    """base^exponent of fixed-point numbers below 1."""
    found = 1 << _FIXED
    while exponent:
        if exponent & 1:
            found = found * base >> _FIXED
        base = base * base >> _FIXED
        exponent >>= 1
    return found
