"""The disk tier: what is written is found again; what is spoilt, foreign or gone is a miss."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.engine.block_file import BlockFormat
from model.engine.engine import Engine
from model.engine.prefix import block_key, root_key
from model.engine.request import SamplingParams
from model.engine.tiers import DiskTier, TierUnavailable
from tests.fixtures.spoilt import WAYS, spoilt
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import make_tokens
from tests.model.engine.simulation import (
    ROOT,
    disk_tier,
    make_engine,
    oracle,
    run_to_end,
    submit,
)
from tests.model.engine.test_generation import load, run_one

SIZE, BYTES = 4, 1000  # tokens and bytes of a block
LAYOUT = "test float32"


def make_tier(
    folder: Path, *, root: bytes = ROOT, layout: str = LAYOUT, files: int = 10_000, **options: float
) -> DiskTier:
    size = BlockFormat(root, layout, SIZE, BYTES).file_bytes
    return DiskTier(
        folder,
        root=root,
        layout=layout,
        block_size=SIZE,
        block_bytes=BYTES,
        budget_bytes=files * size,
        **{"lock_seconds": 0, **options},  # type: ignore[arg-type]
    )


@contextlib.contextmanager
def opened(folder: Path, **options: object) -> Iterator[DiskTier]:
    tier = make_tier(folder, **options)  # type: ignore[arg-type]
    try:
        yield tier
    finally:
        tier.close()


class Chain:
    """Blocks of one sequence, with payloads that nothing else has."""

    def __init__(self, seed: int, length: int) -> None:
        chooser = random.Random(seed)
        self.tokens = [[chooser.randrange(1 << 32) for _ in range(SIZE)] for _ in range(length)]
        self.payloads = [chooser.randbytes(BYTES) for _ in range(length)]
        self.parents = [root_key(ROOT, seed.to_bytes(4, "little"))]
        self.keys: list[bytes] = []
        for tokens in self.tokens:
            self.keys.append(block_key(self.parents[-1], tokens))
            self.parents.append(self.keys[-1])

    def write(self, tier: DiskTier) -> None:
        times = tier.touch(self.keys)
        for i, used_ns in enumerate(times):
            assert tier.write(
                self.keys[i], self.parents[i], self.tokens[i], self.payloads[i], used_ns
            )
            assert tier.flush(10)

    def read(self, tier: DiskTier, i: int) -> bytes | None:
        found = tier.read(self.keys[i], self.parents[i], self.tokens[i])
        return None if found is None else bytes(found)

    def path(self, folder: Path, i: int) -> Path:
        name = self.keys[i].hex()
        return folder / name[:2] / f"{name}.kv"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "lock")


# ---------------------------------------------------------------------------- found again


def test_what_is_written_is_found_again_also_after_a_restart(tmp_path: Path) -> None:
    chain = Chain(1, 5)
    with opened(tmp_path) as tier:
        chain.write(tier)
        assert [chain.read(tier, i) for i in range(5)] == chain.payloads
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.written, stats.num_files) == (5, 0, 5, 5)
        assert stats.num_bytes == sum(chain.path(tmp_path, i).stat().st_size for i in range(5))
    with opened(tmp_path) as tier:
        assert tier.stats().num_files == 5
        assert [chain.read(tier, i) for i in range(5)] == chain.payloads
        assert Chain(2, 1).read(tier, 0) is None
        assert tier.stats().misses == 1


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "kv"
    folder.mkdir(parents=True, mode=0o755)
    with opened(folder) as tier:
        Chain(1, 1).write(tier)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    chain = Chain(1, 2)
    with opened(tmp_path) as tier:
        chain.write(tier)
    data = chain.path(tmp_path, 1).read_bytes()
    magic, version, layout_size, block_size, _, payload_size, root, key, parent = (
        struct.unpack_from("<8sIIIIQ32s32s32s", data)
    )
    assert (magic, version, block_size, payload_size) == (b"HEADKV\0\0", 1, SIZE, BYTES)
    assert (root, key, parent) == (ROOT, chain.keys[1], chain.keys[0])
    assert data[128 : 128 + layout_size].decode() == LAYOUT
    assert list(struct.unpack_from("<4I", data, 128 + layout_size)) == chain.tokens[1]
    assert data[-16 - BYTES : -16] == chain.payloads[1]


def test_files_left_half_written_are_removed_and_those_of_others_are_not(tmp_path: Path) -> None:
    chain = Chain(1, 2)
    with opened(tmp_path) as tier:
        chain.write(tier)
    path = chain.path(tmp_path, 0)
    path.with_suffix(".tmp").write_bytes(b"half")
    (path.parent / "notes.txt").write_text("mine")
    (tmp_path / "readme").write_text("mine")
    with opened(tmp_path) as tier:
        assert tier.stats().num_files == 2
    assert not path.with_suffix(".tmp").exists()
    assert (path.parent / "notes.txt").exists() and (tmp_path / "readme").exists()


# ----------------------------------------------------------------------------- spoilt files


def mutate(chain: Chain, i: int, path: Path, other: bytes, chooser: random.Random) -> str:
    """Spoil the file of a chain's block in one of many ways, and say in which. `other` is a good
    file of another block."""
    data = bytearray(path.read_bytes())
    kind = chooser.choice(
        [*WAYS, "bits", "header", "swapped", "symlink", "dangling", "zeros", "folder", "foreign"]
    )
    if kind in WAYS:
        data = bytearray(spoilt(data, other, kind, chooser))
    elif kind == "header":
        data[chooser.randrange(128 + len(LAYOUT) + 4 * SIZE)] ^= 1 << chooser.randrange(8)
    elif kind == "bits":
        for place in chooser.sample(range(len(data)), 20):
            data[place] ^= 1 << chooser.randrange(8)
    elif kind == "swapped":  # the right head, another block's payload and checksum
        data = data[: -BYTES - 16] + other[-BYTES - 16 :]
    elif kind == "zeros":
        data[chooser.randrange(len(data) - 200) :] = bytes(200)
    elif kind == "foreign":  # the same block of another model, with a checksum that is right
        form = BlockFormat(bytes(32), LAYOUT, SIZE, BYTES)
        parts = form.encode(chain.keys[i], chain.parents[i], chain.tokens[i], chain.payloads[i])
        data = bytearray(b"".join(parts))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
        return kind
    elif kind in ("symlink", "dangling"):
        target = path.with_suffix(".elsewhere")
        if kind == "symlink":  # the very bytes that belong there, behind a link
            target.write_bytes(data)
        path.unlink()
        path.symlink_to(target)
        return kind
    path.write_bytes(data)
    return kind


def test_a_thousand_spoilt_files_are_a_thousand_misses(tmp_path: Path) -> None:
    chain, other = Chain(1, 1000), Chain(2, 1)
    chooser = random.Random(7)
    kinds = set()
    with opened(tmp_path) as tier:
        chain.write(tier)
        other.write(tier)
        foreign = other.path(tmp_path, 0).read_bytes()
        for i in range(1000):
            kinds.add(mutate(chain, i, chain.path(tmp_path, i), foreign, chooser))
        for i in range(1000):
            assert chain.read(tier, i) is None, i
            assert not os.path.lexists(chain.path(tmp_path, i))
            assert chain.keys[i] not in tier
        stats = tier.stats()
        assert (stats.corrupt, stats.misses, stats.hits) == (1000, 1000, 0)
        assert stats.num_files == 1
        assert other.read(tier, 0) == other.payloads[0]
        chain.write(tier)  # and all of them can be written again
        assert [chain.read(tier, i) for i in range(1000)] == chain.payloads
    assert len(kinds) == 14


def test_a_folder_with_something_in_it_stays_and_is_never_taken_for_a_block(tmp_path: Path) -> None:
    chain = Chain(1, 1)
    path = chain.path(tmp_path, 0)
    with opened(tmp_path) as tier:
        chain.write(tier)
        path.unlink()
        path.mkdir()
        (path / "notes").write_text("mine")
        assert chain.read(tier, 0) is None
        assert tier.stats().corrupt == 1
        assert tier.forget(chain.keys) == []
    with opened(tmp_path) as tier:
        assert tier.stats().num_files == 0
    assert (path / "notes").read_text() == "mine"


@pytest.mark.parametrize("change", [{"root": bytes(32)}, {"layout": "test bfloat1"}])
def test_files_of_another_model_or_layout_are_not_taken(
    tmp_path: Path, change: dict[str, object]
) -> None:
    chain = Chain(1, 3)
    with opened(tmp_path) as tier:
        chain.write(tier)
    with opened(tmp_path, **change) as tier:
        assert [chain.read(tier, i) for i in range(3)] == [None] * 3
        assert tier.stats().corrupt == 3
    assert names(tmp_path) == []


def test_the_tokens_are_compared(tmp_path: Path) -> None:
    chain = Chain(1, 1)
    with opened(tmp_path) as tier:
        chain.write(tier)
        wrong = [*chain.tokens[0][:-1], 5]
        assert tier.read(chain.keys[0], chain.parents[0], wrong) is None
        assert tier.stats().corrupt == 1


def test_a_file_that_goes_is_a_miss_and_nothing_worse(tmp_path: Path) -> None:
    chain = Chain(1, 2)
    with opened(tmp_path) as tier:
        chain.write(tier)
        chain.path(tmp_path, 0).unlink()
        assert chain.read(tier, 0) is None
        assert chain.read(tier, 1) == chain.payloads[1]
        stats = tier.stats()
        assert (stats.misses, stats.corrupt, stats.errors, stats.num_files) == (1, 0, 0, 1)


def test_no_subfolder_is_followed_elsewhere(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    chain = Chain(1, 1)
    with opened(folder) as tier:
        chain.write(tier)
        subfolder = chain.path(folder, 0).parent
        subfolder.rename(elsewhere)
        subfolder.symlink_to(elsewhere)
        assert chain.read(tier, 0) is None
        assert tier.write(chain.keys[0], chain.parents[0], chain.tokens[0], chain.payloads[0], 0)
        assert tier.flush(10)
        stats = tier.stats()
        assert (stats.corrupt, stats.dropped, stats.num_files) == (1, 1, 0)
    assert len(list(elsewhere.iterdir())) == 1


# ---------------------------------------------------------------------------- budget and LRU


def test_the_budget_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    chains = [Chain(seed, 4) for seed in range(6)]
    with opened(tmp_path, files=20) as tier:
        for chain in chains[:5]:
            chain.write(tier)
        tier.touch(chains[0].keys)  # the oldest one is used again
        chains[5].write(tier)
        stats = tier.stats()
        assert stats.num_files == len(names(tmp_path)) <= 20
        assert stats.num_bytes <= tier.budget_bytes
        assert stats.evicted >= 4
        gone = {i for i, chain in enumerate(chains) if chain.keys[0] not in tier}
        assert gone == {1}
        assert all(key in tier for key in chains[0].keys + chains[5].keys)


def test_of_a_chain_the_end_goes_first(tmp_path: Path) -> None:
    old, new = Chain(1, 10), Chain(2, 3)
    with opened(tmp_path, files=10) as tier:
        old.write(tier)
        new.write(tier)
        left = [key in tier for key in old.keys]
        assert left == sorted(left, reverse=True)
        assert left[0] and not left[-1]


def test_the_order_outlives_the_engine(tmp_path: Path) -> None:
    chains = [Chain(seed, 4) for seed in range(4)]
    with opened(tmp_path) as tier:
        for chain in chains:
            chain.write(tier)
        tier.touch(chains[0].keys)
        assert tier.flush(10)
    with opened(tmp_path, files=8) as tier:  # and a smaller budget holds from the start
        kept = [i for i, chain in enumerate(chains) if chain.keys[0] in tier]
        assert kept == [0, 3]
        assert len(names(tmp_path)) <= 8
        Chain(9, 4).write(tier)
        assert chains[3].keys[-1] not in tier
        assert chains[0].keys[0] in tier


def test_the_bytes_that_are_counted_are_those_of_the_files(tmp_path: Path) -> None:
    """Through restarts, evictions, spoilt and forgotten files, and files of two models."""
    chooser = random.Random(3)
    for round_number in range(12):
        root = ROOT if round_number % 3 else bytes(32)
        with opened(tmp_path, root=root, files=40) as tier:
            sizes = [path.stat().st_size for path in tmp_path.glob("??/*.kv")]
            assert (tier.stats().num_files, tier.stats().num_bytes) == (len(sizes), sum(sizes))
            chain = Chain(round_number, 12)
            chain.write(tier)
            tier.forget(chooser.sample(chain.keys, 3))
            for path in chooser.sample(sorted(tmp_path.glob("??/*.kv")), 3):
                path.write_bytes(path.read_bytes()[: chooser.randrange(500)])
            for i in range(12):
                chain.read(tier, i)
            assert tier.stats().num_bytes <= tier.budget_bytes
    assert len(names(tmp_path)) > 20


# --------------------------------------------------------------------------- a disk in trouble


def test_a_full_disk_drops_blocks_and_recovers(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(36 << 10))
    with opened(small_disk / "kv", retry_seconds=0.02, queue_bytes=8 * BYTES) as tier:
        chain = Chain(1, 100)
        for i, used_ns in enumerate(tier.touch(chain.keys)):
            tier.write(chain.keys[i], chain.parents[i], chain.tokens[i], chain.payloads[i], used_ns)
        assert wait_for(tier, lambda: tier._errors > 0)
        assert not [name for name in names(small_disk) if name.endswith(".tmp")]
        filler.unlink()
        assert tier.flush(10)
        stats = tier.stats()
        assert stats.dropped > 0 and stats.num_files == stats.written - stats.evicted
        found = [i for i in range(100) if chain.keys[i] in tier]
        assert found and all(chain.read(tier, i) == chain.payloads[i] for i in found)
        late = Chain(2, 1)
        late.write(tier)
        assert late.read(tier, 0) == late.payloads[0]
    assert not [name for name in names(small_disk) if name.endswith(".tmp")]


def wait_for(tier: DiskTier, condition: Callable[[], bool]) -> bool:
    with tier._changed:
        return tier._changed.wait_for(condition, 10)


def test_a_write_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    chain = Chain(1, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path, retry_seconds=0.02) as tier:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # in the midst of the payload
        try:
            tier.write(chain.keys[0], chain.parents[0], chain.tokens[0], chain.payloads[0], 1)
            assert wait_for(tier, lambda: tier._errors >= 2)
            assert names(tmp_path) == []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert tier.flush(10)
        assert chain.read(tier, 0) == chain.payloads[0]


@pytest.mark.parametrize("call", ["rename", "open", "write", "utime", "close"])
def test_any_call_of_a_write_may_fail(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken disk cannot be had in a test: the system call is replaced, for the writer alone."""
    real = getattr(os, call)
    failures = iter(range(2))

    def broken(*args: object, **options: object) -> object:
        ours = threading.current_thread().name == "disk-tier"
        if ours and (call != "open" or ".tmp" in str(args[0])) and next(failures, None) is not None:
            if call == "close":
                real(*args, **options)
            raise OSError(5, "Input/output error")
        return real(*args, **options)

    chain = Chain(1, 2)
    with opened(tmp_path, retry_seconds=0.01) as tier:
        monkeypatch.setattr(os, call, broken)
        chain.write(tier)
        monkeypatch.undo()
        # Two calls failed: in two writes, or in one, where it closes a file and a folder.
        assert tier.stats().errors == (1 if call == "close" else 2)
        assert [chain.read(tier, i) for i in range(2)] == chain.payloads
    assert [name for name in names(tmp_path) if not name.endswith(".kv")] == []


