"""Large, zeroed memory in huge pages where the system gives them.

A decode step reads all weights once. With pages of 4 KiB that is a walk through the page table for
each of them; with pages of 2 MiB it is not.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import torch

ALIGNMENT = 64  # a cache line, and the widest vector
_CHUNK = 64 << 20
_HUGE_PAGE = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14; the mmap module does not name it


def allocate(num_bytes: int) -> torch.Tensor:
    """Zeroed bytes, [num_bytes] uint8, in memory of their own."""
    size = -(-max(num_bytes, 1) // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def populate(tensor: torch.Tensor) -> None:
    """Have the system give the memory behind a contiguous CPU tensor now, and not piece by piece
    when it is first used. Its contents stay, whoever writes there meanwhile. Nothing happens where
    the system knows no such thing."""
    if sys.platform != "linux":
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    libc = ctypes.CDLL(None)  # unlike mmap's own, a call through it lets other threads run
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _POPULATE_WRITE)


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
