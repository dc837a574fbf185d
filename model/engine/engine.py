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
from model.engine.messages import (
    DiskStats,
    EngineStats,
    RequestError,
    StepOutputs,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from model.engine.prefix import Key, root_key
from model.engine.request import Request
from model.engine.scheduler import ScheduledBatch, Scheduler, Update

# While anything decodes, a step with a prefill chunk in it should take no longer than this.
STEP_SECONDS_BESIDE_DECODES = 0.050
MIN_PREFILL_CHUNK = 16


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


class PrefillClock:
    """How many prefill tokens fit in a step beside decodes, learned from finished steps.

    A step costs what its decodes cost (their weights are read anyway) plus a time per prefill
    token; both are moving averages, so the chunk shrinks as attention gets deeper."""

    def __init__(self, max_tokens: int, target_seconds: float = STEP_SECONDS_BESIDE_DECODES):
        self._max_tokens = max_tokens
        self._target = target_seconds
        self._decode_seconds = 0.0
        self._token_seconds = 0.0

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """One finished step."""
        if num_prefill_tokens == 0:
            if num_decodes:
                self._decode_seconds = self._blend(self._decode_seconds, seconds)
            return
        if num_prefill_tokens < MIN_PREFILL_CHUNK:
            return
        rest = seconds - (self._decode_seconds if num_decodes else 0.0)
        self._token_seconds = self._blend(self._token_seconds, max(rest, 0.0) / num_prefill_tokens)

    @property
    def chunk(self) -> int:
        """Tokens of prefill to schedule beside decodes."""
        if self._token_seconds <= 0.0:
            return min(4 * MIN_PREFILL_CHUNK, self._max_tokens)
        fits = int((self._target - self._decode_seconds) / self._token_seconds)
        return max(min(fits, self._max_tokens), min(MIN_PREFILL_CHUNK, self._max_tokens))

    @staticmethod
    def _blend(old: float, new: float) -> float:
        return new if old == 0.0 else 0.8 * old + 0.2 * new


class Engine:
    """Requests in, `StepOutputs` out. `static_root` is the hash of everything but the tenant that
    could change a bit of the KV; `backing` is the tier behind the scheduler's pool."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        vocab_size: int,
        static_root: Key,
        epoch: int = 0,
        backing: Backing | None = None,
        check_accounting: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.epoch = epoch
        self._runner = runner
        self._vocab_size = vocab_size
        self._static_root = static_root
        self._backing = backing
        self._reported = DiskStats()
        self._check_accounting = check_accounting
        self._clock = PrefillClock(scheduler.max_num_batched_tokens)
        self._refused: list[TokenOutput] = []
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
        return self.scheduler.has_work or bool(self._refused)

    def submit(self, message: Submit) -> None:
        """Queue a request, or have its refusal in the next step's outputs."""
        error = self._refusal(message)
        if error is not None:
            self._refused.append(
                TokenOutput(message.request_id, finish_reason="error", error=error)
            )
            return
        self.scheduler.add(
            Request(
                message.request_id,
                message.prompt_token_ids,
                message.params,
                root_key(self._static_root, message.salt),
                message.output_token_ids,
            )
        )

    def abort(self, request_ids: list[str]) -> None:
        """These requests are gone, and their blocks free, when this returns."""
        for request_id in request_ids:
            if self.scheduler.finish(request_id) is not None:
                self._aborted += 1
                self._told_reuse.discard(request_id)

    def step(self, drain: Callable[[], None] = lambda: None) -> StepOutputs:
        """One step. `drain` is called between the forward pass and the update, so that an abort
        that came meanwhile takes effect in this step and the request emits nothing more."""
        outputs, self._refused = self._refused, []
        batch = self.scheduler.schedule()
        if batch.sequences or batch.stopped:
            started = time.perf_counter()
            result = self._runner.run(batch) if batch.sequences else None
            seconds = time.perf_counter() - started
            drain()
            outputs += self._update(batch, result)
            self._clock.observe(batch.num_decodes, batch.num_tokens - batch.num_decodes, seconds)
            self.scheduler.prefill_tokens_beside_decodes = self._clock.chunk
            self._steps += 1
            self._step_seconds = seconds
        if self._backing is not None:
            self._backing.copy_some()
        if self._check_accounting or not self.scheduler.has_work:
            self.scheduler.check()
        return StepOutputs(self.epoch, outputs, self.stats())

    def idle_report(self) -> StepOutputs:
        """No outputs, only the state: sent after aborts left nothing to do."""
        self.scheduler.check()
        return StepOutputs(self.epoch, [], self.stats())

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
            num_waiting=self.scheduler.num_waiting,
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
            outputs.append(output)
        return outputs

    def _output(self, update: Update, result: StepResult | None) -> TokenOutput:
        request = update.request
        output = TokenOutput(request.id, finish_reason=update.finish_reason)
        if request.id not in self._told_reuse:
            self._told_reuse.add(request.id)
            output.num_reused_tokens = request.num_reused_tokens
            output.num_disk_tokens = request.num_disk_tokens
            self._disk_tokens += request.num_disk_tokens
            self._reused_tokens += request.num_reused_tokens
            self._prompt_tokens += request.num_prompt_tokens - request.num_reused_tokens
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

    def _refusal(self, message: Submit) -> RequestError | None:
        """Bounds are checked at the edge; they are checked here again, because one bad request
        must never take the engine down."""
        params = message.params
        num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
        limit = self.scheduler.max_model_len

        def invalid(text: str, code: str = "invalid_value") -> RequestError:
            return RequestError("invalid_request_error", code, text)

        if message.request_id in self.scheduler:
            return invalid("a request with this id is running already")
        if not message.prompt_token_ids:
            return invalid("the prompt has no tokens; at least one is needed")
        if num_tokens >= limit or not self.scheduler.fits(num_tokens):
            return invalid(
                f"the prompt has {num_tokens} tokens and leaves no room for an answer: the model's "
                f"context length is {limit} tokens",
                "context_length_exceeded",
            )
        parts = (
            message.prompt_token_ids,
            message.output_token_ids,
            params.stop_token_ids,
            params.logit_bias,
        )
        ids = [i for part in parts if part for i in (min(part), max(part))]
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            return invalid(f"token ids must be from 0 to {self._vocab_size - 1}")
        numbers = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            *params.logit_bias.values(),
        )
        if not all(map(math.isfinite, numbers)):
            return invalid("sampling parameters must be finite numbers")
        if params.temperature < 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
            return invalid("temperature must be >= 0, top_p in (0, 1], min_p in [0, 1]")
        if params.repetition_penalty <= 0 or params.top_k < 0:
            return invalid("repetition_penalty must be > 0 and top_k >= 0")
        if not 0 <= params.min_tokens <= params.max_tokens or params.max_tokens < 1:
            return invalid("0 <= min_tokens <= max_tokens and max_tokens >= 1 are needed")
        if len(message.output_token_ids) >= params.max_tokens:
            return invalid("the resumed request has all of its max_tokens already")
        return None
