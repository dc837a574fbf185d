"""Sessions: trees of turns over token ids, and the one generation at a time that each may have.

A turn is acknowledged when it is stored. Its tokens are the truth: what was sampled stays as it was
sampled, and a new turn's prompt appends to the tokens that are there. Forking, rewinding and
editing are then nothing but paths through a tree, and the KV cache finds what they share by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec

from model.engine.messages import ModelInfo
from model.engine.request import SamplingParams
from server.cache_report import cache_report, computed_blocks
from server.engine_client import EngineClient
from server.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NotFound,
    SessionBusy,
)
from server.forks import copies_of, cut
from server.generation import Durable, Generation
from server.generations import Generations
from server.journal import Journal
from server.off_loop import CHARACTERS_PER_MESSAGE, off_loop
from server.owners import Owner
from server.prompt import check_can_fit, room_for_answer
from server.reader import read
from server.store.errors import StoreConflict
from server.store.records import IdempotencyRecord, SessionRecord, TurnRecord
from server.store.schema import text_of
from server.store.store import Store
from server.text.appended_text import message_of
from server.text.chat_template import ChatTemplate, TemplateError
from server.text.history import (
    Extension,
    drop_oldest,
    dropped_turns,
    extend,
    last_replacement,
    path_token_ids,
)
from server.text.tokenizer import Tokenizer
from server.turns import drawn_by, keep_response, new_answer, new_turns

OnBusy = Literal["error", "queue", "cancel_previous"]
MIN_ANSWER_TOKENS = 16  # what an answer of no stated length must have room for before turns go
MAX_QUEUED_TURNS = 64


@dataclass(slots=True, frozen=True)
class Wish:
    """How an answer is to be drawn: `params` gives the parameters for a number of max_tokens, which
    is `max_tokens`, or where that is None all that there is room for."""

    params: Callable[[int], SamplingParams]
    max_tokens: int | None = None
    stop: Sequence[str] = ()


@dataclass(slots=True)
class Line:
    """Those who change one session, one after the other."""

    lock: asyncio.Lock
    waiting: int = 0


class Sessions:
    """The sessions of all owners; every method takes the caller, and finds nobody else's."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        generations: Generations,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ) -> None:
        self._store = store
        self._journal = journal
        self._generations = generations
        self._client = client
        self._tokenizer = tokenizer
        self._template = template
        self._lines: dict[str, Line] = {}
        self.fingerprint = f"{tokenizer.fingerprint[:32]}-{template.fingerprint[:32]}"

    # -------------------------------------------------------------------------------- reading

    async def get(self, owner: Owner, id: str) -> SessionRecord:
        """Raises NotFound, also for somebody else's."""
        record = await self._store.session(owner.name, id)
        if record is None:
            raise NotFound(f"there is no session {id[:64]!r}")
        return record

    async def path(self, session: SessionRecord, turn_id: str | None) -> list[TurnRecord]:
        """The turns from the root to `turn_id`. Raises NotFound."""
        if turn_id is None:
            return []
        path = await self._store.path(session.id, turn_id)
        if not path:
            raise NotFound(f"the session {session.id} has no turn {turn_id[:64]!r}")
        return path

    def generating(self, session_id: str) -> Generation | None:
        """The session's running generation."""
        return next(
            (
                g
                for g in self._generations.live
                if g.durable is not None and g.durable.session == session_id
            ),
            None,
        )

    # ------------------------------------------------------------------------------- changing

    async def append(
        self,
        owner: Owner,
        session_id: str,
        messages: Sequence[dict[str, Any]],
        wish: Wish,
        *,
        parent: str | Literal[False] | None = False,
        on_busy: OnBusy = "error",
        idempotency: IdempotencyRecord | None = None,
    ) -> Generation:
        """Add turns after `parent` (None: the root; False: the head), and answer them."""
        async with self.free(owner, session_id, on_busy) as session:
            path = await self.path(session, session.head if parent is False else parent)
            return await self._reply(owner, session, path, messages, wish, idempotency)

    async def add(
        self,
        owner: Owner,
        session_id: str,
        messages: Sequence[dict[str, Any]],
        *,
        parent: str | Literal[False] | None = False,
        on_busy: OnBusy = "error",
        idempotency: IdempotencyRecord | None = None,
    ) -> TurnRecord:
        """Add turns as `append` does, and answer nothing. Returns the last one."""
        async with self.free(owner, session_id, on_busy) as session:
            path = await self.path(session, session.head if parent is False else parent)
            await self._check_ended(owner, path)
            extension = await self.extend(session, path, messages, None, None)
            turns = new_turns(session.id, path, messages, extension, self.fingerprint)
            last = turns[-1]
            if idempotency is not None:
                idempotency.target = f"{session.id}/{last.id}"
            await self._store.begin(
                turns,
                None,
                head=(session.id, last.id),
                updated_at=time.time(),
                idempotency=idempotency,
            )
            return last

    async def regenerate(
        self,
        owner: Owner,
        session_id: str,
        turn_id: str | None,
        wish: Wish,
        *,
        on_busy: OnBusy = "error",
        idempotency: IdempotencyRecord | None = None,
    ) -> Generation:
        """Another answer beside `turn_id` (the head), or to it where it is no answer."""
        async with self.free(owner, session_id, on_busy) as session:
            path = await self.path(session, turn_id or session.head)
            if path and path[-1].role == "assistant":
                path = path[:-1]
            if not path:
                raise InvalidRequest("there is nothing to answer: the session has no turn yet")
            return await self._reply(owner, session, path, [], wish, idempotency)

    async def resume(
        self,
        owner: Owner,
        session_id: str,
        *,
        max_tokens: int | None,
        on_busy: OnBusy = "error",
        idempotency: IdempotencyRecord | None = None,
    ) -> Generation:
        """Go on with the head, an answer that did not come to its end: the same seed, the same
        parameters, and so the tokens that it would have had."""
        async with self.free(owner, session_id, on_busy) as session:
            path = await self.path(session, session.head)
            if not path or path[-1].role != "assistant":
                raise InvalidRequest("the session's head is no answer that could be continued")
            await self._check_ended(owner, path)
            turn = path[-1]
            if turn.status == "complete" and turn.finish_reason != "length":
                raise InvalidRequest(
                    "the session's last answer came to its end; append a turn, or regenerate it"
                )
            if not {"params", "model"} <= turn.notes.keys():
                raise InvalidRequest(
                    "how the answer was drawn is not known; append a turn, or regenerate it"
                )
            if (turn.tokenizer, turn.notes["model"]) != (self.fingerprint, self._journal.model):
                raise InvalidRequest(
                    "the answer was begun with another model; append a turn, or regenerate it"
                )
            model = self._client.check_ready()
            prompt = _without_own(path)
            num_before = len(prompt) + len(turn.token_ids)
            room = room_for_answer(model, num_before, max_tokens, param="max_tokens")
            params = msgspec.convert(turn.notes["params"], SamplingParams, str_keys=True)
            params = msgspec.structs.replace(params, max_tokens=len(turn.token_ids) + room)
            keep_response(turn)
            turn.status, turn.finish_reason = "running", None
            generation = self._generations.make(
                prompt,
                params,
                owner=owner,
                stop=turn.notes["stop"],
                resumed_token_ids=turn.token_ids,
                durable=Durable("turn", session.id, turn),
            )
            await self._journal.begin(generation, idempotency=idempotency)
            return generation

    async def set_head(self, owner: Owner, session_id: str, turn_id: str | None) -> None:
        """Rewind (None: to the root), or switch to another branch."""
        async with self.free(owner, session_id, "error") as session:
            await self.path(session, turn_id)
            await self._store.update_session(session.id, head=turn_id, updated_at=time.time())

    async def leave_out(self, session: SessionRecord, path: list[TurnRecord], place: int) -> None:
        """Move the head of a session that is `free` to a copy of its path without the turn at
        `place`. What came before it stays as it is; what came after it is written anew, but where
        the turn was dropped from the prompt. What is dropped stays so."""
        before, after = path[:place], path[place + 1 :]
        now = time.time()
        if not after:
            head = before[-1].id if before else None
            await self._store.update_session(session.id, head=head, updated_at=now)
            return
        dropped = dropped_turns(path)
        if place < dropped:
            first = last_replacement(path)  # from there on the prompt is what it was
            copies = await self._anew(session, before, path[place + 1 : first], 0)
            same = copies_of(path[first:])
            same[0].parent = copies[-1].id if copies else before[-1].id if before else None
            same[0].notes["dropped"] = dropped - 1
            copies += same
        else:
            copies = await self._anew(session, before, after, dropped)
        for copy, turn in zip(copies, after, strict=True):
            copy.notes["item"] = turn.notes.get("item") or turn.id.removeprefix("turn_")
        await self._store.begin(copies, None, head=(session.id, copies[-1].id), updated_at=now)

    async def delete(self, owner: Owner, session_id: str) -> None:
        """The session, its logs, and its KV in every tier that no other session uses."""
        session = await self.get(owner, session_id)
        keys = await computed_blocks(self._client, await self._store.turns(session.id), owner.salt)
        dropped = await self._store.delete_session(owner.name, session.id, keys)
        if dropped is None:
            raise NotFound(f"there is no session {session_id[:64]!r}")
        if (running := self.generating(session.id)) is not None:
            self._generations.cancel(running)
        self._journal.forget(dropped)

    async def fork(
        self,
        owner: Owner,
        session_id: str,
        at: str | None,
        token: int | None,
        replace: int | None,
        idempotency: IdempotencyRecord | None = None,
    ) -> SessionRecord:
        """A new session with the path to `at` (the head). With `token`, that answer is cut after so
        many tokens, and `replace` is the next one."""
        session = await self.get(owner, session_id)
        model = self._client.check_ready()
        path = await self.path(session, at or session.head)
        await self._check_ended(owner, path)
        turns = copies_of(path)
        if token is not None:
            if not turns or turns[-1].role != "assistant":
                raise InvalidRequest("`token` cuts an answer; `at` is none", param="token")
            if turns[-1].tokenizer != self.fingerprint:
                raise InvalidRequest(
                    "the answer was made with another model; its tokens cannot be cut",
                    param="token",
                )
            cut(turns[-1], token, replace, self._tokenizer, model.vocab_size)
        elif replace is not None:
            raise InvalidRequest("`replace` needs `token`, its place", param="replace")
        fork = SessionRecord.new(
            owner.name,
            title=session.title,
            instructions=session.instructions,
            metadata=session.metadata,
            defaults=session.defaults,
            overflow=session.overflow,
            head=turns[-1].id if turns else None,
        )
        for turn in turns:
            turn.session = fork.id
        await self._store.copy_path(
            turns,
            fork,
            [(turn.id, copy.id) for turn, copy in zip(path, turns, strict=True)],
            len(path_token_ids(turns)) // model.block_size,
            idempotency,
        )
        return fork

    async def cache(self, owner: Owner, session_id: str) -> dict[str, Any]:
        """Where the KV of the head's path is, and why its last answer found no more of it."""
        session = await self.get(owner, session_id)
        path = await self.path(session, session.head)
        return await cache_report(self._client, session, path, owner.salt)

    # -------------------------------------------------------------------------------- details

    async def _anew(
        self,
        session: SessionRecord,
        before: list[TurnRecord],
        turns: list[TurnRecord],
        dropped: int,
    ) -> list[TurnRecord]:
        """Copies of the turns with tokens that go on from `before`, of which `dropped` are not in
        the prompt."""
        if not turns:
            return []
        messages = [message_of(turn) for turn in turns]
        extension = await self.extend(session, before, messages, None, None, dropped=dropped)
        copies = new_turns(session.id, before, messages, extension, self.fingerprint)
        for copy, turn in zip(copies, turns, strict=True):
            copy.content, copy.status = turn.content, turn.status
            copy.finish_reason, copy.created_at = turn.finish_reason, turn.created_at
            copy.notes["generation"] = drawn_by(turn)
            if "response" in turn.notes:
                copy.notes["response"] = turn.notes["response"]
        return copies

    @contextlib.asynccontextmanager
    async def free(
        self, owner: Owner, session_id: str, on_busy: OnBusy
    ) -> AsyncIterator[SessionRecord]:
        """The session, while nothing runs in it and nobody else changes it."""
        await self.get(owner, session_id)
        running = self.generating(session_id)
        if running is not None and on_busy == "error":
            raise _busy(session_id, running)
        line = self._lines.setdefault(session_id, Line(asyncio.Lock()))
        if line.waiting >= MAX_QUEUED_TURNS:
            raise _busy(session_id, running, full=True)
        line.waiting += 1
        try:
            async with line.lock:
                while (running := self.generating(session_id)) is not None:
                    if on_busy == "error":
                        raise _busy(session_id, running)
                    if on_busy == "cancel_previous":
                        self._generations.cancel(running)
                    async for _ in read([running], 0):
                        pass
                if self._journal.owes(session_id):
                    raise SessionBusy(
                        f"the last answer of the session {session_id} could not be stored yet; try "
                        "again in a moment"
                    )
                session = await self.get(owner, session_id)
                try:
                    yield session
                except StoreConflict:
                    await self.get(owner, session_id)  # it may have been deleted meanwhile
                    raise
        finally:
            line.waiting -= 1
            if line.waiting == 0:
                self._lines.pop(session_id, None)

    async def _check_ended(self, owner: Owner, path: Sequence[TurnRecord]) -> None:
        """Raises SessionBusy for a path whose last answer is not at its end, so that nothing can
        come after it. One that nobody runs, since the answer to a commit was lost, is taken up."""
        turn = path[-1] if path else None
        if turn is None or turn.status != "running" or turn.generation is None:
            return
        running = await self._journal.load(owner.name, turn.generation)
        if running is not None:
            raise _busy(turn.session, running)
        raise SessionBusy(
            f"the answer {turn.generation} was begun with another model and goes on when that one "
            "is served again; meanwhile regenerate it, or go on from another turn"
        )

    async def extend(
        self,
        session: SessionRecord,
        path: list[TurnRecord],
        messages: Sequence[dict[str, Any]],
        model: ModelInfo | None,
        max_tokens: int | None,
        fingerprint: str | None = None,
        template: ChatTemplate | None = None,
        dropped: int = 0,
    ) -> Extension:
        """The tokens of what is new, under the session's rule for what does not fit; `dropped`
        turns are left out anyway. Another `fingerprint` is for a rendering that is not the
        session's own."""

        def tokens(dropped: int) -> Extension:
            return extend(
                self._tokenizer,
                template or self._template,
                path,
                messages,
                instructions=session.instructions,
                fingerprint=fingerprint or self.fingerprint,
                answer=model is not None,
                dropped=dropped,
            )

        texts = [text_of(turn.content) for turn in path] + [m["content"] for m in messages]
        size = sum(CHARACTERS_PER_MESSAGE + len(text) for text in texts)
        new = sum(len(message["content"]) for message in messages)
        check_can_fit(self._tokenizer, model, new, param="input")
        try:
            extension = await off_loop(size, lambda: tokens(dropped))
            if model is None or session.overflow == "error":
                return extension
            wanted = max_tokens or MIN_ANSWER_TOKENS
            if len(extension.prompt_token_ids) + wanted <= model.max_model_len:
                return extension
            new = len(extension.prompt_token_ids) - len(extension.history) + wanted
            new += len(self._tokenizer.encode(session.instructions or ""))
            oldest = max(dropped, drop_oldest(path, new, model.max_model_len))
            # The sizes that it goes by may be of another rendering: then the first cut that fits.
            users = [i for i in range(oldest + 1, len(path)) if path[i].role == "user"]
            cuts = [oldest, *users, len(path)]
            low, high, middle = 0, len(cuts) - 1, 0
            tried: dict[int, Extension] = {}
            while low < high:
                tried[middle] = await off_loop(size, partial(tokens, cuts[middle]))
                if len(tried[middle].prompt_token_ids) + wanted <= model.max_model_len:
                    high = middle
                else:
                    low = middle + 1
                middle = (low + high) // 2
            if low not in tried:
                tried[low] = await off_loop(size, partial(tokens, cuts[low]))
            return tried[low]
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="input"
            ) from None

    def _params(
        self,
        model: ModelInfo,
        session: SessionRecord,
        wish: Wish,
        num_prompt_tokens: int,
    ) -> SamplingParams:
        try:
            room = room_for_answer(model, num_prompt_tokens, wish.max_tokens, param="input")
        except ContextLengthExceeded as error:
            if session.overflow == "error":
                error.message += (
                    "; a session made with `overflow` `drop_oldest` leaves out its oldest turns"
                )
            raise
        return wish.params(room)

    async def _reply(
        self,
        owner: Owner,
        session: SessionRecord,
        path: list[TurnRecord],
        messages: Sequence[dict[str, Any]],
        wish: Wish,
        idempotency: IdempotencyRecord | None,
    ) -> Generation:
        """Answer `messages` after `path`."""
        await self._check_ended(owner, path)
        model = self._client.check_ready()
        extension = await self.extend(session, path, messages, model, wish.max_tokens)
        prompt = extension.prompt_token_ids
        params = self._params(model, session, wish, len(prompt))
        turns = new_turns(session.id, path, messages, extension, self.fingerprint)
        turn = new_answer(session.id, path, turns, extension, self.fingerprint)
        generation = self._generations.make(
            prompt,
            params,
            owner=owner,
            stop=wish.stop,
            durable=Durable("turn", session.id, turn),
        )
        await self._journal.begin(generation, turns, idempotency=idempotency)
        return generation


def _without_own(path: Sequence[TurnRecord]) -> list[int]:
    """The path's tokens without those of its last turn's own."""
    tokens = path_token_ids(path)
    return tokens[: len(tokens) - len(path[-1].token_ids)]


def _busy(session_id: str, running: Generation | None, *, full: bool = False) -> SessionBusy:
    """`full`: as many wait for it as may."""
    name = "an answer" if running is None else running.id
    busy = f"the session {session_id} is busy with {name}"
    if full:
        return SessionBusy(
            f"{busy}, and {MAX_QUEUED_TURNS} requests wait for it already, as many as may; send "
            "this one again when some of them are answered"
        )
    return SessionBusy(
        f'{busy}; wait for its end, cancel it, or send `on_busy`: "queue" or "cancel_previous"'
    )
