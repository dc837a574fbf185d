"""Responses: answers that are turns of the tree of sessions.

A response's input items are turns, and so is its answer. One with a conversation is appended to the
head of that session, which moves once it came to its end. One with a previous response is a child
of that response's answer, so branches cost nothing, and what they share is found in the KV cache.
One with neither is the beginning of a session that is not listed.

A response has the bits of its generation's id, so that either tells the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
from blake3 import blake3

from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import Conflict, ContextLengthExceeded, InvalidRequest, NotFound
from server.generation import Durable, Generation
from server.generations import Generations
from server.journal import Journal
from server.owners import Owner
from server.prompt import room_for_answer
from server.reader import read
from server.sessions import Sessions, Wish
from server.store.records import (
    GenerationRecord,
    IdempotencyRecord,
    Overflow,
    SessionRecord,
    TurnRecord,
)
from server.store.store import Store
from server.text.answer_text import Markup
from server.text.chat_template import ChatTemplate
from server.text.history import Extension
from server.turns import as_responded, new_answer, new_turns


@dataclass(slots=True, frozen=True)
class Order:
    """What a response is asked for. `applied` gives the parameters for a prompt once it is known,
    and how the answer is to be read. `echo` is what the response tells about its request;
    `template` renders its tools, of which `tools` is a text that tells them apart."""

    messages: Sequence[dict[str, Any]]
    wish: Wish
    applied: Callable[[list[int], SamplingParams], tuple[SamplingParams, Markup]]
    echo: dict[str, Any]
    instructions: str | None = None
    overflow: Overflow = "error"
    conversation: str | None = None  # a session's id
    previous: str | None = None  # a response's id
    store: bool = True
    background: bool = False
    template: ChatTemplate | None = None
    tools: str = ""


@dataclass(slots=True, frozen=True)
class Stored:
    """A response as it is found: its answer's turn, and its generation while its log is there, or
    else the record that is left of that."""

    turn: TurnRecord
    generation: Generation | None
    record: GenerationRecord | None = None


class Responses:
    """The responses of all owners; every method takes the caller, and finds nobody else's."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        generations: Generations,
        client: EngineClient,
        sessions: Sessions,
    ) -> None:
        self._store = store
        self._journal = journal
        self._generations = generations
        self._client = client
        self._sessions = sessions

    async def create(
        self, owner: Owner, order: Order, idempotency: IdempotencyRecord | None = None
    ) -> Generation:
        """Start a response. Its turn is `generation.durable.turn`, where it is stored."""
        self._client.check_ready()
        new = order.conversation is None and order.previous is None
        async with self._before(owner, order) as (session, path):
            return await self._start(owner, session, path, order, idempotency, new=new)

    async def count(self, owner: Owner, order: Order) -> int:
        """How many tokens the prompt has. Nothing is started or kept."""
        self._client.check_ready()
        async with self._before(owner, order) as (session, path):
            extension, _ = await self._extended(session, path, order)
            return len(extension.prompt_token_ids)

    async def conversation(self, owner: Owner, session_id: str) -> SessionRecord:
        """The session that is a conversation. Raises NotFound."""
        record = await self._store.session(owner.name, session_id)
        if record is None or not record.listed:
            id = session_id.replace("sess_", "conv_", 1)
            raise NotFound(f"there is no conversation {id[:64]!r}")
        return record

    async def find(self, owner: Owner, response_id: str) -> Stored:
        """Raises NotFound, also for somebody else's."""
        missing = NotFound(f"there is no response {response_id[:64]!r}")
        if not response_id.startswith("resp_"):
            raise missing
        generation_id = response_id.replace("resp_", "gen_", 1)
        generation = self._generations[generation_id]
        if generation is None or generation.owner.name != owner.name:
            generation = await self._journal.load(owner.name, generation_id)
        record = turn = None
        if generation is not None:
            turn = generation.durable.turn if generation.durable is not None else None
        else:
            record = await self._store.generation(owner.name, generation_id)
            if record is not None and record.session is not None and record.turn is not None:
                turn = await self._store.turn(record.session, record.turn)
        if turn is None or "response" not in turn.notes:
            raise missing
        turn = as_responded(turn)
        if turn.generation != generation_id:  # that one went on with the answer, or with a copy
            raise missing
        return Stored(turn, generation, record)

    async def input_turns(self, stored: Stored) -> list[TurnRecord]:
        """The turns of the response's own input items, in order."""
        path = await self._store.path(stored.turn.session, stored.turn.id)
        count = stored.turn.notes["response"]["num_input_turns"]
        return path[-1 - count : -1]

    async def cancel(self, stored: Stored) -> None:
        """Stop it if it runs, and wait until its end is stored. It is never gone on from. Raises
        Conflict for one that waits for another model."""
        if stored.generation is None and stored.turn.status == "running":
            raise Conflict(
                "the response was begun with another model and goes on when that one is served "
                "again; cancel it then, or delete it"
            )
        await self._stop(stored.generation)

    async def _stop(self, generation: Generation | None) -> None:
        if generation is not None:
            self._generations.cancel(generation)
            async for _ in read([generation], 0):
                pass

    async def delete(self, owner: Owner, stored: Stored) -> None:
        """Its id, its log, and its text as far as no other response builds on it; what is in a
        conversation stays there."""
        await self._stop(stored.generation)
        if self._journal.owes(stored.turn.session):
            raise Conflict("the response could not be stored yet; try again in a moment")
        assert stored.turn.generation is not None
        self._journal.forget(await self._store.delete_response(owner.name, stored.turn.generation))

    # -------------------------------------------------------------------------------- details

    @contextlib.asynccontextmanager
    async def _before(
        self, owner: Owner, order: Order
    ) -> AsyncIterator[tuple[SessionRecord, list[TurnRecord]]]:
        """The session that the response belongs to, and the turns before it, while nobody else
        changes them. Raises NotFound and InvalidRequest."""
        if order.conversation is not None:
            await self.conversation(owner, order.conversation)
            async with self._sessions.free(owner, order.conversation, "queue") as session:
                yield session, await self._sessions.path(session, session.head)
        elif order.previous is not None:
            yield await self._previous(owner, order.previous)
        else:
            yield SessionRecord.new(owner.name, listed=False), []

    async def _previous(
        self, owner: Owner, response_id: str
    ) -> tuple[SessionRecord, list[TurnRecord]]:
        try:
            stored = await self.find(owner, response_id)
        except NotFound as error:
            error.param = "previous_response_id"
            raise
        session = await self._sessions.get(owner, stored.turn.session)
        path = await self._sessions.path(session, stored.turn.id)
        if path[-1].status != "complete":
            running = path[-1].status == "running"
            raise InvalidRequest(
                f"the response {response_id} "
                + ("still runs; wait for its end" if running else "did not come to its end")
                + "; only one that did can be gone on from",
                param="previous_response_id",
            )
        return session, path

    def _fingerprint(self, session: SessionRecord, order: Order) -> str:
        """What the tokens of the order's turns are valid for: what stands before everything is
        part of that, since it is not inherited."""
        own = self._sessions.fingerprint
        if order.instructions in (None, session.instructions) and not order.tools:
            return own
        before = msgspec.json.encode([order.instructions, order.tools])
        return f"{own}-{blake3(before).hexdigest(16)}"

    async def _extended(
        self, session: SessionRecord, path: list[TurnRecord], order: Order
    ) -> tuple[Extension, str]:
        """The order's turns and its prompt as tokens, and what these are valid for."""
        if not path and not order.messages:
            raise InvalidRequest("`input` is missing, and nothing comes before", param="input")
        fingerprint = self._fingerprint(session, order)
        setting = replace(session, overflow=order.overflow)
        if order.instructions is not None:
            setting.instructions = order.instructions
        extension = await self._sessions.extend(
            setting,
            path,
            order.messages,
            self._client.check_ready(),
            order.wish.max_tokens,
            fingerprint,
            order.template,
        )
        return extension, fingerprint

    async def _start(
        self,
        owner: Owner,
        session: SessionRecord,
        path: list[TurnRecord],
        order: Order,
        idempotency: IdempotencyRecord | None,
        *,
        new: bool = False,
    ) -> Generation:
        model = self._client.check_ready()
        extension, fingerprint = await self._extended(session, path, order)
        prompt = extension.prompt_token_ids
        try:
            room = room_for_answer(model, len(prompt), order.wish.max_tokens, param="input")
        except ContextLengthExceeded as error:
            if order.overflow == "error":
                error.message += '; or send `truncation`: "auto"'
            raise
        params, markup = order.applied(prompt, order.wish.params(room))
        if not order.store:
            (generation,) = self._generations.start(
                [prompt], params, owner=owner, stop=order.wish.stop, markup=markup
            )
            return generation
        turns = new_turns(session.id, path, order.messages, extension, fingerprint)
        turn = new_answer(session.id, path, turns, extension, fingerprint)
        turn.notes["response"] = {
            **order.echo,
            "markup": msgspec.to_builtins(markup),
            "num_input_turns": len(turns),
        }
        kind: Literal["turn", "response"] = "turn" if order.background else "response"
        generation = self._generations.make(
            prompt,
            params,
            owner=owner,
            stop=order.wish.stop,
            durable=Durable(kind, session.id, turn),
            markup=markup,
        )
        await self._journal.begin(
            generation, turns, new_session=session if new else None, idempotency=idempotency
        )
        return generation
