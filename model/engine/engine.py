"""Engine: the loop's body. `step()` is schedule, run, update.

The engine knows tokens and blocks, not tensors and not text. Whatever goes wrong with one request
is that request's error; an exception in the forward pass is fatal and leaves `step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from model.engine.backing import Backing
from model.engine.grammars import Grammars
from model.engine.inspections import Inspections
from model.engine.messages import (
    CacheQuery,
    CacheReport,
    DiskStats,
    EngineStats,
    Forgotten,
    Inspected,
    RequestError,
    StepOutputs,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from model.engine.prefill_clock import PrefillClock
from model.engine.prefix import Key, root_key
from model.engine.refusal import grammar_refused, refusal
from model.engine.request import FinishReason, Request
from model.engine.scheduler import ScheduledBatch, Scheduler, Update
from model.grammar import GrammarError

QUEUE_SECONDS = 0.25  # between two reports of who stands where in the queue


class Drawn(Protocol):
    """A drawn token, as the runner gives it."""

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> TokenLogprob | None: ...


class StepResult(Protocol):
    """What a run of the model gives back: per request id a drawn token or its error, and the
    log-probabilities of prompt tokens where they were asked for."""

    @property
    def drawn(self) -> Mapping[str, Drawn | RequestError]: ...

    @property
    def prompt_logprobs(self) -> Mapping[str, list[TokenLogprob]]: ...


class Runner(Protocol):
    """Plan in, tokens out."""

    def run(self, batch: ScheduledBatch) -> StepResult: ...


class Engine:
    """Requests in, `StepOutputs` out. `static_root` is the hash of everything but the tenant that
    could change a bit of the KV; `backing` is the tier behind the scheduler's pool; without
    `grammars` none is taken, without `inspections` nobody looks; `clock` gives seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        vocab_size: int,
        static_root: Key,
        epoch: int = 0,
        backing: Backing | None = None,
        grammars: Grammars | None = None,
        inspections: Inspections | None = None,
        check_accounting: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.epoch = epoch
        self._runner = runner
        self._vocab_size = vocab_size
        self._static_root = static_root
        self._backing = backing
        self.grammars = grammars
        self.inspections = inspections
        self._held: dict[str, Request] = {}  # until their grammars are compiled
        self._reported = DiskStats()
        self._check_accounting = check_accounting
        self._clock = clock
        self._prefill_clock = PrefillClock(scheduler.max_num_batched_tokens)
        self._unsent: list[TokenOutput] = []  # of requests that are not in the scheduler
        self._positions: dict[str, int] = {}  # in the queue, as told last
        self._positions_told = -math.inf
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._reused_tokens = 0
        self._disk_tokens = 0
        self._aborted = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._told_reuse: set[str] = set()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._unsent)

    @property
    def inspects(self) -> bool:
        """Whether somebody looks into the model."""
        return self.inspections is not None and self.inspections.has_work

    def inspect(self) -> Inspected | None:
        """A little of what looks into the model, if it is its turn: to be called after each step,
        and while there is nothing else to do."""
        if self.inspections is None:
            return None
        return self.inspections.advance(busy=self.scheduler.has_work)

    def submit(self, message: Submit) -> None:
        """Queue a request, or have its refusal in the next step's outputs. A resumed one whose
        tokens say that it is over ends there too, with the reason that it would have had. One
        whose grammar is not compiled yet is held back until it is."""
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            message.params,
            root_key(self._static_root, message.salt),
            message.output_token_ids,
            report_blocks=message.report_blocks,
        )
        ended = self.scheduler.ended(request)
        error = refusal(message, self.scheduler, self._vocab_size, ended=ended is not None)
        if error is not None:
            self._unsent.append(TokenOutput(request.id, finish_reason="error", error=error))
        elif ended is not None:
            blocks = self.scheduler.block_states(request.root, request.token_ids[:-1])
            self._say_last(request, ended, [block.key for block in blocks])
        elif message.params.grammar is not None:
            self._held[request.id] = request
            self.submit_compiled()
        else:
            self.scheduler.add(request)

    def submit_compiled(self) -> None:
        """Queue the requests that were held back and whose grammars are compiled now."""
        for request in list(self._held.values()):
            try:
                if self.grammars is None:
                    raise GrammarError("this engine has not the model's vocabulary")
                request.matcher = self.grammars.matcher(request.params)
            except GrammarError as error:
                del self._held[request.id]
                self._unsent.append(
                    TokenOutput(request.id, finish_reason="error", error=grammar_refused(error))
                )
                continue
            if request.matcher is not None:
                del self._held[request.id]
                self.scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """These requests are gone, and their blocks free, when this returns. Those that report
        their blocks do so in the next outputs."""
        for request_id in request_ids:
            request = self._held.pop(request_id, None) or self.scheduler.finish(request_id)
            if request is None:
                continue
            self._aborted += 1
            self._told_reuse.discard(request_id)
            if request.report_blocks:
                self._say_last(request, "abort", request.known_keys)

    def cache_report(self, query: CacheQuery) -> CacheReport:
        """Where the blocks of a sequence are now."""
        ids = query.token_ids
        if ids and not (0 <= min(ids) and max(ids) < self._vocab_size):
            return CacheReport(query.query_id, [])
        root = root_key(self._static_root, query.salt)
        return CacheReport(query.query_id, self.scheduler.block_states(root, ids))

    def forget(self, keys: list[bytes]) -> Forgotten:
        """Remove these blocks from all tiers."""
        return Forgotten(self.scheduler.forget(keys))

    def step(self, drain: Callable[[], None] = lambda: None) -> StepOutputs:
        """One step. `drain` is called between the forward pass and the update, so that an abort
        that came meanwhile takes effect in this step and the request emits nothing more."""
        outputs: list[TokenOutput] = []
        batch = self.scheduler.schedule()
        if batch.sequences or batch.stopped:
            started = self._clock()
            result = self._runner.run(batch) if batch.sequences else None
            seconds = self._clock() - started
            drain()
            outputs = self._update(batch, result)
            num_prefill_tokens = batch.num_tokens - batch.num_decodes
            self._prefill_clock.observe(batch.num_decodes, num_prefill_tokens, seconds)
            self.scheduler.prefill_tokens_beside_decodes = self._prefill_clock.chunk
            self._steps += 1
            self._step_seconds = seconds
        if self._backing is not None:
            self._backing.copy_some()
        if self._check_accounting:
            self.scheduler.check()
        outputs = self._take_unsent() + outputs + self._queue_news()
        return StepOutputs(self.epoch, outputs, self.stats())

    def idle_report(self) -> StepOutputs:
        """The state, and what aborts left to say: sent when there is nothing to do."""
        return StepOutputs(self.epoch, self._take_unsent(), self.stats())

    def write_behind(self) -> float | None:
        """Bring blocks to the disk while there is no work. Returns after how many seconds to call
        again, None when nothing is left to write."""
        return None if self._backing is None else self._backing.write_behind()

    @property
    def has_news(self) -> bool:
        """Whether the disk tier has changed since the last report."""
        return self._backing is not None and self._backing.stats() != self._reported

    def close(self, seconds: float = 1.0) -> None:
        """The end: blocks that are not on disk have that much time to get there."""
        if self._backing is not None:
            self._backing.close(seconds)

    def stats(self) -> EngineStats:
        """The state now; counters since the start."""
        pool = self.scheduler.pool
        if self._backing is not None:
            self._reported = self._backing.stats()
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting + len(self._held),
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            reused_tokens=self._reused_tokens,
            disk_tokens=self._disk_tokens,
            evicted_blocks=pool.num_evictions,
            preemptions=self.scheduler.num_preemptions,
            aborted=self._aborted,
            steps=self._steps,
            step_seconds=self._step_seconds,
            disk=self._reported,
        )

    # -------------------------------------------------------------------------------- details

    def _update(self, batch: ScheduledBatch, result: StepResult | None) -> list[TokenOutput]:
        drawn: dict[str, int] = {}
        failed: dict[str, RequestError] = {}
        if result is not None:
            for request_id, token in result.drawn.items():
                if isinstance(token, RequestError):
                    failed[request_id] = token
                else:
                    drawn[request_id] = token.token_id
        outputs = []
        for update in self.scheduler.update(batch, drawn):
            request_id = update.request.id
            output = self._output(update, result)
            if request_id in failed:
                self.scheduler.finish(request_id)
                output.finish_reason, output.error = "error", failed[request_id]
            if output.finish_reason is not None:
                self._told_reuse.discard(request_id)
                if update.request.report_blocks:
                    output.block_keys = update.request.known_keys
            outputs.append(output)
        return outputs

    def _say_last(self, request: Request, reason: FinishReason, keys: list[Key]) -> None:
        """The end of a request that no step ended."""
        output = TokenOutput(request.id, finish_reason=reason)
        if request.report_blocks:
            output.block_keys = keys
        self._unsent.append(output)

    def _take_unsent(self) -> list[TokenOutput]:
        unsent, self._unsent = self._unsent, []
        return unsent

    def _queue_news(self) -> list[TokenOutput]:
        """Positions in the queue that have changed, unless others were told a moment ago."""
        if not self.scheduler.num_waiting and not self._positions:
            return []
        now = self._clock()
        if now - self._positions_told < QUEUE_SECONDS:
            return []
        told, self._positions = self._positions, self.scheduler.positions()
        news = [
            TokenOutput(request_id, queue_position=position)
            for request_id, position in self._positions.items()
            if told.get(request_id) != position
        ]
        if news:
            self._positions_told = now
        return news

    def _output(self, update: Update, result: StepResult | None) -> TokenOutput:
        request = update.request
        output = TokenOutput(request.id, finish_reason=update.finish_reason)
        if request.id not in self._told_reuse:
            self._told_reuse.add(request.id)
            output.num_reused_tokens = request.num_reused_tokens
            output.num_disk_tokens = request.num_disk_tokens
            output.num_corrupt_blocks = request.num_corrupt_blocks
            self._disk_tokens += request.num_disk_tokens
            self._reused_tokens += request.num_reused_tokens
            self._prompt_tokens += request.num_given_tokens - request.num_reused_tokens
        if update.token_id is not None:
            output.token_ids = [update.token_id]
            self._generated_tokens += 1
        elif update.finish_reason is None:
            output.prefill = (request.num_computed_tokens, len(request.token_ids))
        if result is not None:
            token = result.drawn.get(request.id)
            if update.token_id is not None and token is not None:
                logprob = None if isinstance(token, RequestError) else token.logprob
                output.logprobs = [] if logprob is None else [logprob]
            output.prompt_logprobs = result.prompt_logprobs.get(request.id, [])
        return output
