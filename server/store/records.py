"""What the store keeps, as it goes in and comes out.

Times are unix seconds, ids are made by the caller. A record that was given to the store must not
be changed before the call returned: it is read in another thread.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

Overflow = Literal["error", "drop_oldest"]
TurnStatus = Literal["complete", "interrupted", "running"]
GenerationKind = Literal["turn", "response", "chat"]
GenerationStatus = Literal["running", "complete", "interrupted", "failed"]


@dataclass(slots=True, kw_only=True)
class SessionRecord:
    """A conversation. `head` is the turn that the next one follows; one that is not `listed` is
    reached by its id only."""

    id: str
    owner: str
    title: str | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    overflow: Overflow = "error"
    head: str | None = None
    listed: bool = True
    created_at: float
    updated_at: float

    @classmethod
    def new(cls, owner: str, **fields: Any) -> SessionRecord:
        """One that begins now, with an id of its own."""
        now = time.time()
        id = f"sess_{secrets.token_hex(16)}"
        return cls(id=id, owner=owner, created_at=now, updated_at=now, **fields)


@dataclass(slots=True, kw_only=True)
class TurnRecord:
    """A node of a session's tree.

    `prompt_token_ids` stand between the parent's tokens and this turn's own `token_ids`; where
    `replaces_history`, they are an entire prompt. Both are valid for the `tokenizer` with that
    fingerprint. `notes` are reports about the turn. `number` grows with each insertion; the store
    gives it."""

    id: str
    session: str
    parent: str | None
    role: str
    content: list[dict[str, Any]] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    replaces_history: bool = False
    status: TurnStatus = "complete"
    finish_reason: str | None = None
    generation: str | None = None
    tokenizer: str
    notes: dict[str, Any] = field(default_factory=dict)
    created_at: float
    number: int = 0

    @classmethod
    def new(cls, session: str, parent: str | None, role: str, **fields: Any) -> TurnRecord:
        """One that is said now, with an id of its own."""
        id = f"turn_{secrets.token_hex(16)}"
        return cls(
            id=id, session=session, parent=parent, role=role, created_at=time.time(), **fields
        )


@dataclass(slots=True, kw_only=True)
class GenerationRecord:
    """One run of the model.

    `resumed_token_ids` are output tokens that an earlier generation of the same turn drew. A
    `response` ends with its client; what else has a session goes on. `params` are opaque bytes,
    `extra` is what else a resumption needs: stop strings, tokenizer, model and markup. `crashes`
    counts the engine deaths that it was running at."""

    id: str
    owner: str
    session: str | None = None
    turn: str | None = None
    kind: GenerationKind
    status: GenerationStatus = "running"
    prompt_token_ids: list[int]
    resumed_token_ids: list[int] = field(default_factory=list)
    params: bytes
    extra: dict[str, Any] = field(default_factory=dict)
    crashes: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    created_at: float
    ended_at: float | None = None


@dataclass(slots=True)
class TokenChunk:
    """A piece of a generation's log: `token_ids` from output token number `position` on, and
    their logprobs as opaque bytes."""

    generation: str
    position: int
    token_ids: list[int]
    logprobs: bytes | None = None


@dataclass(slots=True, kw_only=True)
class IdempotencyRecord:
    """That the owner's request `key` was accepted: the hash of its body and what it made.

    It replaces one of the same key from before `replaces_before`, which the store does not keep."""

    owner: str
    key: str
    body_hash: str
    target: str
    created_at: float
    replaces_before: float = 0.0


GenerationLog = tuple[list[int], list[bytes]]
"""A generation's token ids in order, and the logprobs of those chunks that have some."""
