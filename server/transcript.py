"""Transcripts: a whole session as a document, out and back in."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidRequest
from server.store.records import SessionRecord, TurnRecord
from server.store.schema import text_of
from server.text.detokenizer import shown_text
from server.text.tokenizer import Tokenizer

FORMAT, VERSION = "headwater.session", 1
MAX_TURNS = 10_000

TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 32)]]


class ItemText(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class TranscriptTurn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)
    parent: str | None = Field(default=None, max_length=64)
    role: Literal["system", "user", "assistant", "tool"]
    content: list[ItemText]
    prompt_token_ids: TokenIds = []
    token_ids: TokenIds = []
    replaces_history: bool = False
    status: Literal["complete", "interrupted"] = "complete"
    finish_reason: str | None = Field(default=None, max_length=64)
    tokenizer: str = Field(max_length=256)
    notes: dict[str, Any] = {}
    created_at: float


class TranscriptSession(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str | None = Field(default=None, max_length=1024)
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    overflow: Literal["error", "drop_oldest"] = "error"
    head: str | None = None
    created_at: float


class Transcript(BaseModel):
    """What `export` gives and `import` takes."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["headwater.session"]
    version: Literal[1]
    session: TranscriptSession
    turns: Annotated[list[TranscriptTurn], Field(max_length=MAX_TURNS)]


def exported(record: SessionRecord, turns: list[TurnRecord]) -> dict[str, Any]:
    """The session with all its branches. What is running is told as interrupted."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "session": {name: getattr(record, name) for name in TranscriptSession.model_fields},
        "turns": [
            {name: getattr(turn, name) for name in TranscriptTurn.model_fields}
            | {"status": "interrupted" if turn.status == "running" else turn.status}
            for turn in turns
        ],
    }


def imported(
    transcript: Transcript, owner: str, tokenizer: Tokenizer, fingerprint: str
) -> tuple[SessionRecord, list[TurnRecord]]:
    """The records of a new session. Token ids of this very tokenizer must be what the text says;
    those of another one are kept, and the text is tokenised again when it is gone on with.

    Raises InvalidRequest for a transcript that does not hang together."""
    session_id = f"sess_{secrets.token_hex(16)}"
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
            _check_tokens(turn, where, tokenizer)
        ids[turn.id] = f"turn_{secrets.token_hex(16)}"
        turns.append(
            TurnRecord(
                id=ids[turn.id],
                session=session_id,
                parent=None if turn.parent is None else ids[turn.parent],
                role=turn.role,
                content=[item.model_dump() for item in turn.content],
                prompt_token_ids=turn.prompt_token_ids,
                token_ids=turn.token_ids,
                replaces_history=turn.replaces_history,
                status=turn.status,
                finish_reason=turn.finish_reason,
                tokenizer=turn.tokenizer,
                # What a cache held elsewhere says nothing here.
                notes={k: turn.notes[k] for k in ("params", "stop", "dropped") if k in turn.notes},
                created_at=turn.created_at,
            )
        )
    head = transcript.session.head
    if head is not None and head not in ids:
        raise InvalidRequest(f"`session.head`: there is no turn {head!r}", param="session.head")
    now = time.time()
    record = SessionRecord(
        id=session_id,
        owner=owner,
        title=transcript.session.title,
        instructions=transcript.session.instructions,
        metadata=transcript.session.metadata,
        defaults=transcript.session.defaults,
        overflow=transcript.session.overflow,
        head=None if head is None else ids[head],
        created_at=now,
        updated_at=now,
    )
    return record, turns


def _check_tokens(turn: TranscriptTurn, where: str, tokenizer: Tokenizer) -> None:
    every = turn.prompt_token_ids + turn.token_ids
    if every and max(every) >= len(tokenizer.token_bytes):
        raise InvalidRequest(
            f"`{where}`: token {max(every)} is beyond this model's vocabulary", param=where
        )
    text = "".join(item.text for item in turn.content)
    said = shown_text(tokenizer.token_bytes, turn.token_ids)
    # An answer's tokens spell it exactly; another turn's also what the template puts around it.
    fits = said == text if turn.role == "assistant" else not turn.token_ids or text.strip() in said
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
