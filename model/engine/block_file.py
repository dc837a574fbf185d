"""BlockFormat: one KV block as bytes of a file, and back.

    offset  size  what
         0     8  magic "HEADKV" and two zero bytes
         8     4  version
        12     4  length of the layout string
        16     4  block size, in tokens
        20     4  zero
        24     8  length of the payload, in bytes
        32    32  static root: model, weights, ops, layout, rope (without the tenant's salt)
        64    32  key
        96    32  key of the block before it; for the first one the root with the tenant's salt
       128     n  layout: dtype and shape, UTF-8
             4*b  token ids
               p  payload, as `KVCache.copy_out` gives it
              16  XXH3-128 of everything before

All integers are little-endian. All files of one model and layout have the same length, and all of a
file but its payload is known to whoever looks for it. So nothing that is read from a file is ever
used as a length: the file must have the one size, and begin with the very bytes that are expected.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

MAGIC = b"HEADKV\0\0"
VERSION = 1
DIGEST_BYTES = 16
_FIXED = struct.Struct("<8sIIIIQ32s32s32s")


class CorruptBlock(Exception):
    """A file is not what its name says; the message says in what."""


class BlockFormat:
    """Files of blocks of `block_bytes` bytes and `block_size` tokens, for one model and layout.

    `root` is the static root key, 32 bytes; `layout` names dtype and shape."""

    def __init__(self, root: bytes, layout: str, block_size: int, block_bytes: int) -> None:
        self.root = root
        self.block_size = block_size
        self.block_bytes = block_bytes
        self._layout = layout.encode()
        self._header_bytes = _FIXED.size + len(self._layout) + 4 * block_size
        self.file_bytes = self._header_bytes + block_bytes + DIGEST_BYTES

    def encode(
        self, key: bytes, parent: bytes, token_ids: Sequence[int], payload: bytes
    ) -> tuple[bytes, bytes, bytes]:
        """A file's three parts, to be written one after the other. Raises ValueError when the
        payload or the number of tokens is not that of a block."""
        if len(payload) != self.block_bytes or len(token_ids) != self.block_size:
            raise ValueError(
                f"a block has {self.block_size} tokens and {self.block_bytes} bytes, got "
                f"{len(token_ids)} and {len(payload)}"
            )
        header = self._header(key, parent, token_ids)
        digest = xxhash.xxh3_128(header)
        digest.update(payload)
        return header, payload, digest.digest()

    def decode(
        self, data: memoryview, key: bytes, parent: bytes, token_ids: Sequence[int]
    ) -> memoryview:
        """The payload of a file that holds that very block. Raises CorruptBlock."""
        if len(data) != self.file_bytes:
            raise CorruptBlock(f"{len(data)} bytes instead of {self.file_bytes}")
        if data[: self._header_bytes] != self._header(key, parent, token_ids):
            raise CorruptBlock("it holds another block, or one of another model or layout")
        if data[-DIGEST_BYTES:] != xxhash.xxh3_128(data[:-DIGEST_BYTES]).digest():
            raise CorruptBlock("the checksum is wrong")
        return data[self._header_bytes : -DIGEST_BYTES]

    def _header(self, key: bytes, parent: bytes, token_ids: Sequence[int]) -> bytes:
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            len(self._layout),
            self.block_size,
            0,
            self.block_bytes,
            self.root,
            key,
            parent,
        )
        return fixed + self._layout + struct.pack(f"<{len(token_ids)}I", *token_ids)
