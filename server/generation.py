"""Generation: one run of the model, its event log, and those who read it.

Token ids come in from the engine; text comes out as events in a log. Every subscriber reads it
from its own offset, so a slow reader holds nobody up, and all wires are functions of one log.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from model.engine.messages import Submit, TokenLogprob, TokenOutput
from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import (
    HeadwaterError,
    InvalidRequest,
    QueueFull,
    RateLimited,
    ServerError,
    from_engine,
)
from server.metrics import Metrics
from server.owners import Owner
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer


@dataclass(slots=True, frozen=True)
class Delta:
    """Text that may be shown, and the tokens that it shows. `logprobs` has one entry a token where
    they were asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]


@dataclass(slots=True, frozen=True)
class Done:
    """The end of a log."""

    finish_reason: Literal["stop", "length"]


@dataclass(slots=True, frozen=True)
class Failed:
    """The end of a log that broke."""

    error: HeadwaterError


Event = Delta | Done | Failed


@dataclass(slots=True)
class Timings:
    """Monotonic clock, in seconds; 0 is 'not yet'."""

    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(eq=False)
class Generation:
    """One choice of an answer. `feed` is the engine client's sink; `owner` is a name."""

    id: str
    owner: str
    prompt_token_ids: list[int]
    params: SamplingParams
    detokenizer: Detokenizer
    on_end: Callable[[Generation], None]
    log: list[Event] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_reused_tokens: int = 0
    num_output_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    _held_ids: list[int] = field(default_factory=list)
    _held_logprobs: list[TokenLogprob] = field(default_factory=list)
    _listeners: set[asyncio.Event] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return bool(self.log) and not isinstance(self.log[-1], Delta)

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(event.text for event in self.log if isinstance(event, Delta))

    @property
    def end(self) -> Done:
        """How it ended. Raises the error it failed with."""
        event = self.log[-1]
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Done)
        return event

    # ------------------------------------------------------------------------------- the log

    def feed(self, output: TokenOutput | HeadwaterError) -> None:
        """Append what a step made, and wake the readers."""
        if self.ended:
            return
        if isinstance(output, HeadwaterError):
            self._finish(Failed(output))
            return
        if output.num_reused_tokens >= 0:
            self.num_reused_tokens = output.num_reused_tokens
        self.prompt_logprobs += output.prompt_logprobs
        if output.error is not None:
            self._finish(Failed(from_engine(output.error)))
            return
        if output.token_ids:
            stopped = self._append(output)
            if stopped:
                return
        match output.finish_reason:
            case None:
                if output.token_ids:
                    self._wake()
            case "stop" | "length":
                self._flush()
                self._finish(Done(output.finish_reason))
            case _:
                self._finish(Failed(ServerError("the engine ended the request unasked")))

    def fail(self, error: HeadwaterError) -> None:
        """End the log with an error, from this side."""
        self.feed(error)

    def _append(self, output: TokenOutput) -> bool:
        """Log what the new tokens let be shown. True when a stop string ended the generation."""
        now = time.monotonic()
        if self.timings.first_token == 0.0:
            self.timings.first_token = now
        self.timings.last_token = now
        self.num_output_tokens += len(output.token_ids)
        # The token that ends the request (an end token, a stop token) is counted, not shown.
        num_shown = len(output.token_ids) - (output.finish_reason == "stop")
        self._held_ids += output.token_ids[:num_shown]
        self._held_logprobs += output.logprobs[:num_shown]
        text, num_tokens = "", 0
        for token_id in output.token_ids[:num_shown]:
            delta = self.detokenizer.feed(token_id)
            text += delta.text
            num_tokens += delta.num_tokens
            if self.detokenizer.stopped is not None:
                self._release(text, num_tokens)
                self._finish(Done("stop"))
                return True
        self._release(text, num_tokens)
        return False

    def _release(self, text: str, num_tokens: int) -> None:
        if not text and num_tokens == 0:
            return
        self.log.append(Delta(text, self._held_ids[:num_tokens], self._held_logprobs[:num_tokens]))
        del self._held_ids[:num_tokens]
        del self._held_logprobs[:num_tokens]

    def _flush(self) -> None:
        delta = self.detokenizer.finish()
        stopped = self.detokenizer.stopped is not None  # the last character completed a stop string
        self._release(delta.text, delta.num_tokens if stopped else len(self._held_ids))

    def _finish(self, event: Done | Failed) -> None:
        self.log.append(event)
        self.on_end(self)
        self._wake()

    # --------------------------------------------------------------------------- its readers

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.set()

    def listen(self, listener: asyncio.Event) -> None:
        """Set `listener` whenever the log grows."""
        self._listeners.add(listener)
        if self.log:
            listener.set()

    def unlisten(self, listener: asyncio.Event) -> None:
        self._listeners.discard(listener)


