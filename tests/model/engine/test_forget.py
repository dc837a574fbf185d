"""Blocks that the disk tier is told to forget: files, queued ones, the one being written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.engine.test_tiers import Chain, names, opened, wait_for


def test_what_is_forgotten_is_gone_also_after_a_restart(tmp_path: Path) -> None:
    chain = Chain(1, 6)
    gone = [chain.keys[1], chain.keys[4]]
    with opened(tmp_path) as tier:
        chain.write(tier)
        tier.touch(chain.keys)
        assert tier.forget([*gone, bytes(32)]) == [*gone, bytes(32)]
        assert tier.flush(10)
        assert [i for i in range(6) if chain.read(tier, i) is None] == [1, 4]
        assert tier.stats().num_files == len(names(tmp_path)) == 4
    with opened(tmp_path) as tier:
        assert [i for i in range(6) if chain.read(tier, i) is None] == [1, 4]
        assert tier.write(chain.keys[1], chain.parents[1], chain.tokens[1], chain.payloads[1], 1)


def test_files_of_another_model_are_forgotten_too(tmp_path: Path) -> None:
    chain = Chain(1, 3)
    with opened(tmp_path) as tier:
        chain.write(tier)
    with opened(tmp_path, root=bytes(32)) as tier:
        assert tier.forget(chain.keys) == chain.keys
    assert names(tmp_path) == []


def test_blocks_that_are_queued_or_being_written_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held in the midst of the first block's file, until somebody waits for it."""
    reached, go_on = threading.Event(), threading.Event()
    rename = os.rename

    def held(*args: object, **options: object) -> None:
        reached.set()
        assert go_on.wait(10)
        rename(*args, **options)  # type: ignore[arg-type]

    chain = Chain(1, 5)
    with opened(tmp_path) as tier:
        monkeypatch.setattr(os, "rename", held)
        for i, used_ns in enumerate(tier.touch(chain.keys)):
            tier.write(chain.keys[i], chain.parents[i], chain.tokens[i], chain.payloads[i], used_ns)
        assert reached.wait(10)
        assert tier.forget([chain.keys[3]]) == [chain.keys[3]]  # does not wait for another block
        wait_for_change = tier._changed.wait_for

        def waits(condition: Callable[[], bool], seconds: float | None = None) -> bool:
            go_on.set()
            return wait_for_change(condition, seconds)

        monkeypatch.setattr(tier._changed, "wait_for", waits)
        assert tier.forget(chain.keys[:2]) == chain.keys[:2]
        monkeypatch.undo()
        assert tier.flush(10)
        assert [tier.holds(key) for key in chain.keys] == [False, False, True, False, True]
        left = [chain.path(tmp_path, i).name for i in (2, 4)]
        assert names(tmp_path) == sorted(left)
        assert tier.stats().num_files == 2
    assert names(tmp_path) == sorted(left)


def test_a_block_that_the_disk_does_not_take_is_forgotten_while_it_waits(
    small_disk: Path,
) -> None:
    filler = small_disk / "filler"
    with opened(small_disk / "kv", retry_seconds=60) as tier:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        chain = Chain(1, 3)
        for i in range(3):
            tier.write(chain.keys[i], chain.parents[i], chain.tokens[i], chain.payloads[i], 1)
        assert wait_for(tier, lambda: tier.paused)
        assert tier.forget(chain.keys) == chain.keys
        assert not tier.busy
        filler.unlink()
    assert names(small_disk) == []
