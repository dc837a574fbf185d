"""FreeBlocks: which block of the KV cache is taken next.

Memory is read fastest forwards and in long pieces, so what follows in a sequence should follow in
the cache: a block is taken right behind the one before it, or else from an extent that is all free.
"""

from __future__ import annotations

from collections.abc import Iterator

EXTENT = 16  # blocks that lie beside each other, from a multiple of 16 on


class FreeBlocks:
    """The free blocks of 0 .. num_blocks - 1: all of them, at first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks = dict.fromkeys(range(num_blocks))  # in the order in which they became free
        self._in_extent = [self._size(e) for e in range(-(-num_blocks // EXTENT))]
        self._whole = dict.fromkeys(reversed(range(len(self._in_extent))))  # extents, lowest last

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def give(self, block: int) -> None:
        extent = block // EXTENT
        self._blocks[block] = None
        self._in_extent[extent] += 1
        if self._in_extent[extent] == self._size(extent):
            self._whole[extent] = None

    def take(self, after: int | None = None) -> int:
        """The one behind `after`, unless it is not free or begins an extent that is partly taken:
        there somebody else goes on. Then the first of the extent that became free as a whole last,
        or any. There must be one."""
        block = self._behind(after)
        if block is None:
            extent = next(reversed(self._whole), None)
            block = next(reversed(self._blocks)) if extent is None else extent * EXTENT
        del self._blocks[block]
        self._whole.pop(block // EXTENT, None)
        self._in_extent[block // EXTENT] -= 1
        return block

    def _behind(self, after: int | None) -> int | None:
        if after is None or (block := after + 1) not in self._blocks:
            return None
        return block if block % EXTENT or block // EXTENT in self._whole else None

    def _size(self, extent: int) -> int:
        return min(EXTENT, self._num_blocks - extent * EXTENT)
