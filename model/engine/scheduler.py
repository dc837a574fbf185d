"""Scheduler: who runs in this step, and on which blocks.

There are no phases. A request has `token_ids` and `num_computed_tokens`; every step it is given
tokens so that the second catches up with the length of the first, and it draws a token in the step
in which they meet. Prefill, a chunk of it, decoding, resuming and recomputing after a preemption
are all this one rule.

Order within a step: requests that decode, then running prefills, then waiting requests, oldest
first, under a budget of tokens. When no block is left the youngest running request is preempted:
its blocks go back to the pool (most of them stay cached) and it waits at the head of the queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from model.engine.blocks import BlockPool
from model.engine.messages import BlockState
from model.engine.prefix import Entry, Key, PrefixIndex
from model.engine.request import FinishReason, Request

# How long a step may read blocks from a slower tier, beside decodes and alone.
RESTORE_SECONDS_BESIDE_DECODES, RESTORE_SECONDS = 0.010, 0.050


class SlowerTier(Protocol):
    """Where full blocks go when the pool gives them up, and come back from (`Backing`)."""

    @property
    def num_corrupt(self) -> int: ...

    @property
    def room(self) -> int: ...

    def has(self, key: Key) -> bool: ...

    def missed(self) -> None: ...

    def restore(self, block: int, key: Key, parent: Key, token_ids: Sequence[int]) -> bool: ...

    def finished(self, blocks: Sequence[tuple[int, Entry]]) -> None: ...

    def evicted(self, block: int, entry: Entry) -> None: ...

    def forget(self, keys: Sequence[Key]) -> list[Key]: ...


@dataclass(slots=True)
class ScheduledSequence:
    """`num_tokens` tokens of one request from `start` on; `samples` when they reach its end."""

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class ScheduledBatch:
    """The plan of one step. Sequences with a single token come first."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    num_tokens: int = 0
    num_decodes: int = 0
    stopped: list[Request] = field(default_factory=list)  # the pool cannot hold one more token


@dataclass(slots=True)
class Update:
    """What a step did to one request."""

    request: Request
    token_id: int | None
    finish_reason: FinishReason | None


