"""Random admits, steps, aborts, forks and evictions on pool, index and scheduler together; without
and with a disk tier whose files are spoilt, and whose engine is restarted."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model.engine.messages import CacheQuery
from model.engine.tiers import DiskTier
from tests.model.engine.simulation import disk_tier, make_engine, oracle, run_to_end, submit

NUM_BLOCKS = 12
BLOCK_SIZE = 3
LIMIT = NUM_BLOCKS * BLOCK_SIZE

# 100 runs of 100 steps: 10,000 steps.
STEPS = settings(max_examples=100, stateful_step_count=100, deadline=None)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine, self.runner = make_engine(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=5, max_num_batched_tokens=9
        )
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.aborted: set[str] = set()

    def _admit(self, prompt: list[int], max_tokens: int) -> None:
        request_id = f"r{len(self.prompts)}"
        self.prompts[request_id] = prompt
        self.tokens[request_id] = []
        submit(self.engine, request_id, prompt, max_tokens)

    def _live(self) -> list[str]:
        return [i for i in self.prompts if i in self.engine.scheduler]

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20), more=st.integers(1, 12))
    def admit(self, prompt: list[int], more: int) -> None:
        self._admit(prompt, more)

    @rule(data=st.data(), extra=st.lists(st.integers(0, 2), max_size=3))
    def fork(self, data: st.DataObject, extra: list[int]) -> None:
        """A new request that shares a prefix of what another one said so far."""
        if self.prompts:
            parent = data.draw(st.sampled_from(sorted(self.prompts)))
            known = self.prompts[parent] + self.tokens[parent]
            cut = data.draw(st.integers(1, len(known)))
            prompt = (known[:cut] + extra)[: LIMIT - 2]
            self._admit(prompt, 4)

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.engine.has_work:
                self._hear(self.engine.step().outputs)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if live := self._live():
            victim = data.draw(st.sampled_from(live))
            self.aborted.add(victim)
            self.engine.abort([victim])

    @rule(data=st.data())
    def abort_within_a_step(self, data: st.DataObject) -> None:
        if live := self._live():
            victim = data.draw(st.sampled_from(live))
            self.aborted.add(victim)
            self._hear(self.engine.step(lambda: self.engine.abort([victim])).outputs)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """Some blocks of what somebody said so far; requests that have them go on."""
        if self.prompts:
            request_id = data.draw(st.sampled_from(sorted(self.prompts)))
            known = self.prompts[request_id] + self.tokens[request_id]
            blocks = self.engine.cache_report(CacheQuery(1, known)).blocks
            assert len(blocks) == len(known) // BLOCK_SIZE
            if blocks:
                keys = [b.key for b in data.draw(st.lists(st.sampled_from(blocks), max_size=6))]
                assert self.engine.forget(keys).keys == keys
                self._check_forgotten(known, keys)

    def _check_forgotten(self, known: list[int], keys: list[bytes]) -> None:
        for block in self.engine.cache_report(CacheQuery(2, known)).blocks:
            if block.key in keys:
                assert not block.device and not block.disk

    @rule()
    def evict_everything_that_is_cached(self) -> None:
        pool = self.engine.scheduler.pool
        taken = [pool.allocate() for _ in range(pool.num_available)]
        assert pool.allocate() is None
        for block in taken:
            assert block is not None
            pool.release(block, keep=False)

    def _hear(self, outputs: list) -> None:  # type: ignore[type-arg]
        for output in outputs:
            assert output.request_id not in self.aborted, "an aborted request spoke"
            self.tokens[output.request_id] += output.token_ids

    @invariant()
    def accounting_is_exact(self) -> None:
        self.engine.scheduler.check()

    def teardown(self) -> None:
        for request_id, tokens in run_to_end(self.engine, max_steps=2000).items():
            self.tokens[request_id] += tokens
        pool = self.engine.scheduler.pool
        assert pool.num_free + pool.num_cached == NUM_BLOCKS
        for request_id, prompt in self.prompts.items():
            answer = oracle(prompt, 12, LIMIT)
            said = self.tokens[request_id]
            assert said == answer[: len(said)]


class DiskMachine(EngineMachine):
    """The same with a disk tier that holds little more than the pool."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        super().__init__()
        self._start()

    def _check_forgotten(self, known: list[int], keys: list[bytes]) -> None:
        super()._check_forgotten(known, keys)
        there = {path.stem for path in self.folder.glob("??/*.kv")}
        assert not there & {key.hex() for key in keys}

    def _start(self) -> None:
        self.disk: DiskTier = disk_tier(self.folder, BLOCK_SIZE, budget_blocks=20)
        self.engine, self.runner = make_engine(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=5,
            max_num_batched_tokens=9,
            disk=self.disk,
        )

    @rule(place=st.integers(0, 255), bit=st.integers(0, 7), step=st.integers(1, 3))
    def flip_bits(self, place: int, bit: int, step: int) -> None:
        """One bit in all files, or in every second or third of them; often in the payload."""
        for file in sorted(self.folder.glob("??/*.kv"))[::step]:
            content = bytearray(file.read_bytes())
            content[-1 - place % len(content)] ^= 1 << bit
            file.write_bytes(content)

    @rule(data=st.data(), more=st.integers(1, 4))
    def ask_again_after_a_restart(self, data: st.DataObject, more: int) -> None:
        if self.prompts:
            self.restart()
            earlier = data.draw(st.sampled_from(sorted(self.prompts)))
            self._admit((self.prompts[earlier] + self.tokens[earlier])[: LIMIT - 4], more)

    @rule()
    def restart(self) -> None:
        """Everything that is running ends; what is on disk is there for the next engine."""
        self.aborted.update(self._live())
        self.engine.close()
        self._start()

    def teardown(self) -> None:
        try:
            super().teardown()
            stats = self.disk.stats()
            assert stats.errors == stats.dropped == 0
            assert stats.num_bytes <= self.disk.budget_bytes
        finally:
            self.engine.close()
            shutil.rmtree(self.folder)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = STEPS
TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = STEPS
