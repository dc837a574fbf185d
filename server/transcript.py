"""Transcripts: a whole session as a document, out and back in."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from model.engine.request import MAX_GRAMMAR_BYTES, Grammar, SamplingParams
from server.api.body import Body, Part
from server.api.chat import MAX_MESSAGES, ChatMessage
from server.api.sampling import MAX_SEED, Stops
from server.api.session_fields import Defaults, Metadata, Text, Title
from server.api.tool_fields import MAX_TOOLS
from server.errors import InvalidRequest
from server.store.records import SessionRecord, TurnRecord
from server.store.schema import text_of
from server.text.answer_text import Markup
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import NAME
from server.turns import drawn_by

FORMAT, VERSION = "headwater.session", 1
MAX_TURNS = 10_000
MAX_GRAMMARS = 16  # different ones in a transcript; each is tried before it is taken
MAX_BESIDE_BYTES = 1 << 20

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 32)]], Field(fail_fast=True)]
Time = Annotated[float, Field(ge=0, lt=1e11)]


class ItemText(Body):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


def _drawn_with(value: object) -> dict[str, Any]:
    """Parameters as an answer's notes have them, within the bounds that a request's have. Raises
    ValueError."""
    try:
        params = msgspec.convert(value, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    fields = msgspec.structs.asdict(params)
    for name in ("prompt_logprobs", "prompt_index", "choice_index"):
        if fields.pop(name):
            raise ValueError(f"`{name}` is nothing that an answer of a session has")
    grammar: Grammar | None = fields.pop("grammar")
    if grammar is not None and len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"`grammar` must have at most {MAX_GRAMMAR_BYTES} bytes")
    seed = params.seed if params.seed <= MAX_SEED else params.seed - 2**64
    try:
        Defaults.model_validate(
            {**fields, "seed": seed, "stop_token_ids": list(params.stop_token_ids)}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"`{first['loc'][0]}`: {first['msg']}") from None
    return msgspec.to_builtins(params)  # type: ignore[no-any-return]


def _said_beside(value: object) -> dict[str, Any]:
    """What a message has beside role and text (tool calls, a name), as a request has it. Raises
    ValueError."""
    if not isinstance(value, dict) or value.keys() & {"role", "content"}:
        raise ValueError("it must be an object without `role` and `content`")
    try:
        ChatMessage.model_validate({"role": "assistant", "content": "", **value})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"`{first['loc'][0]}`: {first['msg']}") from None
    if len(msgspec.json.encode(value)) > MAX_BESIDE_BYTES:
        raise ValueError(f"it must have at most {MAX_BESIDE_BYTES} bytes")
    return value


def _read_with(value: object) -> dict[str, Any]:
    """How a response's answer is read, within the bounds that a request's tools have. Raises
    ValueError."""
    try:
        markup = msgspec.convert(value, Markup)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if len(markup.tools) > MAX_TOOLS:
        raise ValueError(f"it must have at most {MAX_TOOLS} tools")
    if not all(re.fullmatch(NAME, name) for name in markup.tools):
        raise ValueError("its tools must be names of functions")
    return msgspec.to_builtins(markup)  # type: ignore[no-any-return]


class ResponseNotes(Part):
    """What makes an answer's text a response's items."""

    markup: Annotated[dict[str, Any], BeforeValidator(_read_with)]


class Notes(Part):
    """What going on with a turn needs; what its other notes report says nothing elsewhere."""

    params: Annotated[dict[str, Any], BeforeValidator(_drawn_with)] | None = None
    stop: Stops = Field(default=[])
    model: str | None = Field(default=None, max_length=256)
    dropped: int = Field(default=0, ge=0, le=MAX_TURNS)
    message: Annotated[dict[str, Any], BeforeValidator(_said_beside)] | None = None
    response: ResponseNotes | None = None
    generation: str | None = Field(default=None, pattern="^gen_[0-9a-f]{32}$")


class TranscriptTurn(Body):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)
    parent: str | None = Field(default=None, max_length=64)
    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[list[ItemText], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    prompt_token_ids: TokenIds = Field(default_factory=list)
    token_ids: TokenIds = Field(default_factory=list)
    replaces_history: bool = False
    status: Literal["complete", "interrupted"] = "complete"
    finish_reason: str | None = Field(default=None, max_length=64)
    tokenizer: str = Field(max_length=256)
    notes: Notes = Notes()
    created_at: Time


class TranscriptSession(Body):
    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    instructions: Text | None = None
    metadata: Metadata = Field(default_factory=dict)
    defaults: Defaults = Defaults()
    overflow: Literal["error", "drop_oldest"] = "error"
    head: str | None = Field(default=None, max_length=64)
    created_at: Time


class Transcript(Body):
    """What `export` gives and `import` takes."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["headwater.session"]
    version: Literal[1]
    session: TranscriptSession
    turns: Annotated[list[TranscriptTurn], Field(max_length=MAX_TURNS, fail_fast=True)]


