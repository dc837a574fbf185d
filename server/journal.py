"""Journal: the durable generations' way to the store and back.

While they run, their logs are stored in group commits that no reader waits for: what a crash takes
of them is drawn again, and is the same. Their end is shown only when it is stored. What the store
says is running when the server starts goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import msgspec
import structlog

from model.engine.messages import TokenLogprob
from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import ServerError
from server.events import Done, Failed
from server.generation import Durable, Generation
from server.generations import Generations
from server.off_loop import CHARACTERS_PER_LOGGED_TOKEN, off_loop
from server.owners import Owner, Owners
from server.store.errors import StoreConflict, StoreError
from server.store.records import (
    GenerationRecord,
    GenerationStatus,
    IdempotencyRecord,
    SessionRecord,
    TokenChunk,
    TurnRecord,
)
from server.store.store import Store
from server.text.answer_text import PLAIN, Markup

log = structlog.get_logger()

FLUSH_SECONDS, LEAST_FLUSH_SECONDS = 0.25, 0.02  # where nobody waits for it, and where readers do
RETRY_SECONDS = 1.0
EXPIRE_SECONDS = 60.0
EXPIRED_KNOWN_SECONDS = 30 * 86_400.0  # how long one that is asked for is told to have expired
LAST_WORD_SECONDS = 1.0  # for the engine to name the blocks of what was cancelled
FORGET_BATCH = 4096

_encoder = msgspec.msgpack.Encoder()
_params = msgspec.msgpack.Decoder(SamplingParams)
_logprobs = msgspec.msgpack.Decoder(list[TokenLogprob])


class Journal:
    """Writes the logs of durable generations, and brings them back."""

    def __init__(
        self,
        store: Store,
        generations: Generations,
        client: EngineClient,
        owners: Owners,
        *,
        fingerprint: str,
        model: str,
        retention: float,
        response_retention: float,
    ) -> None:
        self._store = store
        self._generations = generations
        self._client = client
        self._owners = owners
        self._fingerprint = fingerprint  # of the tokenizer: what token ids mean
        self.model = model  # what draws them
        self._retention = retention
        self._response_retention = response_retention
        self._unsaved: list[tuple[Generation, Done | Failed]] = []
        self._flushing = asyncio.Lock()
        self._waited_for = asyncio.Event()
        self._told_dropped = True  # the engine knows which blocks nobody has any more
        self._task: asyncio.Task[None] | None = None
        self._expired = 0.0
        generations.journal = self
        client.on_forgotten = self._forgotten

    # ------------------------------------------------------------------------------ its own life

    async def start(self) -> None:
        """Take up what was running when the server died, and begin to write."""
        for record, token_ids, blobs in await self._store.running():
            if record.extra.get("model") != self.model:
                log.warning("generation_of_another_model", generation=record.id)
                continue
            await self._take_up(record, token_ids, blobs)
        self._task = asyncio.create_task(self._run(), name="journal")

    async def _take_up(
        self, record: GenerationRecord, token_ids: list[int], blobs: list[bytes]
    ) -> Generation:
        """Go on with one that is stored as running, unless somebody else did meanwhile."""
        turn = await self._turn_of(record)
        if (live := self._generations[record.id]) is not None:
            return live
        generation = self._make(record, record.extra["stop"])
        num_logged = len(token_ids)
        generation.durable = Durable(record.kind, record.session, turn, num_logged, num_logged)
        generation.crashes = record.crashes
        generation.replay(token_ids, [p for blob in blobs for p in _logprobs.decode(blob)])
        self._let_wait(generation)
        self._generations.submit(generation)
        if record.kind == "response":  # whoever waited for it is gone
            generation.cancel()
        else:
            log.info("generation_resumed", generation=record.id, tokens=num_logged)
        return generation

    async def _turn_of(self, record: GenerationRecord) -> TurnRecord | None:
        if record.session is None or record.turn is None:
            return None
        return await self._store.turn(record.session, record.turn)

    async def stop(self) -> None:
        """Write no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def engine_ready(self) -> None:
        """Have the engine forget the blocks of what was deleted while it was down."""
        for generation in self._generations.live:
            self._let_wait(generation)
        self._told_dropped = False
        try:
            await self._tell_dropped()
        except StoreError as error:  # when the store is back, then
            log.error("store_failed", reason=str(error))

    async def _tell_dropped(self) -> None:
        if not self._told_dropped:
            self.forget(await self._store.dropped_blocks())
            self._told_dropped = True

    def forget(self, keys: Sequence[bytes]) -> None:
        """Have the engine forget these blocks, some at a time: each is a file to remove."""
        for i in range(0, len(keys), FORGET_BATCH):
            self._client.forget(list(keys[i : i + FORGET_BATCH]))

    async def flush(self) -> None:
        """Store what the logs of the running generations have grown by."""
        async with self._flushing:  # a group that fails must not be overtaken by the next
            await self._flush()

    async def _flush(self) -> None:
        grown: list[tuple[Generation, Durable, TokenChunk]] = []
        for generation in self._generations.live:
            durable, end = generation.durable, len(generation.token_ids)
            if durable is None or generation.closing or end <= durable.num_logged:
                continue
            grown.append((generation, durable, _chunk(generation, durable.num_logged)))
            durable.num_logged = end
        if not grown:
            return
        try:
            await self._store.log_tokens([chunk for _, _, chunk in grown])
        except Exception:
            for _, durable, chunk in grown:
                durable.num_logged = min(durable.num_logged, chunk.position)
            raise
        for generation, durable, chunk in grown:
            durable.num_stored = chunk.position + len(chunk.token_ids)
            if durable.waits is not None:
                generation.wake()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LEAST_FLUSH_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._waited_for.wait(), FLUSH_SECONDS)
            self._waited_for.clear()
            try:
                await self.flush()
                await self._tell_dropped()
                while self._unsaved:
                    await self._save(*self._unsaved[0])
                    del self._unsaved[0]
                if time.monotonic() - self._expired > min(EXPIRE_SECONDS, self._retention):
                    self._expired = time.monotonic()
                    before = time.time() - self._retention
                    known = max(EXPIRED_KNOWN_SECONDS, self._response_retention)
                    await self._store.expire(before, before - known)
                    await self._expire_responses(time.time() - self._response_retention)
            except StoreError as error:
                log.error("store_failed", reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # whatever it is, the others' logs are stored
                log.exception("journal_failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _expire_responses(self, before: float) -> None:
        for owner, session in await self._store.old_unlisted(before):
            if not self.owes(session):
                self.forget(await self._store.delete_session(owner, session) or [])

    # ------------------------------------------------------------------------- for generations

    async def start_resumable(
        self,
        prompt: list[int],
        params: SamplingParams,
        owner: Owner,
        stop: Sequence[str],
        idempotency: IdempotencyRecord | None,
        markup: Markup = PLAIN,
    ) -> Generation:
        """Store and run one that outlives its client and this process, without a session."""
        generation = self._generations.make(
            prompt, params, owner=owner, stop=stop, durable=Durable("chat"), markup=markup
        )
        await self.begin(generation, idempotency=idempotency)
        return generation

    async def begin(
        self,
        generation: Generation,
        turns: Sequence[TurnRecord] = (),
        *,
        new_session: SessionRecord | None = None,
        idempotency: IdempotencyRecord | None = None,
    ) -> None:
        """Store a durable generation, the new `turns` that it answers and the turn that it writes,
        new or gone on with; then run it. The head of a session moves to its turn at once, that of a
        conversation when a response came to its end."""
        durable = generation.durable
        assert durable is not None
        turn = durable.turn
        reopened = None
        head = None
        if turn is not None:
            turn.generation = generation.id
            turn.notes |= {
                "params": msgspec.to_builtins(generation.params),
                "stop": list(generation.stop),
                "model": self.model,
            }
            if turn.number:  # the store has it
                reopened = turn
            else:
                turns = [*turns, turn]
            if "response" not in turn.notes:
                head = turn.session, turn.id
        if idempotency is not None:
            idempotency.target = generation.id
        self._generations.admit(generation)
        try:
            await self._store.begin(
                turns,
                self._record(generation),
                head=head,
                updated_at=time.time(),
                idempotency=idempotency,
                reopened=reopened,
                session=new_session,
            )
        except BaseException:
            self._generations.withdraw(generation)
            raise
        self._generations.submit(generation)

    def _record(self, generation: Generation) -> GenerationRecord:
        """What the store keeps of it, from before its first token."""
        durable = generation.durable
        assert durable is not None
        self._let_wait(generation)
        return GenerationRecord(
            id=generation.id,
            owner=generation.owner.name,
            session=durable.session,
            turn=None if durable.turn is None else durable.turn.id,
            kind=durable.kind,
            prompt_token_ids=generation.prompt_token_ids,
            resumed_token_ids=generation.resumed_token_ids,
            params=_encoder.encode(generation.params),
            extra={
                "stop": list(generation.stop),
                "tokenizer": self._fingerprint,
                "model": self.model,
                "markup": msgspec.to_builtins(generation.markup),
            },
            created_at=generation.created_at,
        )

    async def commit(self, generation: Generation, event: Done | Failed) -> Done | Failed:
        """Store the end; returns what the readers are to see."""
        if self._client.has_engine and not generation.left_engine.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(generation.left_engine.wait(), LAST_WORD_SECONDS)
        try:
            await self._save(generation, event)
        except StoreError as error:
            log.error("answer_not_saved", generation=generation.id, reason=str(error))
            self._unsaved.append((generation, event))
            return Failed(ServerError(f"the answer could not be saved yet: {error}"))
        except Exception:  # its readers must not wait for ever
            log.exception("answer_not_saved", generation=generation.id)
            return Failed(ServerError("the server failed at this answer; it is not saved"))
        return event

    async def count_crashes(self, generations: Sequence[Generation]) -> None:
        """Store how many deaths of the engine these have seen."""
        try:
            await self._store.set_crashes({g.id: g.crashes for g in generations})
        except StoreError as error:
            log.error("store_failed", reason=str(error))

    def owes(self, session_id: str) -> bool:
        """Whether the end of an answer in that session is still to be stored: the store failed."""
        return any(g.durable and g.durable.session == session_id for g, _ in self._unsaved)

    async def load(self, owner: str, generation_id: str) -> Generation | None:
        """One that is not live: as it was, with its log, when it has ended. One that is stored as
        running, since the answer to a commit was lost, is taken up. None where there is none, or
        what is left of it cannot be read with this model."""
        for generation, _ in self._unsaved:
            if generation.id == generation_id and generation.owner.name == owner:
                return generation
        record = await self._store.generation(owner, generation_id)
        if record is None or record.extra.get("tokenizer") != self._fingerprint:
            return None
        running = record.status == "running" and record.extra.get("model") == self.model
        if record.usage is None and not running:
            return None
        token_ids, blobs = await self._store.generation_log(generation_id)
        if running:
            return await self._take_up(record, token_ids, blobs)
        assert record.usage is not None
        generation = self._make(record, stop=())
        num_shown = len(token_ids) - record.usage["num_end_tokens"]
        logprobs = [p for blob in blobs for p in _logprobs.decode(blob)]
        half = record.finish_reason != "abort"
        await off_loop(
            CHARACTERS_PER_LOGGED_TOKEN * num_shown,
            lambda: generation.restore(token_ids[:num_shown], logprobs, half=half),
        )
        generation.end_token_ids = token_ids[num_shown:]
        generation.durable = Durable(record.kind, record.session, await self._turn_of(record))
        generation.stored_counts = record.usage
        if record.error is not None:
            generation.publish(Failed(ServerError(**record.error)))
        else:
            generation.publish(msgspec.convert({"finish_reason": record.finish_reason}, Done))
        return generation

    def _let_wait(self, generation: Generation) -> None:
        """Where a token that is lost would not come again, it is stored before it is shown."""
        model = self._client.model
        if generation.durable is not None and model is not None:
            generation.durable.waits = None if model.reproducible else self._waited_for

    def _make(self, record: GenerationRecord, stop: Sequence[str]) -> Generation:
        generation = self._generations.make(
            record.prompt_token_ids,
            _params.decode(record.params),
            owner=self._owners.named(record.owner) if record.owner else self._owners.local,
            stop=stop,
            resumed_token_ids=record.resumed_token_ids,
            markup=msgspec.convert(record.extra.get("markup", {}), Markup),
        )
        generation.id = record.id
        generation.created_at = record.created_at
        return generation

    async def _save(self, generation: Generation, event: Done | Failed) -> None:
        durable = generation.durable
        assert durable is not None
        if durable.turn is not None:
            model = self._client.model
            _write_turn(generation, event, 1 if model is None else model.block_size)
        status: GenerationStatus = "complete"
        reason, error = "error", None
        if isinstance(event, Failed):
            status = "failed"
            error = {"message": event.error.message, "code": event.error.code}
        else:
            reason = event.finish_reason
            if reason == "abort":
                status = "interrupted"
        try:
            await self._store.finish(
                generation.id,
                status=status,
                finish_reason=reason,
                error=error,
                usage=generation.counts(),
                ended_at=time.time(),
                turn=durable.turn,
                head=_new_head(durable.turn, status),
                blocks=generation.block_keys,
                chunks=[_chunk(generation, 0)],
            )
        except StoreConflict:  # it was deleted meanwhile, with its session
            self.forget(await self._store.drop_blocks(generation.block_keys))

    def _forgotten(self, keys: list[bytes]) -> None:
        async def done() -> None:
            with contextlib.suppress(StoreError):
                await self._store.blocks_forgotten(keys)

        self._generations.spawn(done())


def _chunk(generation: Generation, start: int) -> TokenChunk:
    """The log from there on."""
    logprobs = generation.logprobs[start:]
    return TokenChunk(
        generation.id,
        start,
        generation.output_token_ids[start:],
        _encoder.encode(logprobs) if logprobs else None,
    )


def _new_head(turn: TurnRecord | None, status: GenerationStatus) -> str | None:
    """The turn that a conversation goes on from: a response that came to its end."""
    if turn is None or status != "complete" or "response" not in turn.notes:
        return None
    return turn.id if turn.notes["response"].get("conversation") is not None else None


def _write_turn(generation: Generation, event: Done | Failed, block_size: int) -> None:
    """The turn as it is at the end: its tokens are all that were kept of this answer."""
    turn = generation.durable.turn if generation.durable is not None else None
    assert turn is not None
    turn.token_ids = generation.whole_token_ids()
    turn.content = [{"type": "text", "text": generation.whole_text()}]
    whole = isinstance(event, Done) and event.finish_reason != "abort"
    turn.status = "complete" if whole else "interrupted"
    turn.finish_reason = event.finish_reason if isinstance(event, Done) else "error"
    counts = generation.counts()
    turn.notes["ended_at"] = int(time.time())
    # The last token that is drawn is never computed.
    history = turn.notes.get("history_tokens", 0) - 1
    turn.notes |= {
        "expected_tokens": max(history, 0) // block_size * block_size,
        "prompt_tokens": counts["prompt_tokens"],
        "cached_tokens": counts["cached_tokens"],
        "corrupt_blocks": generation.num_corrupt_blocks,
        "usage": {key: counts[key] for key in ("completion_tokens", "timings")},
    }
