"""Backing: what stands behind the blocks of the device pool, and when blocks go there and back.

A block that is full and indexed never changes until it is evicted, so the engine's thread may copy
it at any moment between two steps. When a request ends, its blocks are noted; a few of them are
copied after each step, so that nobody waits long for it. A block that is evicted before its turn
came is copied at once. From then on the tier has bytes of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from model.engine.messages import DiskStats
from model.engine.prefix import Entry, Key
from model.engine.tiers import DiskTier

COPIES_A_STEP = 4  # some 0.2 ms each for blocks of 360 KB
COPIES_WHEN_IDLE = 16
POLL_SECONDS, POLL_SECONDS_PAUSED = 0.005, 1.0


class BlockCopies(Protocol):
    """Whole blocks as bytes, out of the cache and back into it (`KVCache`)."""

    def copy_out(self, block_ids: Sequence[int]) -> list[bytes]: ...

    def copy_in(self, block_id: int, data: bytes | bytearray | memoryview) -> None: ...


class Backing:
    """The disk tier behind one KV cache. All methods are for the engine's thread."""

    def __init__(self, kv: BlockCopies, tier: DiskTier) -> None:
        self._kv = kv
        self._tier = tier
        self._noted: dict[int, tuple[Entry, int]] = {}  # block -> what it holds, last use in ns

    def has(self, key: Key) -> bool:
        """Whether it is worth a try to restore this block."""
        return key in self._tier

    @property
    def num_corrupt(self) -> int:
        """How many blocks `restore` found spoilt so far."""
        return self._tier.num_corrupt

    @property
    def room(self) -> int:
        """How many blocks could be taken now that are not there yet."""
        return self._tier.room

    def missed(self) -> None:
        """Count a block that was looked for and is not there."""
        self._tier.missed()

    def restore(self, block: int, key: Key, parent: Key, token_ids: Sequence[int]) -> bool:
        """Fill `block` with the KV of exactly these tokens. False when it cannot be had; the block
        is then untouched."""
        payload = self._tier.read(key, parent, token_ids)
        if payload is None:
            return False
        self._kv.copy_in(block, payload)
        return True

    def finished(self, blocks: Sequence[tuple[int, Entry]]) -> None:
        """A request ended; these are its full blocks from the root on, with what they hold."""
        times = self._tier.touch([entry.key for _, entry in blocks])
        for (block, entry), used_ns in zip(blocks, times, strict=True):
            if not self._tier.holds(entry.key):
                self._noted[block] = (entry, used_ns)

    def evicted(self, block: int, entry: Entry) -> None:
        """The block is about to hold something else."""
        _, used_ns = self._noted.pop(block, (entry, 0))
        if self._tier.holds(entry.key):
            return
        if self._tier.room <= 0:
            self._tier.drop()
            return
        self._copy([(block, entry, used_ns or self._tier.touch([entry.key])[0])])

    def forget(self, keys: Sequence[Key]) -> list[Key]:
        """Remove these blocks from the tier and from what is to go there. Returns the keys of
        which nothing is left."""
        unwanted = set(keys)
        for block in [b for b, (entry, _) in self._noted.items() if entry.key in unwanted]:
            del self._noted[block]
        return self._tier.forget(keys)

    def copy_some(self, limit: int = COPIES_A_STEP) -> None:
        """Copy a few of the noted blocks, as far as the queue takes them."""
        chosen: list[tuple[int, Entry, int]] = []
        room = min(limit, self._tier.room) if self._noted else 0
        while self._noted and len(chosen) < room:
            block = next(iter(self._noted))
            entry, used_ns = self._noted.pop(block)
            if not self._tier.holds(entry.key):
                chosen.append((block, entry, used_ns))
        if chosen:
            self._copy(chosen)

    def write_behind(self) -> float | None:
        """Go on copying while there is nothing else to do. Returns after how many seconds to call
        again; None when all is on disk."""
        self.copy_some(COPIES_WHEN_IDLE)
        if not self._noted and not self._tier.busy:
            return None
        return POLL_SECONDS_PAUSED if self._tier.paused else POLL_SECONDS

    def stats(self) -> DiskStats:
        return self._tier.stats()

    def close(self, seconds: float) -> None:
        """Write what can be written in that time, and end."""
        give_up = time.monotonic() + seconds
        while self._noted and time.monotonic() < give_up and not self._tier.paused:
            self.copy_some(COPIES_WHEN_IDLE)
            self._tier.flush(give_up - time.monotonic())
        if not self._tier.paused:
            self._tier.flush(give_up - time.monotonic())
        self._tier.close()

    def _copy(self, blocks: Sequence[tuple[int, Entry, int]]) -> None:
        payloads = self._kv.copy_out([block for block, _, _ in blocks])
        for (_, entry, used_ns), payload in zip(blocks, payloads, strict=True):
            self._tier.write(entry.key, entry.parent, entry.token_ids, payload, used_ns)
