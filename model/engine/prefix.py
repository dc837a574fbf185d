"""PrefixIndex: content address -> block. What was computed once is found again.

The key of a full block is blake3(key of the block before it, its token ids), so a key stands for
the whole prefix up to the end of the block. The first key's parent is the root: blake3 of
everything that could change one bit of the KV (model, ops, dtype, layout, rope) and of the tenant's
salt, so that nothing is shared across models or tenants. On a hit the stored token ids are
compared too; a hash alone is never trusted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

Key = bytes


def root_key(*parts: bytes | str) -> Key:
    """The key that the first block of a sequence has as its parent; each part is length-prefixed,
    so that no two lists of parts give the same key."""
    hasher = blake3()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


def block_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """The content address of a full block."""
    ids = array("I", token_ids)
    return blake3(parent + ids.tobytes()).digest()


@dataclass(slots=True, frozen=True)
class Entry:
    """What an indexed block holds."""

    key: Key
    parent: Key
    token_ids: tuple[int, ...]


class PrefixIndex:
    """Computed, full blocks by key, and the keys that some request is computing now."""

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._block_of: dict[Key, int] = {}
        self._entry_of: dict[int, Entry] = {}
        self._pending: dict[Key, str] = {}  # key -> id of the request that computes it

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._entry_of

    def extend_keys(self, keys: list[Key], root: Key, token_ids: Sequence[int], upto: int) -> None:
        """Append keys until `keys` covers the first `upto` full blocks of `token_ids`."""
        size = self.block_size
        while len(keys) < upto:
            start = len(keys) * size
            parent = keys[-1] if keys else root
            keys.append(block_key(parent, token_ids[start : start + size]))

    def match(self, keys: Sequence[Key], token_ids: Sequence[int], limit: int) -> list[int]:
        """The blocks of the longest computed prefix, at most `limit` of them."""
        size = self.block_size
        blocks: list[int] = []
        for i, key in enumerate(keys[:limit]):
            block = self.find(key, token_ids[i * size : (i + 1) * size])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find(self, key: Key, token_ids: Sequence[int]) -> int | None:
        """The block that holds these tokens under this key."""
        block = self._block_of.get(key)
        if block is None or self._entry_of[block].token_ids != tuple(token_ids):
            return None
        return block

    def has(self, key: Key) -> bool:
        """Whether a block stands for this key; only `find` compares its tokens."""
        return key in self._block_of

    def entry(self, block: int) -> Entry:
        """What an indexed block holds. Raises KeyError for one that is not indexed."""
        return self._entry_of[block]

    def insert(self, key: Key, parent: Key, token_ids: Sequence[int], block: int) -> int:
        """File a computed block. Returns the block that stands for `key` from now on: `block`, or
        an equal one that was there before."""
        self._pending.pop(key, None)
        there = self._block_of.get(key)
        if there is not None:
            same = self._entry_of[there].token_ids == tuple(token_ids)
            return there if same else block
        self._block_of[key] = block
        self._entry_of[block] = Entry(key, parent, tuple(token_ids))
        return block

    def remove(self, block: int) -> Entry:
        """Forget a block that is about to hold something else; returns what it holds."""
        entry = self._entry_of.pop(block)
        del self._block_of[entry.key]
        return entry

    def forget(self, key: Key) -> int | None:
        """Nobody finds this key any more. Returns the block that stood for it, if there is one."""
        block = self._block_of.pop(key, None)
        if block is not None:
            del self._entry_of[block]
        return block

    def announce(self, keys: Sequence[Key], request_id: str) -> None:
        """These blocks are being computed by that request; others that need them wait."""
        for key in keys:
            if key not in self._block_of:
                self._pending.setdefault(key, request_id)

    def withdraw(self, keys: Sequence[Key], request_id: str) -> None:
        """The request will not compute these blocks after all."""
        for key in keys:
            if self._pending.get(key) == request_id:
                del self._pending[key]

    def is_pending(self, key: Key, request_id: str) -> bool:
        """Whether another request is computing this block."""
        return self._pending.get(key, request_id) != request_id

    def check(self) -> None:
        """Raise AssertionError unless both directions agree."""
        if {e.key: b for b, e in self._entry_of.items()} != self._block_of:
            raise AssertionError("the index's two directions disagree")