def test_a_read_that_fails_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    chain = Chain(1, 1)
    with opened(tmp_path) as tier:
        chain.write(tier)
        monkeypatch.setattr(os, "readv", broken)
        assert chain.read(tier, 0) is None
        monkeypatch.undo()
        assert (tier.stats().errors, tier.stats().misses) == (1, 1)
        chain.write(tier)
        assert chain.read(tier, 0) == chain.payloads[0]


# ------------------------------------------------------------------------------- two engines


def test_a_folder_is_for_one_engine_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from model.engine.block_folder import BlockFolder\n"
        "folder = BlockFolder(Path(sys.argv[1]))\n"
        "print('mine', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"mine\n"
        with pytest.raises(TierUnavailable, match=f"another engine has .*process {holder.pid}"):
            make_tier(tmp_path)
        holder.kill()
        with opened(tmp_path, lock_seconds=5) as tier:  # a dead engine holds nothing
            Chain(1, 1).write(tier)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierUnavailable, match="file"):
        make_tier(tmp_path / "file" / "kv")
    with pytest.raises(TierUnavailable, match="less than one block"):
        make_tier(tmp_path / "kv", files=0)


# -------------------------------------------------------------------- behind a simulated engine

PROMPT = [i * i % 5 for i in range(41)]


def test_generations_go_on_while_the_disk_is_full(small_disk: Path) -> None:
    filler = small_disk / "filler"
    prompts = [[(i * n + n) % 6 for i in range(30)] for n in range(1, 6)]

    def ask_all(engine: Engine) -> None:
        """Four times as many tokens as the pool holds."""
        for n, prompt in enumerate(prompts):
            submit(engine, f"r{n}", prompt, max_tokens=3)
            assert run_to_end(engine)[f"r{n}"] == oracle(prompt, 3, 36)
            engine.write_behind()

    def start() -> tuple[Engine, DiskTier]:
        tier = DiskTier(
            small_disk / "kv",
            root=ROOT,
            layout="cells",
            block_size=4,
            block_bytes=32,
            budget_bytes=1 << 20,
            queue_bytes=8 * 32,
            retry_seconds=0.01,
            lock_seconds=0,
        )
        return make_engine(num_blocks=9, max_num_batched_tokens=64, disk=tier)[0], tier

    engine, tier = start()
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    ask_all(engine)
    assert wait_for(tier, lambda: tier._errors > 1)
    assert names(small_disk) == ["filler"]
    assert engine.stats().disk.written == 0 and engine.stats().disk.dropped > 0
    filler.unlink()
    assert tier.flush(10)
    ask_all(engine)
    while engine.write_behind() is not None:
        assert tier.flush(10)
    engine.close()
    assert all(name.endswith(".kv") for name in names(small_disk))
    engine, tier = start()
    sizes = [path.stat().st_size for path in small_disk.glob("kv/??/*.kv")]
    assert (tier.stats().num_files, tier.stats().num_bytes) == (len(sizes), sum(sizes))
    ask_all(engine)
    stats = engine.stats()
    assert stats.disk_tokens > 0 and stats.disk.corrupt == 0
    engine.close()


