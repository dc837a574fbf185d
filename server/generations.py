"""Generations: starts them, knows the live ones, and carries them over the deaths of the engine.

When the engine dies, every live generation is submitted again to the next one, with the tokens it
has: it goes on with the very next token, since draws depend on the seed and the position alone.

One that may be the cause is told from the others: those that were in the engine at two deaths,
without a step forward since the first, are tried alone, one after the other. One that gets further
is cleared. One that the engine dies of a third time ends with `engine_crash`, and only it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from model.engine.messages import Submit
from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import (
    EngineCrash,
    HeadwaterError,
    InvalidRequest,
    QueueFull,
    RateLimited,
    ServerDraining,
)
from server.events import Done, Failed
from server.generation import Durable, Generation
from server.metrics import Metrics
from server.owners import Owner
from server.text.answer_text import PLAIN, Markup
from server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.journal import Journal

log = structlog.get_logger()

MAX_CRASHES = 3
CLEARED_AFTER_TOKENS = 2  # the step that an engine died in, and one more


class Generations:
    """The generations of one server, within the bound of its queue."""

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
        self._holding = True  # nothing but a suspect is submitted, until an engine has them all
        self._sent_at: dict[str, int] = {}  # output tokens when the engine got it
        self._num_sent = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.journal: Journal | None = None
        client.on_lost = self.engine_lost
        client.on_ready = self.engine_ready

    def __len__(self) -> int:
        return len(self._live)

    def __getitem__(self, generation_id: str) -> Generation | None:
        return self._live.get(generation_id)

    @property
    def live(self) -> list[Generation]:
        return list(self._live.values())

    # -------------------------------------------------------------------------------- starting

    def start(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        owner: Owner,
        n: int = 1,
        stop: Sequence[str] = (),
        markup: Markup = PLAIN,
    ) -> list[Generation]:
        """Submit `n` choices for each prompt (token ids), in order; all of them or none.

        Raises RateLimited, QueueFull, or why the engine takes no requests now."""
        self._check_room(owner, n * len(prompts))
        generations = [
            self.make(
                prompt,
                msgspec.structs.replace(
                    params, prompt_index=prompt_index, choice_index=choice_index
                ),
                owner=owner,
                stop=stop,
                markup=markup,
            )
            for prompt_index, prompt in enumerate(prompts)
            for choice_index in range(n)
        ]
        for generation in generations:
            self.submit(generation)
        return generations

    def make(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        owner: Owner,
        stop: Sequence[str] = (),
        resumed_token_ids: Sequence[int] = (),
        durable: Durable | None = None,
        markup: Markup = PLAIN,
    ) -> Generation:
        """A generation that is not submitted yet."""
        return Generation(
            id=f"gen_{secrets.token_hex(16)}",
            owner=owner,
            prompt_token_ids=prompt,
            params=params,
            stop=tuple(stop),
            tokenizer=self._tokenizer,
            on_end=self._ended,
            resumed_token_ids=list(resumed_token_ids),
            durable=durable,
            markup=markup,
        )

    def admit(self, generation: Generation) -> None:
        """Take a place for one that is submitted when it is stored. Raises as `start`."""
        self._check_room(generation.owner, 1)
        self._live[generation.id] = generation

    def withdraw(self, generation: Generation) -> None:
        """Give that place back: it could not be stored."""
        self._live.pop(generation.id, None)

    def submit(self, generation: Generation) -> None:
        """Run it, now or as soon as there is an engine."""
        if generation.closing:  # the server stops; it goes on with the next one
            return
        generation.timings.submitted = time.monotonic()
        self._live[generation.id] = generation
        if not self._holding:
            self._send(generation)

    def _check_room(self, owner: Owner, num_more: int) -> None:
        self._client.check_ready()
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

    def _check_limit(self, owner: Owner, num_more: int) -> None:
        limit = owner.max_concurrent
        if limit is None:
            return
        if num_more > limit:
            raise InvalidRequest(
                f"the request asks for {num_more} answers; the limit of {owner.name} is {limit} "
                "at a time",
                param="n",
            )
        running = sum(g.owner.name == owner.name for g in self._live.values())
        if running + num_more > limit:
            raise RateLimited(
                f"{owner.name} has {running} answers running or waiting and the limit is {limit}; "
                "try again when one has ended",
                retry_after=min(max(self._mean_seconds, 1.0), 60.0),
            )

    # ---------------------------------------------------------------------------------- ending

    def leave(self, generations: Iterable[Generation]) -> None:
        """A reader is gone. Plain generations and responses that nobody else reads are aborted;
        other durable ones go on, and those that ended are left as they are."""
        for generation in generations:
            goes_on = generation.durable is not None and generation.durable.kind != "response"
            if not goes_on and not generation.has_readers:
                self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """Stop computing: the answer is kept as far as it came."""
        if not generation.closing:
            self._metrics.aborts.inc()
            generation.cancel()

    def end_all(self, error: HeadwaterError) -> None:
        """The server stops: plain generations end with `error`. The stored logs of durable ones
        stay running, and those go on with the next start, which cancels responses."""
        later = ServerDraining(
            "the server stops; this stream goes on when it is back", retry_after=5
        )
        cancelled = ServerDraining(
            "the server stops, and this response with it: it is cancelled, and what it said is "
            "found when the server is back",
            retry_after=5,
        )
        for generation in self.live:
            if not generation.closing:
                self._client.abort([generation.request_id])
                del self._live[generation.id]
                match generation.durable:
                    case None:
                        generation.publish(Failed(error))
                    case Durable(kind="response"):
                        generation.publish(Failed(cancelled))
                    case _:
                        generation.publish(Failed(later))

    def _ended(self, generation: Generation, event: Done | Failed) -> None:
        # A stop string, or a person, may have ended it here and not in the engine.
        self._client.abort([generation.request_id], last_word=generation.durable is not None)
        self._sent_at.pop(generation.id, None)
        if generation.timings.submitted:
            seconds = time.monotonic() - generation.timings.submitted
            self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * seconds
        self._metrics.ended(generation.timings, generation.num_drawn_here)
        if generation.durable is None or self.journal is None:
            self._live.pop(generation.id, None)
            generation.publish(event)
        else:
            self.spawn(self._commit(generation, event))

    async def _commit(self, generation: Generation, event: Done | Failed) -> None:
        """`done` is shown when it is on disk."""
        assert self.journal is not None
        event = await self.journal.commit(generation, event)
        self._live.pop(generation.id, None)
        generation.publish(event)

    async def settled(self) -> None:
        """Wait until all that ended is stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # ------------------------------------------------------------------- the deaths of an engine

    def engine_lost(self, error: HeadwaterError | None) -> None:
        """The engine is gone; with `error` no other one will come."""
        if error is not None:
            self.end_all(error)
            return
        open_ones = [g for g in self.live if not g.closing]
        sent_at, self._sent_at = self._sent_at, {}
        for generation in open_ones:
            start = sent_at.get(generation.id)
            if start is not None:  # it was in this engine, which may also have died while it loaded
                further = generation.num_output_tokens - start >= CLEARED_AFTER_TOKENS
                generation.crashes = 1 if further else generation.crashes + 1
            generation.pause()
        self._holding = True

    def engine_ready(self) -> None:
        """An engine takes requests: go on with what is there."""
        self.spawn(self._resubmit(self._client.epoch))

    async def _resubmit(self, epoch: int) -> None:
        if self._client.epoch != epoch:
            return  # it died meanwhile
        if self.journal is not None:  # counted before it can happen again
            await self.journal.engine_ready()
            await self.journal.count_crashes([g for g in self.live if g.durable and g.crashes])
            if self._client.epoch != epoch:
                return
        self._holding = True
        for generation in self.live:
            if generation.crashes >= MAX_CRASHES and not generation.closing:
                log.error("poison", generation=generation.id, crashes=generation.crashes)
                generation.close(
                    Failed(
                        EngineCrash(
                            f"the engine died {generation.crashes} times while it computed this "
                            "answer, the last time alone with it; it is given up"
                        )
                    )
                )
        while suspect := self._next_suspect():
            self._client.on_trial = True
            self._send(suspect)
            await self._further(suspect)
            if self._client.epoch != epoch:
                return  # it died; the next engine's turn
            self._client.on_trial = False
            suspect.crashes = 0
            if self.journal is not None and suspect.durable is not None:
                await self.journal.count_crashes([suspect])
                if self._client.epoch != epoch:
                    return
            if not suspect.closing:  # cleared; it goes on with the others
                self._client.abort([suspect.request_id])
                self._sent_at.pop(suspect.id, None)
        self._holding = False
        for generation in self.live:
            self._send(generation)

    def _next_suspect(self) -> Generation | None:
        suspects = (g for g in self.live if g.crashes >= MAX_CRASHES - 1 and not g.closing)
        return next(suspects, None)

    async def _further(self, generation: Generation) -> None:
        """Wait until it has ended, or has got some tokens further, or the engine is lost."""
        epoch = self._client.epoch
        goal = generation.num_output_tokens + CLEARED_AFTER_TOKENS
        news = asyncio.Event()
        generation.listen(news)
        try:
            while (
                not generation.closing
                and generation.num_output_tokens < goal
                and self._client.epoch == epoch
            ):
                await news.wait()
                news.clear()
        finally:
            generation.unlisten(news)

    def _send(self, generation: Generation) -> None:
        stored = generation.timings.submitted > 0
        if generation.closing or not stored or not self._client.has_engine:
            return
        self._sent_at[generation.id] = generation.num_output_tokens
        self._num_sent += 1
        generation.request_id = f"{generation.id}-{self._num_sent}"
        self._client.submit(
            Submit(
                generation.request_id,
                generation.prompt_token_ids,
                generation.params,
                output_token_ids=generation.resumed_token_ids + generation.drawn_token_ids,
                salt=generation.owner.salt,
                report_blocks=generation.durable is not None,
            ),
            generation.feed,
        )

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the rest; `settled` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error)
