"""Large, zeroed memory in huge pages where the system gives them.

A decode step reads all weights once. With pages of 4 KiB that is a walk through the page table for
each of them; with pages of 2 MiB it is not.
"""

from __future__ import annotations

import math
import mmap

import torch

ALIGNMENT = 64  # a cache line, and the widest vector
_CHUNK = 64 << 20
_HUGE_PAGE = 2 << 20


def allocate(num_bytes: int) -> torch.Tensor:
    """Zeroed bytes, [num_bytes] uint8, in memory of their own."""
    size = -(-max(num_bytes, 1) // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


class Arena:
    """Gives out pieces of large chunks, so that many small matrices share huge pages."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeroed bytes of this shape, uint8, aligned to `ALIGNMENT`."""
        num_bytes = math.prod(shape)
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + num_bytes > len(self._chunk):
            self._chunk = allocate(max(num_bytes, _CHUNK))
            start = 0
        self._used = start + num_bytes
        return self._chunk[start : self._used].view(shape)
