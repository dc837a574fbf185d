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
from server.generation import Done, Durable, Failed, Generation
from server.generations import Generations
from server.owners import Owner, Owners
from server.store.errors import StoreConflict, StoreError
from server.store.records import (
    GenerationRecord,
    GenerationStatus,
    IdempotencyRecord,
    TokenChunk,
)
from server.store.store import Store
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

log = structlog.get_logger()

FLUSH_SECONDS = 0.25
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
        tokenizer: Tokenizer,
        owners: Owners,
        *,
        retention: float,
    ) -> None:
        self._store = store
        self._generations = generations
        self._client = client
        self._tokenizer = tokenizer
        self._owners = owners
        self._retention = retention
        self._unsaved: list[tuple[Generation, Done | Failed]] = []
        self._task: asyncio.Task[None] | None = None
        self._expired = 0.0
        generations.journal = self
        client.on_forgotten = self._forgotten

    # ------------------------------------------------------------------------------ its own life

    async def start(self) -> None:
        """Take up what was running when the server died, and begin to write."""
        for record, token_ids, blobs in await self._store.running():
            generation = self._make(record)
            turn = None
            if record.session is not None and record.turn is not None:
                turn = await self._store.turn(record.session, record.turn)
            generation.durable = Durable(
                record.kind, record.session, turn, num_logged=len(token_ids)
            )
            generation.crashes = record.crashes
            generation.replay(token_ids, [p for blob in blobs for p in _logprobs.decode(blob)])
            self._generations.submit(generation)
            log.info("generation_resumed", generation=record.id, tokens=len(token_ids))
        self._task = asyncio.create_task(self._run(), name="journal")

    async def stop(self) -> None:
        """Write no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def engine_ready(self) -> None:
        """Have the engine forget the blocks of what was deleted while it was down."""
        keys = await self._store.dropped_blocks()
        for i in range(0, len(keys), FORGET_BATCH):
            self._client.forget(keys[i : i + FORGET_BATCH])

    async def flush(self) -> None:
        """Store what the logs of the running generations have grown by."""
        chunks = []
        for generation in self._generations.live:
            durable = generation.durable
            if durable is None or generation.closing:
                continue
            chunk = _rest(generation, durable, generation.token_ids)
            if chunk is not None:
                durable.num_logged += len(chunk.token_ids)
                chunks.append(chunk)
        if chunks:
            await self._store.log_tokens(chunks)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
                while self._unsaved:
                    await self._save(*self._unsaved[0])
                    del self._unsaved[0]
                if time.monotonic() - self._expired > EXPIRE_SECONDS:
                    self._expired = time.monotonic()
                    before = time.time() - self._retention
                    await self._store.expire(before, before - EXPIRED_KNOWN_SECONDS)
            except StoreError as error:
                log.error("store_failed", reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    # ------------------------------------------------------------------------- for generations

    async def start_resumable(
        self,
        prompt: list[int],
        params: SamplingParams,
        owner: Owner,
        stop: Sequence[str],
        idempotency: IdempotencyRecord | None,
    ) -> Generation:
        """Store and run one that outlives its client and this process, without a session."""
        self._generations.check_room(owner)
        generation = self._generations.make(
            prompt, params, owner=owner, stop=stop, durable=Durable("chat")
        )
        if idempotency is not None:
            idempotency.target = generation.id
        await self._store.begin(
            [],
            self.record(generation),
            head=None,
            updated_at=generation.created_at,
            idempotency=idempotency,
        )
        self._generations.submit(generation)
        return generation

    def record(self, generation: Generation) -> GenerationRecord:
        """What the store keeps of it, from before its first token."""
        durable = generation.durable
        assert durable is not None
        return GenerationRecord(
            id=generation.id,
            owner=generation.owner.name,
            session=durable.session,
            turn=None if durable.turn is None else durable.turn.id,
            kind=durable.kind,
            prompt_token_ids=generation.prompt_token_ids,
            resumed_token_ids=generation.resumed_token_ids,
            params=_encoder.encode(generation.params),
            extra={"stop": list(generation.stop)},
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
        return event

    async def count_crashes(self, generations: Sequence[Generation]) -> None:
        """Store how many deaths of the engine these have seen."""
        try:
            await self._store.set_crashes({g.id: g.crashes for g in generations})
        except StoreError as error:
            log.error("store_failed", reason=str(error))

    async def load(self, owner: str, generation_id: str) -> Generation | None:
        """One that has ended, as it was, with its log; None where there is none."""
        record = await self._store.generation(owner, generation_id)
        if record is None or record.usage is None:
            return None
        token_ids, blobs = await self._store.generation_log(generation_id)
        generation = self._make(record)
        num_ends = record.usage["num_end_tokens"]
        generation.token_ids = token_ids[: len(token_ids) - num_ends]
        generation.end_token_ids = token_ids[len(generation.token_ids) :]
        generation.logprobs = [p for blob in blobs for p in _logprobs.decode(blob)]
        generation.pieces = self._pieces(record, generation.token_ids)
        turn = None
        if record.session is not None and record.turn is not None:
            turn = await self._store.turn(record.session, record.turn)
        generation.durable = Durable(record.kind, record.session, turn)
        generation.stored_counts = record.usage
        if record.error is not None:
            generation.publish(Failed(ServerError(**record.error)))
        else:
            generation.publish(msgspec.convert({"finish_reason": record.finish_reason}, Done))
        return generation

    def _make(self, record: GenerationRecord) -> Generation:
        generation = self._generations.make(
            record.prompt_token_ids,
            _params.decode(record.params),
            owner=self._owners.named(record.owner) if record.owner else self._owners.local,
            stop=record.extra["stop"],
            resumed_token_ids=record.resumed_token_ids,
        )
        generation.id = record.id
        generation.created_at = record.created_at
        return generation

    def _pieces(self, record: GenerationRecord, token_ids: list[int]) -> list[str]:
        detokenizer = Detokenizer(self._tokenizer.token_bytes, record.prompt_token_ids)
        for token_id in record.resumed_token_ids:
            detokenizer.feed(token_id)
        pieces = [detokenizer.feed(token_id).text for token_id in token_ids]
        if pieces:
            pieces[-1] += detokenizer.finish(half=record.finish_reason != "abort").text
        return pieces

    async def _save(self, generation: Generation, event: Done | Failed) -> None:
        durable = generation.durable
        assert durable is not None
        if durable.turn is not None:
            model = self._client.model
            _write_turn(generation, event, 1 if model is None else model.block_size)
        chunk = _rest(generation, durable, generation.output_token_ids)
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
                blocks=generation.block_keys,
                chunks=[] if chunk is None else [chunk],
            )
        except StoreConflict:  # it was deleted meanwhile, with its session
            if durable.session is not None:
                self._client.forget(
                    await self._store.add_blocks(durable.session, generation.block_keys)
                )

    def _forgotten(self, keys: list[bytes]) -> None:
        async def done() -> None:
            with contextlib.suppress(StoreError):
                await self._store.blocks_forgotten(keys)

        self._generations.spawn(done())


def _rest(generation: Generation, durable: Durable, token_ids: list[int]) -> TokenChunk | None:
    """What is not stored yet of the log."""
    start = durable.num_logged
    if len(token_ids) <= start:
        return None
    logprobs = generation.logprobs[start : len(token_ids)]
    return TokenChunk(
        generation.id,
        start,
        token_ids[start:],
        _encoder.encode(logprobs) if logprobs else None,
    )


def _write_turn(generation: Generation, event: Done | Failed, block_size: int) -> None:
    """The turn as it is at the end: its tokens are all that were kept of this answer."""
    turn = generation.durable.turn if generation.durable is not None else None
    assert turn is not None
    turn.token_ids = generation.resumed_token_ids + generation.output_token_ids
    turn.content = [{"type": "text", "text": generation.whole_text()}]
    whole = isinstance(event, Done) and event.finish_reason != "abort"
    turn.status = "complete" if whole else "interrupted"
    turn.finish_reason = event.finish_reason if isinstance(event, Done) else "error"
    counts = generation.counts()
    # The last token that is drawn is never computed.
    history = turn.notes.get("history_tokens", 0) - 1
    turn.notes |= {
        "expected_tokens": max(history, 0) // block_size * block_size,
        "prompt_tokens": counts["prompt_tokens"],
        "cached_tokens": counts["cached_tokens"],
        "corrupt_blocks": generation.num_corrupt_blocks,
        "usage": {key: counts[key] for key in ("completion_tokens", "timings")},
    }
