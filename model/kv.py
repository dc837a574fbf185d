"""KVCache: the tensors of the block pool, and copies of whole blocks in and out.

It knows nothing of who owns a block or what it holds; that is the block pool's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.config import DecoderConfig
from model.ops.base import Ops
from model.ops.memory import populate


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for all layers, laid out as the ops like."""

    def __init__(self, config: DecoderConfig, num_blocks: int, block_size: int, ops: Ops) -> None:
        """Allocates everything at once. Raises ValueError for counts below 1."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV cache needs at least one block of one token, got {num_blocks} blocks of "
                f"{block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tensor = ops.allocate_kv(config, num_blocks, block_size)
        """[num_layers, 2, runs, blocks in a run, ...]"""
        self._layers = self.tensor.unbind(0)
        self.bytes_per_block = self._block(0).nbytes
        self.bytes_per_token = self.bytes_per_block // block_size
        self.layout = (
            f"{ops.kv_layout} layers={config.num_layers} block={block_size} "
            f"heads={config.num_kv_heads} dim={config.head_dim}"
        )

    @staticmethod
    def measure_block(config: DecoderConfig, block_size: int, ops: Ops) -> int:
        """The bytes of one block, to tell how many fit before the cache is made."""
        return ops.allocate_kv(config, 1, block_size)[:, :, 0, 0].nbytes

    def layer(self, index: int) -> torch.Tensor:
        """The cache of one layer: [2, runs, blocks in a run, ...]."""
        return self._layers[index]

    def populate(self, num_blocks: int) -> None:
        """Have the memory of the first blocks at hand: on some machines a huge page takes 5 ms when
        it is first written. Contents stay, so any thread may do it at any time."""
        if self.tensor.is_cpu:
            num_runs = -(-num_blocks // self.tensor.shape[3])
            for kept in self.tensor[:, :, :num_runs].flatten(0, 1):
                populate(kept)

    def copy_out(self, block_ids: Sequence[int]) -> list[bytes]:
        """The raw bytes of each block, K and V of all layers: `bytes_per_block` each."""
        self._check(block_ids)
        return [self._block(block_id).cpu().numpy().tobytes() for block_id in block_ids]

    def copy_in(self, block_id: int, data: bytes | bytearray | memoryview) -> None:
        """Restore a block from what `copy_out` gave under the same `layout`.

        Raises ValueError when the length or the block id is wrong; the cache is then untouched."""
        self._check([block_id])
        size = memoryview(data).nbytes
        if size != self.bytes_per_block:
            raise ValueError(f"a block has {self.bytes_per_block} bytes, got {size}")
        block = self._block(block_id)
        raw = np.frombuffer(data, dtype=np.uint8).reshape(block.shape)
        if block.is_cpu:
            block.numpy()[...] = raw  # torch would wake its threads for each block
        else:  # a copy of its own: torch wants writable memory, and this may be a mapped file
            block.copy_(torch.from_numpy(raw.copy()))

    def _block(self, block_id: int) -> torch.Tensor:
        """The bytes of a block where they lie: [num_layers, 2, ...] uint8."""
        run, place = divmod(block_id, self.tensor.shape[3])
        return self.tensor[:, :, run, place].view(torch.uint8)

    def _check(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise ValueError(f"block {block_id} is outside the {self.num_blocks} of the cache")