def test_an_engine_goes_on_from_the_disk(tmp_path: Path) -> None:
    engine, _ = make_engine(num_blocks=16, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "first", PROMPT, max_tokens=5)
    first = run_to_end(engine)["first"]
    while engine.write_behind() is not None:
        pass
    assert engine.stats().disk.written == 10 + (len(PROMPT) % 4 + len(first) - 1) // 4
    engine.close()

    engine, runner = make_engine(num_blocks=16, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "again", PROMPT, max_tokens=5)
    outputs = engine.step().outputs
    while not outputs:  # a step reads as many blocks as it has time for
        outputs = engine.step().outputs
    assert (outputs[0].num_reused_tokens, outputs[0].num_disk_tokens) == (40, 40)
    assert runner.batches[0] == [("again", 40, 1)]
    assert outputs[0].token_ids + run_to_end(engine).get("again", []) == first
    assert (engine.stats().reused_tokens, engine.stats().disk_tokens) == (40, 40)
    assert engine.stats().prompt_tokens == 1
    engine.close()


def test_a_hole_in_the_chain_is_computed(tmp_path: Path) -> None:
    engine, _ = make_engine(num_blocks=16, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "first", PROMPT, max_tokens=1)
    run_to_end(engine)
    engine.close()
    key, blocks = root_key(ROOT, b""), []
    for i in range(10):
        key = block_key(key, PROMPT[4 * i : 4 * i + 4])
        blocks.append(tmp_path / key.hex()[:2] / f"{key.hex()}.kv")
    data = bytearray(blocks[3].read_bytes())
    data[-20] ^= 1
    blocks[3].write_bytes(data)

    engine, runner = make_engine(num_blocks=16, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "again", PROMPT, max_tokens=1)
    assert run_to_end(engine)["again"] == oracle(PROMPT, 1, 64)
    assert runner.batches == [[("again", 12, 29)]]
    stats = engine.stats()
    assert (stats.disk_tokens, stats.disk.hits, stats.disk.corrupt) == (12, 3, 1)
    engine.close()  # the recomputed block is written again
    assert blocks[3].exists()


