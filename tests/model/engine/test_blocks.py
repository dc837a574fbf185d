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
    assert (pool.num_free, pool.num_cached, pool.num_referenced) == (2, 1, 0)
    pool.check()


def test_a_shared_block_is_back_with_the_last_release() -> None:
    pool, _ = make()
    a = pool.allocate()
    assert a is not None
    pool.acquire(a)
    pool.release(a, keep=True)
    assert pool.num_referenced == 1
    pool.release(a, keep=True)
    assert (pool.num_referenced, pool.num_cached) == (0, 1)


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
    pool._free.pop()
    with pytest.raises(AssertionError, match="!= total 3"):
        pool.check()
