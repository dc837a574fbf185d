"""Forks: the turns of a path over again, and an answer cut at one of its tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from server.errors import InvalidRequest
from server.store.records import TurnRecord
from server.text.detokenizer import shown_text
from server.text.tokenizer import Tokenizer


def copies_of(path: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The same turns with new ids, the first of them a root. Their session is still the old one,
    and they have no generation: that is the original's."""
    parent: str | None = None
    copies = []
    for turn in path:
        copy = TurnRecord(
            id=f"turn_{secrets.token_hex(16)}",
            session=turn.session,
            parent=parent,
            role=turn.role,
            content=turn.content,
            prompt_token_ids=turn.prompt_token_ids,
            token_ids=turn.token_ids,
            replaces_history=turn.replaces_history,
            status=turn.status,
            finish_reason=turn.finish_reason,
            tokenizer=turn.tokenizer,
            notes=dict(turn.notes),
            created_at=turn.created_at,
        )
        copies.append(copy)
        parent = copy.id
    return copies


def cut(
    turn: TurnRecord, token: int, replace: int | None, tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Cut an answer after `token` tokens, with `replace` as the next one. One that ends the answer
    completes it; else it can be gone on with. Of half a character nothing is shown until the rest
    is there. Raises InvalidRequest."""
    if not 0 <= token <= len(turn.token_ids):
        raise InvalidRequest(
            f"`token` must be from 0 to {len(turn.token_ids)}, the length of the answer",
            param="token",
        )
    turn.token_ids = turn.token_ids[:token]
    turn.status, turn.finish_reason = "interrupted", None
    if replace is not None:
        if replace >= vocab_size:
            raise InvalidRequest(
                f"`replace` must be a token id below {vocab_size}", param="replace"
            )
        turn.token_ids = [*turn.token_ids, replace]
        if replace in tokenizer.eos_token_ids:
            turn.status, turn.finish_reason = "complete", "stop"
    turn.content = [{"type": "text", "text": shown_text(tokenizer.token_bytes, turn.token_ids)}]