def test_decodes_go_on_while_another_request_is_restored(tmp_path: Path) -> None:
    long = [i % 6 for i in range(121)]
    engine, _ = make_engine(num_blocks=64, max_num_batched_tokens=256, disk=disk_tier(tmp_path))
    submit(engine, "long", long, max_tokens=1)
    run_to_end(engine)
    engine.close()

    engine, runner = make_engine(
        num_blocks=64, max_num_batched_tokens=256, disk=disk_tier(tmp_path)
    )
    prompts = ([a, b, c] for a in range(6) for b in range(6) for c in range(6))
    prompt = next(p for p in prompts if len(oracle(p, 20, 256)) == 20)
    submit(engine, "short", prompt, max_tokens=20)
    engine.step()
    submit(engine, "long", long, max_tokens=1)
    assert run_to_end(engine)["long"] == oracle(long, 1, 256)
    restored_in = next(i for i, b in enumerate(runner.batches) if any(r == "long" for r, *_ in b))
    assert restored_in == 15  # 30 blocks, two a step by the simulation's clock
    assert all(batch[0][0] == "short" for batch in runner.batches[: restored_in + 1])
    assert runner.batches[restored_in][1] == ("long", 120, 1)
    engine.close()


def test_what_the_pool_gives_up_comes_back_from_the_disk(tmp_path: Path) -> None:
    """Four times as many tokens as the pool holds, each prompt asked for twice."""
    engine, _ = make_engine(num_blocks=12, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    prompts = [[(i * n + n) % 6 for i in range(40)] for n in range(1, 6)]
    for round_number in range(2):
        for n, prompt in enumerate(prompts):
            submit(engine, f"{round_number}-{n}", prompt, max_tokens=3)
            assert run_to_end(engine)[f"{round_number}-{n}"] == oracle(prompt, 3, 48)
    stats = engine.stats()
    assert stats.disk_tokens == 5 * 36
    assert stats.prompt_tokens == 5 * 40 + 5 * 4
    assert stats.disk.dropped == 0
    engine.close()


# ------------------------------------------------------------------------- behind the real one


@pytest.mark.parametrize("ops", ["native", "reference"])
def test_a_restored_block_is_bit_for_bit_a_computed_one(tmp_path: Path, ops: str) -> None:
    if ops == "native" and shutil.which("g++") is None:
        pytest.skip("the kernels need a compiler")
    model = make_tiny("llama", tmp_path / "model", max_position_embeddings=512)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, top_logprobs=5)
    prompt = [i * 7 % 500 for i in range(201)]
    engine, info = load(model, ops=ops, disk=tmp_path / "kv")
    assert info.reproducible == (ops == "native")
    cold = run_one(engine, prompt, params)
    assert cold.num_disk_tokens == 0
    engine.close(10)
    engine, _ = load(model, ops=ops, disk=tmp_path / "kv")
    warm = run_one(engine, prompt, params)
    engine.close()
    assert (warm.num_reused_tokens, warm.num_disk_tokens) == (192, 192)
    assert warm.token_ids == cold.token_ids
    if info.reproducible:
        assert warm.logprobs == cold.logprobs