class Scheduler:
    """Queues of requests over a block pool. `max_num_seqs` requests run at a time, with at most
    `max_num_batched_tokens` tokens a step; `prefill_tokens_beside_decodes` bounds the prefill's
    share while anything decodes (the engine sets it from its clock). A request goes on from the
    blocks it finds in the pool to those in `backing`: these are read as if they were computed, for
    a while a step by `clock`, in seconds."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        end_token_ids: tuple[int, ...] = (),
        backing: SlowerTier | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({max_num_seqs}), so that every running request can decode"
            )
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.prefill_tokens_beside_decodes = max_num_batched_tokens
        self.num_preemptions = 0
        self.index = PrefixIndex(block_size)
        self.pool = BlockPool(num_blocks, on_evict=self._evicted)
        self._backing = backing
        self._clock = clock
        self._restore_until: float | None = None  # within this step; None before its first read
        self._restore_seconds = RESTORE_SECONDS
        self._end_token_ids = frozenset(end_token_ids)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first
        self._requests: dict[str, Request] = {}
        self._arrivals = 0

    # ------------------------------------------------------------------------------ the queue

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens and one more could run alone in the pool."""
        return -(-(num_tokens + 1) // self.block_size) <= self.pool.num_blocks

    def positions(self) -> dict[str, int]:
        """How many requests are before each of those that wait and never ran."""
        return {r.id: i for i, r in enumerate(self._waiting) if r.num_reused_tokens < 0}

    def block_states(self, root: Key, token_ids: Sequence[int]) -> list[BlockState]:
        """Where each full block of a sequence is."""
        size = self.block_size
        keys: list[Key] = []
        self.index.extend_keys(keys, root, token_ids, len(token_ids) // size)
        return [
            BlockState(
                key,
                device=self.index.find(key, token_ids[i * size : (i + 1) * size]) is not None,
                disk=self._backing is not None and self._backing.has(key),
            )
            for i, key in enumerate(keys)
        ]

    def forget(self, keys: Sequence[Key]) -> list[Key]:
        """Nobody finds these blocks any more, in no tier; one that a request has now is free when
        that request ends. Returns the keys of which nothing is left."""
        for key in keys:
            block = self.index.forget(key)
            if block is not None:
                self.pool.discard(block)
        return list(keys) if self._backing is None else self._backing.forget(keys)

    def ended(self, request: Request) -> FinishReason | None:
        """Why a resumed request has nothing more to say; None when it has."""
        if not request.output_token_ids:
            return None
        return self._finish_reason(request, request.output_token_ids[-1])

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id that is there already."""
        if request.id in self._requests:
            raise ValueError(f"request {request.id} is in the engine already")
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        self._waiting.append(request)

    def finish(self, request_id: str) -> Request | None:
        """Take a request out, wherever it is; its blocks are back at once. None if unknown."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request in self._running:
            self._running.remove(request)
            if self._backing is not None:
                full = request.block_table[: request.num_indexed_blocks]
                self._backing.finished([(b, self.index.entry(b)) for b in full if b in self.index])
            self._release(request)
        else:
            self._waiting.remove(request)
        return request

    # ------------------------------------------------------------------------------- one step

    def schedule(self) -> ScheduledBatch:
        """Plan a step. Blocks for all scheduled tokens are in the block tables afterwards."""
        plan: dict[str, ScheduledSequence] = {}
        batch = ScheduledBatch()
        budget = self.max_num_batched_tokens

        # The two loops over those that run may preempt, which only shortens the list at its end.
        for request in self._running:
            if request.num_uncomputed_tokens == 1 and self._grow(request, 1, plan, batch):
                plan[request.id] = ScheduledSequence(
                    request, request.num_computed_tokens, 1, samples=True
                )
        budget -= len(plan)
        if plan:
            budget = min(budget, self.prefill_tokens_beside_decodes)
        self._restore_until = None
        self._restore_seconds = RESTORE_SECONDS_BESIDE_DECODES if plan else RESTORE_SECONDS

        for request in self._running:
            if budget <= 0:
                break
            if request.num_uncomputed_tokens > 1:
                budget -= self._schedule_prefill(request, budget, plan, batch)

        if not batch.stopped:
            for request in list(self._waiting):
                if budget <= 0 or len(self._running) >= self.max_num_seqs:
                    break
                if self._waits_for_another(request):
                    continue
                if self._cannot_fit_yet(request):
                    break
                blocks = self._match(request)
                if self._waits_for_another(request):
                    continue
                if not self._admit(request, blocks):
                    break
                budget -= self._schedule_prefill(request, budget, plan, batch)

        singles = [s for s in plan.values() if s.num_tokens == 1]
        batch.sequences = singles + [s for s in plan.values() if s.num_tokens > 1]
        batch.num_decodes = len(singles)
        batch.num_tokens = sum(s.num_tokens for s in batch.sequences)
        return batch

    def update(self, batch: ScheduledBatch, drawn: dict[str, int]) -> list[Update]:
        """Apply a step: file full blocks, append drawn tokens, take out what is finished.

        `drawn` has the token of each sequence that sampled and did not fail. Requests that were
        aborted since `schedule` are passed over: they are gone, and so are their blocks."""
        updates: list[Update] = []
        for sequence in batch.sequences:
            request = sequence.request
            if self._requests.get(request.id) is not request:
                continue
            request.num_computed_tokens = sequence.start + sequence.num_tokens
            self._index_full_blocks(request)
            token_id = drawn.get(request.id) if sequence.samples else None
            reason: FinishReason | None = None
            if token_id is not None:
                request.append(token_id)
                reason = self._finish_reason(request, token_id)
                if reason is not None:
                    self.finish(request.id)
            updates.append(Update(request, token_id, reason))
        stopped = [r for r in batch.stopped if self.finish(r.id) is not None]
        return updates + [Update(request, None, "length") for request in stopped]

    def check(self) -> None:
        """Raise AssertionError unless block tables and reference counts agree exactly."""
        self.pool.check()
        self.index.check()
        counts = [0] * self.pool.num_blocks
        for request in self._running:
            for block in request.block_table:
                counts[block] += 1
        for request in self._waiting:
            if request.block_table:
                raise AssertionError(f"{request.id} waits and holds blocks")
        for block, count in enumerate(counts):
            if self.pool.references(block) != count:
                raise AssertionError(
                    f"block {block} has {self.pool.references(block)} references, "
                    f"{count} block tables name it"
                )

    # -------------------------------------------------------------------------------- details

    def _schedule_prefill(
        self,
        request: Request,
        budget: int,
        plan: dict[str, ScheduledSequence],
        batch: ScheduledBatch,
    ) -> int:
        self._make_room(request)
        if not self._restore(request):
            return 0
        if request.num_reused_tokens < 0:
            request.num_reused_tokens = request.num_computed_tokens
        num_tokens = min(request.num_uncomputed_tokens, budget)
        if not self._grow(request, num_tokens, plan, batch):
            return 0
        samples = num_tokens == request.num_uncomputed_tokens
        plan[request.id] = ScheduledSequence(
            request, request.num_computed_tokens, num_tokens, samples
        )
        return num_tokens

    def _match(self, request: Request) -> list[int]:
        """The blocks of its cached prefix; `waiting_for` is the key of the one after them."""
        limit = self._match_limit(request)
        self.index.extend_keys(request.block_keys, request.root, request.token_ids, limit)
        blocks = self.index.match(request.block_keys, request.token_ids, limit)
        request.waiting_for = request.block_keys[len(blocks)] if len(blocks) < limit else None
        return blocks

    def _waits_for_another(self, request: Request) -> bool:
        """Whether the first block that it did not find is being computed by another request."""
        key = request.waiting_for
        return key is not None and self.index.is_pending(key, request.id)

    def _cannot_fit_yet(self, request: Request) -> bool:
        """Whether `_admit` refused it, and would again. It would share the blocks of its prefix
        that others have, and take the rest from those that are available. Both together become
        more only when a block is released, or one is filed that continues its prefix: one that
        somebody takes to share it is no longer available."""
        if self.pool.num_releases >= request.retry_at:
            return False
        return request.waiting_for is None or not self.index.has(request.waiting_for)

    def _match_limit(self, request: Request) -> int:
        """Blocks that may be hit: at least one token is always computed, to have its logits."""
        if request.params.prompt_logprobs:
            return 0
        return (len(request.token_ids) - 1) // self.block_size

    def _admit(self, request: Request, blocks: list[int]) -> bool:
        """Move a waiting request to the running ones, with the blocks of its cached prefix; False
        when the pool has no room for its whole sequence now."""
        num_needed = -(-(len(request.token_ids) + 1) // self.block_size)
        num_shared = sum(1 for block in blocks if self.pool.references(block))
        num_lacking = num_needed - num_shared - self.pool.num_available
        if num_lacking > 0:
            request.retry_at = self.pool.num_releases + num_lacking
            return False
        for block in blocks:
            self.pool.acquire(block)
        request.waiting_for = None
        request.block_table = blocks
        request.num_indexed_blocks = len(blocks)
        request.num_computed_tokens = len(blocks) * self.block_size
        request.num_found_tokens = request.num_computed_tokens
        if request.num_reused_tokens < 0:
            request.num_disk_tokens = 0  # those that it found before a preemption are in the pool
        self.index.announce(request.block_keys[len(blocks) :], request.id)
        self._waiting.remove(request)
        self._running.append(request)
        self._running.sort(key=lambda r: r.arrival)
        return True

    def _make_room(self, request: Request) -> None:
        """Evict at once for a sequence as it is and one token more, or what the slower tier can
        take now: of many blocks, more lie beside each other."""
        num_blocks = -(-(len(request.token_ids) + 1) // self.block_size) - len(request.block_table)
        if self._backing is not None:
            num_blocks = min(num_blocks, self.pool.num_free + self._backing.room)
        self.pool.make_free(num_blocks)

    def _restore(self, request: Request) -> bool:
        """Go on to what the slower tier has, as long as nothing was computed since the request was
        admitted. False when this step's time for it is over: the rest is for the next one."""
        if self._backing is None or request.num_computed_tokens != request.num_found_tokens:
            return True
        size, limit = self.block_size, self._match_limit(request)
        for i in range(request.num_computed_tokens // size, limit):
            key, token_ids = request.block_keys[i], request.token_ids[i * size : (i + 1) * size]
            block = self.index.find(key, token_ids)
            if block is not None:
                self.pool.acquire(block)
            else:
                if not self._backing.has(key):
                    self._backing.missed()
                    return True
                now = self._clock()
                if self._restore_until is None:
                    self._restore_until = now + self._restore_seconds
                elif now > self._restore_until:
                    return False
                block = self.pool.allocate(request.last_block)
                if block is None:
                    return True  # `_grow` says who has to go
                parent = request.block_keys[i - 1] if i else request.root
                num_corrupt = self._backing.num_corrupt
                if not self._backing.restore(block, key, parent, token_ids):
                    request.num_corrupt_blocks += self._backing.num_corrupt - num_corrupt
                    self.pool.release(block, keep=False)
                    return True
                self.index.insert(key, parent, token_ids, block)
                if request.num_reused_tokens < 0:
                    request.num_disk_tokens += size
            request.block_table.append(block)
            request.num_indexed_blocks = i + 1
            request.num_computed_tokens = request.num_found_tokens = (i + 1) * size
        return True

    def _evicted(self, block: int) -> None:
        entry = self.index.remove(block)
        if self._backing is not None:
            self._backing.evicted(block, entry)

    def _grow(
        self,
        request: Request,
        num_tokens: int,
        plan: dict[str, ScheduledSequence],
        batch: ScheduledBatch,
    ) -> bool:
        """Blocks for `num_tokens` more tokens, preempting the youngest while none is left. False
        when the request itself had to go."""
        needed = -(-(request.num_computed_tokens + num_tokens) // self.block_size)
        num_kept = len(request.block_table)
        while len(request.block_table) < needed:
            block = self.pool.allocate(request.last_block)
            if block is not None:
                request.block_table.append(block)
                continue
            if self._running == [request]:
                batch.stopped.append(request)
                return False
            youngest = self._preempt()
            plan.pop(youngest.id, None)
            if youngest is request:
                return False
        if needed > num_kept + 1:  # memory is best read forwards
            request.block_table[num_kept:] = sorted(request.block_table[num_kept:])
        return True

    def _preempt(self) -> Request:
        """Send the youngest running request back to the queue."""
        request = self._running.pop()
        self._release(request)
        request.num_preempted_blocks = len(request.known_keys)
        request.num_computed_tokens = 0
        request.num_indexed_blocks = 0
        self._waiting.appendleft(request)
        self.num_preemptions += 1
        return request

    def _release(self, request: Request) -> None:
        self.index.withdraw(request.block_keys[request.num_indexed_blocks :], request.id)
        for block in reversed(request.block_table):
            self.pool.release(block, keep=block in self.index)
        request.block_table = []

    def _index_full_blocks(self, request: Request) -> None:
        size = self.block_size
        num_full = request.num_computed_tokens // size
        if num_full <= request.num_indexed_blocks:
            return
        self.index.extend_keys(request.block_keys, request.root, request.token_ids, num_full)
        for i in range(request.num_indexed_blocks, num_full):
            mine = request.block_table[i]
            there = self.index.insert(
                request.block_keys[i],
                request.block_keys[i - 1] if i else request.root,
                request.token_ids[i * size : (i + 1) * size],
                mine,
            )
            if there != mine:  # an equal block was computed meanwhile: keep one of the two
                self.pool.acquire(there)
                self.pool.release(mine, keep=False)
                request.block_table[i] = there
        request.num_indexed_blocks = num_full

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in params.stop_token_ids or (
            token_id in self._end_token_ids
            and (not params.ignore_eos or params.grammar is not None)
        ):
            return "stop"
        if (
            len(request.output_token_ids) >= params.max_tokens
            or len(request.token_ids) >= self.max_model_len
        ):
            return "length"
        return None
