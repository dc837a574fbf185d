"""AllowedTokens: which tokens a request may draw, one bit each."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_LITTLE_ENDIAN = sys.byteorder == "little"


class AllowedTokens:
    """Bit `id % 32` of `bits[id // 32]` says whether a token may be drawn. `address` is that of
    `bits` (uint32), for the kernels. With `must_end` only end tokens are left, and `min_tokens` is
    not to hold them back."""

    __slots__ = ("address", "bits", "must_end")

    def __init__(self, num_tokens: int, token_ids: Iterable[int] = ()) -> None:
        """Of a vocabulary of so many tokens, only `token_ids` are allowed."""
        self.bits: npt.NDArray[np.uint32] = np.zeros(-(-num_tokens // 32), dtype=np.uint32)
        self.address = self.bits.ctypes.data
        self.must_end = False
        for token_id in token_ids:
            self.bits[token_id // 32] |= np.uint32(1 << token_id % 32)

    def as_booleans(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """[vocab_size], True where a token may be drawn."""
        words = self.bits if _LITTLE_ENDIAN else self.bits.byteswap()
        return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(bool)
