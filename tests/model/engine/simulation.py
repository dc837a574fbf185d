"""A model without tensors, for tests of scheduling: its KV is a hash of everything before a token.

The runner writes a cell for each token it computes and reads the cells of all tokens before it, and
it raises if any of them is not what that prefix must have left there. So a block that was freed too
early, written twice, found under a wrong key or evicted while in use does not go unseen. Nor does
one that comes back from the disk as something else.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.engine.backing import Backing
from model.engine.block_file import BlockFormat
from model.engine.engine import Engine
from model.engine.messages import RequestError, StepOutputs, Submit, TokenLogprob
from model.engine.request import SamplingParams
from model.engine.scheduler import ScheduledBatch, Scheduler
from model.engine.tiers import DiskTier

ROOT = bytes(range(32))
VOCAB = 7
END = 6


def chain(state: int, token_id: int, salt: int = 0) -> int:
    return hash((state, token_id, salt))


def oracle(prompt: list[int], max_tokens: int, max_model_len: int) -> list[int]:
    """What the simulated model generates, computed without blocks, batches or caches."""
    state = 0
    for token_id in prompt:
        state = chain(state, token_id)
    output: list[int] = []
    while len(output) < max_tokens and len(prompt) + len(output) < max_model_len:
        token_id = state % VOCAB
        output.append(token_id)
        if token_id == END:
            break
        state = chain(state, token_id)
    return output


@dataclass
class Drawn:
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass
class Result:
    drawn: dict[str, Drawn | RequestError] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)


class SimulatedRunner:
    """`batches` keeps the plan of each step as (request id, start, num_tokens)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cells: list[int | None] = [None] * (num_blocks * block_size)
        self.batches: list[list[tuple[str, int, int]]] = []
        self.fail: dict[str, RequestError] = {}

    def run(self, batch: ScheduledBatch) -> Result:
        result = Result()
        self.batches.append([(s.request.id, s.start, s.num_tokens) for s in batch.sequences])
        writes: dict[int, tuple[str, int]] = {}
        states: dict[str, int] = {}
        for s in batch.sequences:
            state = self._state_before(s.request.token_ids, s.start)
            for position in range(s.start, s.start + s.num_tokens):
                state = chain(state, s.request.token_ids[position])
                cell = self._cell(s.request.block_table, position)
                if cell in writes:
                    raise AssertionError(f"cell {cell} has two writers in one step")
                writes[cell] = (s.request.id, state)
            states[s.request.id] = state
        for cell, (_, state) in writes.items():
            self.cells[cell] = state
        for s in batch.sequences:
            self._check_reads(s.request.token_ids, s.request.block_table, s.start + s.num_tokens)
            if s.samples:
                failure = self.fail.pop(s.request.id, None)
                token = Drawn(states[s.request.id] % VOCAB)
                result.drawn[s.request.id] = failure or token
        return result

    def copy_out(self, block_ids: Sequence[int]) -> list[bytes]:
        """The cells of each block, as `KVCache.copy_out` gives them. Only full blocks are asked
        for, and every cell of those was written."""
        size = self.block_size
        return [struct.pack(f"<{size}q", *self.cells[b * size : (b + 1) * size]) for b in block_ids]

    def copy_in(self, block_id: int, data: bytes | bytearray | memoryview) -> None:
        size = self.block_size
        self.cells[block_id * size : (block_id + 1) * size] = struct.unpack(f"<{size}q", data)

    def _state_before(self, token_ids: list[int], position: int) -> int:
        state = 0
        for token_id in token_ids[:position]:
            state = chain(state, token_id)
        return state

    def _cell(self, block_table: list[int], position: int) -> int:
        return block_table[position // self.block_size] * self.block_size + (
            position % self.block_size
        )

    def _check_reads(self, token_ids: list[int], block_table: list[int], end: int) -> None:
        state = 0
        for position in range(end):
            state = chain(state, token_ids[position])
            if self.cells[self._cell(block_table, position)] != state:
                raise AssertionError(f"the KV of position {position} is not that of its prefix")


class StepClock:
    """Seconds that pass when somebody looks: a step restores two blocks beside decodes."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        self._seconds += 0.006
        return self._seconds


class SteadyTier(DiskTier):
    """A disk tier that waits for its writer, so that a run depends on its requests alone."""

    def write(
        self, key: bytes, parent: bytes, token_ids: Sequence[int], payload: bytes, used_ns: int
    ) -> bool:
        queued = super().write(key, parent, token_ids, payload, used_ns)
        assert self.flush(10)
        return queued


def disk_tier(folder: Path, block_size: int = 4, budget_blocks: int = 1000) -> DiskTier:
    """A disk tier for simulated blocks."""
    size = BlockFormat(ROOT, "cells", block_size, 8 * block_size).file_bytes
    return SteadyTier(
        folder,
        root=ROOT,
        layout="cells",
        block_size=block_size,
        block_bytes=8 * block_size,
        budget_bytes=budget_blocks * size,
        lock_seconds=0,
    )


class WatchedEngine(Engine):
    """Raises when requests wait and none runs in more than three steps on end."""

    _num_idle_steps = 0

    def step(self, drain: Callable[[], None] = lambda: None) -> StepOutputs:
        num_steps = self._steps  # those in which somebody ran, maybe to its end
        outputs = super().step(drain)
        stats = outputs.stats
        idle = stats.num_waiting > 0 and stats.num_running == 0 and stats.steps == num_steps
        self._num_idle_steps = self._num_idle_steps + 1 if idle else 0
        assert self._num_idle_steps <= 3, f"{stats.num_waiting} requests wait, and none runs"
        return outputs


def make_engine(
    *,
    num_blocks: int = 8,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int | None = None,
    disk: DiskTier | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Engine, SimulatedRunner]:
    runner = SimulatedRunner(num_blocks, block_size)
    backing = None if disk is None else Backing(runner, disk)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len or num_blocks * block_size,
        end_token_ids=(END,),
        backing=backing,
        clock=StepClock(),
    )
    engine = WatchedEngine(
        scheduler,
        runner,
        vocab_size=VOCAB,
        static_root=ROOT,
        backing=backing,
        check_accounting=True,
        clock=clock,
    )
    return engine, runner


def submit(
    engine: Engine, request_id: str, prompt: list[int], max_tokens: int = 8, salt: bytes = b""
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    engine.submit(Submit(request_id, prompt, params, salt=salt))


def run_to_end(engine: Engine, max_steps: int = 10_000) -> dict[str, list[int]]:
    """Step until nothing is left. Returns the tokens of each request that was heard of."""
    tokens: dict[str, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return tokens
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError(f"work is left after {max_steps} steps: something starves")
