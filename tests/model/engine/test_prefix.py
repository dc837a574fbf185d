import pytest

from model.engine.prefix import PrefixIndex, block_key, root_key

ROOT = root_key("model", b"salt")


def keys_of(index: PrefixIndex, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    index.extend_keys(keys, ROOT, tokens, len(tokens) // index.block_size)
    return keys


def test_a_key_stands_for_the_whole_prefix() -> None:
    assert block_key(ROOT, [1, 2]) != block_key(ROOT, [2, 1])
    first = block_key(ROOT, [1, 2])
    other = block_key(ROOT, [3, 4])
    assert block_key(first, [5, 6]) != block_key(other, [5, 6])


def test_roots_differ_by_every_part_and_by_where_it_ends() -> None:
    roots = {
        root_key("model", b"salt"),
        root_key("model", b"other"),
        root_key("modelsalt"),
        root_key("mode", b"lsalt"),
        root_key("model", b"salt", b""),
    }
    assert len(roots) == 5


def test_match_finds_the_longest_computed_prefix() -> None:
    index = PrefixIndex(2)
    tokens = [1, 2, 3, 4, 5, 6]
    keys = keys_of(index, tokens)
    index.insert(keys[0], ROOT, [1, 2], 7)
    index.insert(keys[1], keys[0], [3, 4], 9)
    assert index.match(keys, tokens, 3) == [7, 9]
    assert index.match(keys, tokens, 1) == [7]
    other = [1, 2, 9, 9]
    assert index.match(keys_of(index, other), other, 2) == [7]


def test_a_hash_alone_is_not_trusted() -> None:
    index = PrefixIndex(2)
    keys = keys_of(index, [1, 2])
    index.insert(keys[0], ROOT, [8, 8], 0)  # as if two contents had one key
    assert index.match(keys, [1, 2], 1) == []
    assert index.insert(keys[0], ROOT, [1, 2], 5) == 5
    assert 5 not in index


def test_equal_blocks_are_one() -> None:
    index = PrefixIndex(2)
    key = keys_of(index, [1, 2])[0]
    assert index.insert(key, ROOT, [1, 2], 3) == 3
    assert index.insert(key, ROOT, [1, 2], 4) == 3
    assert 4 not in index
    index.remove(3)
    assert len(index) == 0
    index.check()


def test_others_wait_for_a_block_that_is_being_computed() -> None:
    index = PrefixIndex(2)
    key = keys_of(index, [1, 2])[0]
    index.announce([key], "first")
    index.announce([key], "second")
    assert index.is_pending(key, "second")
    assert not index.is_pending(key, "first")
    index.withdraw([key], "second")
    assert index.is_pending(key, "second")
    index.withdraw([key], "first")
    assert not index.is_pending(key, "second")
    index.announce([key], "first")
    index.insert(key, ROOT, [1, 2], 0)
    assert not index.is_pending(key, "second")


def test_block_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="block_size"):
        PrefixIndex(0)