@pytest.mark.parametrize("length", [15, 16, 17, 47, 48, 49])
@pytest.mark.parametrize("ops", ["native", "reference"])
def test_wherever_the_blocks_of_a_prompt_are_its_answer_is_the_same(
    tmp_path: Path, ops: str, length: int
) -> None:
    """Lengths around the end of a block of 16."""
    if ops == "native" and shutil.which("g++") is None:
        pytest.skip("the kernels need a compiler")
    model = make_tiny("llama", tmp_path / "model")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = make_tokens(length, seed=length)
    full = (length - 1) // 16 * 16

    def ask() -> tuple[list[int], int, int]:
        answer = run_one(engine, prompt, params)
        return answer.token_ids, answer.num_reused_tokens, answer.num_disk_tokens

    engine, _ = load(model, ops=ops, disk=tmp_path / "kv")
    tokens, *found = ask()
    assert found == [0, 0]
    assert ask() == (tokens, full, 0)
    while engine.write_behind() is not None:
        pass
    pool = engine.scheduler.pool
    pool.make_free(pool.num_blocks)
    assert ask() == (tokens, full, full)
    engine.close()
    engine, _ = load(model, ops=ops, disk=tmp_path / "kv")
    assert ask() == (tokens, full, full)
    assert ask() == (tokens, full, 0)
    engine.close()