async def read(generations: Sequence[Generation]) -> AsyncIterator[list[tuple[int, Event]]]:
    """The events of several generations as they come, as (index, event). One batch a wake-up, so
    that a step costs one write however many choices it served."""
    news = asyncio.Event()
    offsets = [0] * len(generations)
    for generation in generations:
        generation.listen(news)
    try:
        unfinished = set(range(len(generations)))
        while unfinished:
            await news.wait()
            news.clear()
            batch: list[tuple[int, Event]] = []
            for i in sorted(unfinished):
                log = generations[i].log
                batch += [(i, event) for event in log[offsets[i] :]]
                offsets[i] = len(log)
                if generations[i].ended:
                    unfinished.discard(i)
            if batch:
                yield batch
    finally:
        for generation in generations:
            generation.unlisten(news)


class Generations:
    """Starts generations, within the bound of the queue, and knows the live ones."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        max_num_seqs: int,
        max_queue: int,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._max_num_seqs = max_num_seqs
        self._capacity = max_num_seqs + max_queue
        self._live: dict[str, Generation] = {}
        self._mean_seconds = 1.0  # how long a generation takes, for Retry-After

    def __len__(self) -> int:
        return len(self._live)

    def start(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        owner: Owner,
        n: int = 1,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Submit `n` choices for each prompt (token ids), in order; all of them or none.

        Raises RateLimited, QueueFull, or why the engine takes no requests now."""
        self._client.check_ready()
        num_more = n * len(prompts)
        self._check_limit(owner, num_more)
        if num_more > self._capacity:
            raise InvalidRequest(
                f"the request asks for {num_more} answers; this server takes at most "
                f"{self._capacity} at a time",
                param="n",
            )
        if len(self._live) + num_more > self._capacity:
            ahead = len(self._live) + num_more - self._max_num_seqs
            wait = self._mean_seconds * ahead / self._max_num_seqs
            raise QueueFull(
                f"the queue is full: {len(self._live)} requests are running or waiting and the "
                f"limit is {self._capacity}; try again later",
                retry_after=min(max(wait, 1.0), 60.0),
            )
        generations = []
        for prompt_index, prompt in enumerate(prompts):
            for choice_index in range(n):
                generation = Generation(
                    id=f"gen_{secrets.token_hex(16)}",
                    owner=owner.name,
                    prompt_token_ids=prompt,
                    params=msgspec.structs.replace(
                        params, prompt_index=prompt_index, choice_index=choice_index
                    ),
                    detokenizer=Detokenizer(
                        self._tokenizer.token_bytes,
                        prompt,
                        list(stop),
                        min_tokens=params.min_tokens,
                    ),
                    on_end=self._ended,
                )
                generation.timings.submitted = time.monotonic()
                self._live[generation.id] = generation
                self._client.submit(
                    Submit(generation.id, prompt, generation.params, salt=owner.salt),
                    generation.feed,
                )
                generations.append(generation)
        return generations

    def _check_limit(self, owner: Owner, num_more: int) -> None:
        """Raises RateLimited while the owner has as many answers running as it may have."""
        limit = owner.max_concurrent
        if limit is None:
            return
        if num_more > limit:
            raise InvalidRequest(
                f"the request asks for {num_more} answers; the limit of {owner.name} is {limit} "
                "at a time",
                param="n",
            )
        running = sum(g.owner == owner.name for g in self._live.values())
        if running + num_more > limit:
            raise RateLimited(
                f"{owner.name} has {running} answers running or waiting and the limit is {limit}; "
                "try again when one has ended",
                retry_after=min(max(self._mean_seconds, 1.0), 60.0),
            )

    def cancel(self, generations: Iterable[Generation]) -> None:
        """The reader is gone: stop computing. Generations that ended are left as they are."""
        live = [g.id for g in generations if self._live.pop(g.id, None) is not None]
        if live:
            self._metrics.aborts.inc(len(live))
            self._client.abort(live)

    def end_all(self, error: HeadwaterError) -> None:
        """End every live generation with `error` (the server stops)."""
        for generation in list(self._live.values()):
            self._client.abort([generation.id])
            generation.fail(error)

    def _ended(self, generation: Generation) -> None:
        self._live.pop(generation.id, None)
        self._client.abort([generation.id])  # a stop string ended it here, not in the engine
        seconds = time.monotonic() - generation.timings.submitted
        self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * seconds
        self._metrics.ended(generation.timings, generation.num_output_tokens)
