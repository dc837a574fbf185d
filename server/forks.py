"""Forks: the turns of a path over again, and an answer cut at one of its tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from server.errors import InvalidRequest
from server.store.records import TurnRecord
from server.text.detokenizer import shown_text
from server.text.tokenizer import Tokenizer
from server.turns import drawn_by


def copies_of(path: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The same turns with new ids, the first of them a root. Their session is still the old one,
    and they have no generation: that is the original's."""
    parent: str | None = None
    copies = []
    for turn in path:
        copy = replace(
            turn,
            id=f"turn_{secrets.token_hex(16)}",
            parent=parent,
            generation=None,
            notes=dict(turn.notes),
            number=0,
        )
        if (generation := drawn_by(turn)) is not None:
            copy.notes["generation"] = generation
        copies.append(copy)
        parent = copy.id
    return copies


def cut(
    turn: TurnRecord, token: int, next_id: int | None, tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Cut an answer after `token` tokens, with `next_id` as the next one. One that ends the answer
    completes it; else it can be gone on with. Of half a character nothing is shown until the rest
    is there. Raises InvalidRequest."""
    if not 0 <= token <= len(turn.token_ids):
        raise InvalidRequest(
            f"`token` must be from 0 to {len(turn.token_ids)}, the length of the answer",
            param="token",
        )
    turn.token_ids = turn.token_ids[:token]
    turn.status, turn.finish_reason = "interrupted", None
    if next_id is not None:
        if next_id >= vocab_size:
            raise InvalidRequest(
                f"`replace` must be a token id below {vocab_size}", param="replace"
            )
        turn.token_ids = [*turn.token_ids, next_id]
        turn.notes.pop("cached_tokens", None)  # these tokens no engine has seen
        if next_id in tokenizer.eos_token_ids:
            turn.status, turn.finish_reason = "complete", "stop"
    turn.content = [{"type": "text", "text": shown_text(tokenizer.token_bytes, turn.token_ids)}]