def exported(record: SessionRecord, turns: list[TurnRecord]) -> dict[str, Any]:
    """The session with all its branches. What is running is told as interrupted."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "session": {name: getattr(record, name) for name in TranscriptSession.model_fields},
        "turns": [
            {name: getattr(turn, name) for name in TranscriptTurn.model_fields}
            | {
                "status": "interrupted" if turn.status == "running" else turn.status,
                "notes": turn.notes | ({"generation": drawn} if (drawn := drawn_by(turn)) else {}),
            }
            for turn in turns
        ],
    }


def grammars(transcript: Transcript) -> list[Grammar]:
    """The different grammars that its answers were drawn with. Raises InvalidRequest for too
    many."""
    drawn_with = [turn.notes.params or {} for turn in transcript.turns]
    found = {msgspec.convert(p["grammar"], Grammar) for p in drawn_with if p.get("grammar")}
    if len(found) > MAX_GRAMMARS:
        raise InvalidRequest(
            f"`turns`: the answers have {len(found)} different grammars; at most {MAX_GRAMMARS} "
            "are taken",
            param="turns",
        )
    return list(found)


def imported(
    transcript: Transcript, owner: str, tokenizer: Tokenizer, fingerprint: str, vocab_size: int
) -> tuple[SessionRecord, list[TurnRecord]]:
    """The records of a new session. Token ids of this very tokenizer must be what the text says;
    those of another one are kept, and the text is tokenised again when it is gone on with.

    Raises InvalidRequest for a transcript that does not hang together."""
    told = transcript.session
    session = SessionRecord.new(
        owner,
        title=told.title,
        instructions=told.instructions,
        metadata=told.metadata,
        defaults=told.defaults.model_dump(exclude_none=True),
        overflow=told.overflow,
    )
    ids: dict[str, str] = {}
    turns: list[TurnRecord] = []
    for i, turn in enumerate(transcript.turns):
        where = f"turns.{i}"
        if turn.id in ids:
            raise InvalidRequest(f"`{where}.id`: {turn.id!r} is there twice", param=f"{where}.id")
        if turn.parent is not None and turn.parent not in ids:
            raise InvalidRequest(
                f"`{where}.parent`: no turn before it has the id {turn.parent!r}",
                param=f"{where}.parent",
            )
        if turn.tokenizer == fingerprint:
            _check_tokens(turn, where, tokenizer, vocab_size)
        record = TurnRecord.new(
            session.id,
            None if turn.parent is None else ids[turn.parent],
            turn.role,
            content=[item.model_dump() for item in turn.content],
            prompt_token_ids=turn.prompt_token_ids,
            token_ids=turn.token_ids,
            replaces_history=turn.replaces_history,
            status=turn.status,
            finish_reason=turn.finish_reason,
            tokenizer=turn.tokenizer,
            notes=turn.notes.model_dump(exclude_defaults=True) | {"stop": turn.notes.stop},
        )
        record.created_at = turn.created_at
        ids[turn.id] = record.id
        turns.append(record)
    head = told.head
    if head is not None and head not in ids:
        raise InvalidRequest(f"`session.head`: there is no turn {head!r}", param="session.head")
    session.head = None if head is None else ids[head]
    return session, turns


def _check_tokens(turn: TranscriptTurn, where: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    params = turn.notes.params or {}
    every = turn.prompt_token_ids + turn.token_ids + [*params.get("stop_token_ids", ())]
    every += [int(token_id) for token_id in params.get("logit_bias", ())]
    if every and max(every) >= vocab_size:
        raise InvalidRequest(
            f"`{where}`: token {max(every)} is beyond this model's vocabulary", param=where
        )
    text = "".join(item.text for item in turn.content)
    detokenizer = Detokenizer(tokenizer.token_bytes)
    said = "".join([detokenizer.feed(token_id).text for token_id in turn.token_ids])
    drawn = turn.finish_reason is not None or turn.status != "complete"
    if turn.role == "assistant" and drawn:
        # Spelled exactly; half a character at the end shows or does not.
        fits = text in (said, said + detokenizer.finish().text)
    else:  # within what the template puts around it, an answer that was given too
        fits = not turn.token_ids or text.strip() in said
    if not fits:
        raise InvalidRequest(
            f"`{where}.token_ids` do not spell the turn's text; was one of them changed?",
            param=f"{where}.token_ids",
        )


def markdown(record: SessionRecord, path: list[TurnRecord]) -> str:
    """The path for people to read."""
    parts = [f"# {record.title or 'A conversation'}\n"]
    if record.instructions:
        parts.append(f"> {record.instructions}\n".replace("\n", "\n> ").rstrip("> ") + "\n")
    for turn in path:
        note = "" if turn.status == "complete" else f" ({turn.status})"
        parts.append(f"## {turn.role.capitalize()}{note}\n\n{text_of(turn.content)}\n")
    return "\n".join(parts)
