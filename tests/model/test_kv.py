"""KVCache: sizes, and blocks that go out and come back exactly."""

from __future__ import annotations

import mmap
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig
from model.kv import KVCache
from model.ops.memory import allocate
from model.ops.native import NativeOps
from model.ops.reference import ReferenceOps
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import Pool, load_decoder, make_tokens, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("kv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes(folder: Path, dtype: torch.dtype) -> None:
    ops = ReferenceOps(dtype=dtype)
    config = read_config(folder)
    kv = KVCache(config, 6, 4, ops)
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    assert kv.bytes_per_token == per_token
    assert kv.bytes_per_block == 4 * per_token == KVCache.measure_block(config, 4, ops)
    assert kv.tensor.nbytes == 6 * kv.bytes_per_block
    assert kv.layout != KVCache(config, 6, 8, ops).layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_exactly(folder: Path, dtype: torch.dtype) -> None:
    """All bit patterns, NaNs among them, into other blocks of another cache."""
    config, ops = read_config(folder), ReferenceOps(dtype=dtype)
    kv = KVCache(config, 6, 4, ops)
    noise = torch.randint(0, 256, (kv.tensor.nbytes,), dtype=torch.uint8)
    kv.tensor.view(-1).view(torch.uint8).copy_(noise)
    data = kv.copy_out([4, 1, 5])
    assert [len(block) for block in data] == [kv.bytes_per_block] * 3
    other = KVCache(config, 6, 4, ops)
    for block_id, block in zip((0, 2, 3), data, strict=True):
        other.copy_in(block_id, memoryview(block))
    assert other.copy_out([0, 2, 3]) == data
    assert other.copy_out([1, 4, 5]) == [bytes(kv.bytes_per_block)] * 3
    assert kv.copy_out([]) == []


class LazyOps(ReferenceOps):
    """Whose cache lies in memory that was not asked for yet, as the native ops' does."""

    def allocate_kv(self, config: DecoderConfig, num_blocks: int, block_size: int) -> torch.Tensor:
        like = super().allocate_kv(config, 1, block_size)
        shape = (*like.shape[:2], num_blocks, *like.shape[3:])
        return allocate(num_blocks * like.nbytes).view(self.dtype).view(shape)


def can_populate() -> bool:
    """Linux 5.14 and newer; not every sandbox."""
    if sys.platform != "linux":
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            page.madvise(23)  # MADV_POPULATE_WRITE
        except OSError:
            return False
    return True


@pytest.mark.skipif(not can_populate(), reason="the system has no such call")
def test_memory_is_at_hand_before_it_is_used(folder: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    kv = KVCache(read_config(folder), 100_000, 4, LazyOps(dtype=torch.float32))
    data = bytes(range(256)) * (kv.bytes_per_block // 256)
    kv.copy_in(7, data)
    before = resident()
    kv.populate(50_000)
    half = kv.tensor.nbytes / 2
    assert half > 64 << 20
    assert 0.8 * half < resident() - before < 1.3 * half
    assert kv.copy_out([6, 7, 8]) == [bytes(kv.bytes_per_block), data, bytes(kv.bytes_per_block)]


def test_native_blocks_come_back_exactly_from_every_run(folder: Path) -> None:
    """A head's tiles of 32 blocks lie together, so a block is in many pieces; the last run is not
    full, and no block shares a byte with another."""
    config, ops = read_config(folder), NativeOps(1)
    kv = KVCache(config, 70, 16, ops)
    order = list(range(70))
    random.Random(0).shuffle(order)
    data = {block_id: random.Random(block_id).randbytes(kv.bytes_per_block) for block_id in order}
    for block_id in order:
        kv.copy_in(block_id, data[block_id])
    assert kv.copy_out(order) == [data[block_id] for block_id in order]
    assert KVCache.measure_block(config, 16, ops) == kv.bytes_per_block == len(data[0])


def test_a_sequence_goes_on_from_restored_blocks(folder: Path) -> None:
    """Decoding over blocks that were copied into another cache gives the same bits."""
    decoder = load_decoder(folder)
    tokens = make_tokens(33)
    first = Pool(decoder, [tokens], block_size=4)
    first.run(0, [32])
    second = Pool(decoder, [tokens], block_size=4)
    second.tables[0].reverse()
    blocks = first.kv.copy_out(first.tables[0][:8])
    for block_id, data in zip(second.tables[0][:8], blocks, strict=True):
        second.kv.copy_in(block_id, data)
    second.computed[0] = 32
    assert torch.equal(first.run(0, [1]), second.run(0, [1]))


def test_wrong_blocks_and_lengths_are_refused(folder: Path) -> None:
    config, ops = read_config(folder), ReferenceOps()
    kv = KVCache(config, 6, 4, ops)
    with pytest.raises(ValueError, match="block 6 is outside the 6"):
        kv.copy_out([0, 6])
    with pytest.raises(ValueError, match="block -1 is outside the 6"):
        kv.copy_in(-1, bytes(kv.bytes_per_block))
    with pytest.raises(ValueError, match=f"{kv.bytes_per_block} bytes, got 3"):
        kv.copy_in(0, b"abc")
    assert not kv.tensor.any()
    with pytest.raises(ValueError, match="at least one block"):
        KVCache(config, 0, 4, ops)
