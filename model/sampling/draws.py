"""Counter-based random numbers: each draw is a pure function of where it is drawn.

There is no generator and no state. A generation that stops can go on in another process, another
batch or another machine and gets the very same numbers, because a draw depends on its seed and its
place alone.
"""

from __future__ import annotations

import struct

import xxhash

_KEY = struct.Struct("<QQQQ")
_WORD = 0xFFFF_FFFF_FFFF_FFFF
_SCALE = 2.0**-53


def uniform(seed: int, prompt_index: int, choice_index: int, position: int) -> float:
    """The draw for one token, uniform in [0, 1) on the grid of 2**-53.

    `position` is the absolute position of the token to be drawn (prompt and output tokens before
    it). The four integers, each modulo 2**64 and little-endian, are hashed with XXH3 (64 bits,
    seed 0; https://github.com/Cyan4973/xxHash, a frozen format), and the upper 53 bits are the
    mantissa. So the value is the same on every machine and in every version of this program.
    """
    key = _KEY.pack(seed & _WORD, prompt_index & _WORD, choice_index & _WORD, position & _WORD)
    return (xxhash.xxh3_64_intdigest(key) >> 11) * _SCALE
