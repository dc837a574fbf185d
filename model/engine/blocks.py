"""BlockPool: who owns which block of the KV cache. Ids and counts only, no tensors.

A block is in one of three states:

    free        nobody needs what is in it
    referenced  one or more requests have it in their block table
    cached      nobody references it, but it holds a computed, indexed block that may be hit

and at all times free + referenced + cached == total.

Cached blocks are evicted least recently used first. A request references every block from the root
to its tail and releases them tail first, so a child is always older in that order than its parent:
leaves go first without a tree to look at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from model.engine.free_blocks import FreeBlocks


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1.

    `on_evict(block)` is called when a cached block is about to be reused for something else.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self.num_releases = 0  # of last references: how often a block became available again
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._free = FreeBlocks(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free) + len(self._cached)

    def allocate(self, after: int | None = None) -> int | None:
        """A block with one reference, the one behind `after` where that can be had, evicting the
        oldest cached one if none is free; None when every block is referenced."""
        self.make_free(1)
        if not self._free:
            return None
        block = self._free.take(after)
        self._references[block] = 1
        return block

    def make_free(self, count: int) -> None:
        """Evict the oldest cached blocks until `count` are free, or none is cached."""
        while len(self._free) < count and self._cached:
            block, _ = self._cached.popitem(last=False)
            self._on_evict(block)
            self.num_evictions += 1
            self._free.give(block)

    def acquire(self, block: int) -> None:
        """One more reference to a block that is referenced or cached."""
        if self._references[block] == 0:
            del self._cached[block]  # KeyError: a free block cannot be acquired
        self._references[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """One reference less. The last one makes the block cached if `keep`, else free."""
        if self._references[block] <= 0:
            raise ValueError(f"block {block} is released more often than it was acquired")
        self._references[block] -= 1
        if self._references[block] == 0:
            self.num_releases += 1
            if keep:
                self._cached[block] = None
            else:
                self._free.give(block)

    def discard(self, block: int) -> None:
        """A cached block holds nothing of worth any more: it is free. A referenced one is let be,
        and must be released with `keep` false."""
        if block in self._cached:
            del self._cached[block]
            self._free.give(block)

    def references(self, block: int) -> int:
        return self._references[block]

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state."""
        free, cached = set(self._free), set(self._cached)
        referenced = {block for block, count in enumerate(self._references) if count > 0}
        if any(count < 0 for count in self._references):
            raise AssertionError("a block has a negative reference count")
        if len(free) != len(self._free):
            raise AssertionError("a block is twice in the free list")
        if len(free) + len(cached) + len(referenced) != self.num_blocks or (
            free | cached | referenced
        ) != set(range(self.num_blocks)):
            raise AssertionError(
                f"free {len(free)} + cached {len(cached)} + referenced {len(referenced)} "
                f"!= total {self.num_blocks}"
            )
