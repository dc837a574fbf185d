import pytest

from model.engine.blocks import BlockPool


def make(num_blocks: int = 3) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append), evicted


def test_every_block_is_given_once() -> None:
    pool, _ = make()
    assert {pool.allocate(), pool.allocate(), pool.allocate()} == {0, 1, 2}
    assert pool.allocate() is None
    pool.check()


def test_release_makes_a_block_free_or_cached() -> None:
    pool, _ = make()
    a, b = pool.allocate(), pool.allocate()
    assert a is not None and b is not None
    pool.release(a, keep=True)
    pool.release(b, keep=False)
    assert (pool.num_free, pool.num_cached) == (2, 1)
    pool.check()


def test_a_shared_block_is_back_with_the_last_release() -> None:
    pool, _ = make()
    a = pool.allocate()
    assert a is not None
    pool.acquire(a)
    pool.release(a, keep=True)
    assert pool.num_available == 2
    pool.release(a, keep=True)
    assert (pool.num_available, pool.num_cached) == (3, 1)


def test_eviction_takes_the_least_recently_used_and_only_when_none_is_free() -> None:
    pool, evicted = make()
    a, b = pool.allocate(), pool.allocate()
    assert a is not None and b is not None
    pool.release(a, keep=True)
    pool.release(b, keep=True)
    pool.acquire(a)  # used again: now b is the older one
    pool.release(a, keep=True)
    assert pool.allocate() not in (a, b)
    assert evicted == []
    assert pool.allocate() == b
    assert pool.allocate() == a
    assert evicted == [b, a]
    assert pool.num_evictions == 2


def test_misuse_is_refused() -> None:
    pool, _ = make()
    a = pool.allocate()
    assert a is not None
    pool.release(a, keep=False)
    with pytest.raises(ValueError, match="released more often"):
        pool.release(a, keep=False)
    with pytest.raises(KeyError):
        pool.acquire(a)
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0, print)


def test_the_check_sees_a_lost_block() -> None:
    pool, _ = make()
    pool._free.take()
    with pytest.raises(AssertionError, match="!= total 3"):
        pool.check()


def table(pool: BlockPool, count: int) -> list[int]:
    """The blocks of a sequence that grows by one at a time."""
    blocks: list[int] = []
    while len(blocks) < count:
        block = pool.allocate(after=blocks[-1] if blocks else None)
        assert block is not None
        blocks.append(block)
    return blocks


def test_sequences_that_grow_in_turn_have_sixteen_blocks_beside_each_other() -> None:
    pool, _ = make(200)
    tables: list[list[int]] = [[], [], []]
    for _ in range(40):
        for blocks in tables:
            block = pool.allocate(after=blocks[-1] if blocks else None)
            assert block is not None
            blocks.append(block)
    for blocks in tables:
        for i in range(0, 40, 16):
            assert blocks[i] % 16 == 0
            assert blocks[i : i + 16] == list(range(blocks[i], blocks[i] + 16))[: 40 - i]
    pool.check()


def test_alone_all_blocks_lie_beside_each_other() -> None:
    pool, _ = make(100)
    assert table(pool, 100) == list(range(100))
    assert pool.allocate(after=99) is None


def test_nothing_is_left_when_no_sixteen_are_free() -> None:
    pool, _ = make(20)
    for block in (taken := table(pool, 20))[::2]:
        pool.release(block, keep=False)
    assert sorted(table(pool, 10)) == taken[::2]
    pool.check()


def test_room_for_many_is_made_at_once_and_used_in_order() -> None:
    pool, evicted = make(64)
    blocks = table(pool, 64)
    for block in reversed(blocks):
        pool.release(block, keep=True)
    pool.make_free(16)
    assert evicted == blocks[:47:-1]
    assert table(pool, 16) == blocks[48:]
    assert len(evicted) == pool.num_evictions == 16
    pool.make_free(100)
    assert (pool.num_free, pool.num_cached) == (48, 0)
    pool.check()
