"""Turns: the records of what is new in a session, from the tokens that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.cache_report import computed_tokens
from server.store.records import TurnRecord
from server.text.history import Extension

MESSAGE_FIELDS = {"role", "content"}  # what else a message has goes into its turn's notes
_ENDED_NOTES = ("ended_at", "prompt_tokens", "cached_tokens", "usage")


def new_turns(
    session: str,
    path: Sequence[TurnRecord],
    messages: Sequence[dict[str, Any]],
    extension: Extension,
    fingerprint: str,
) -> list[TurnRecord]:
    """The turns of messages that come after `path`, in the session of that id. `fingerprint` is
    that of the tokenizer and the template that gave them their tokens."""
    turns: list[TurnRecord] = []
    for message, (before, own) in zip(messages, extension.turns, strict=True):
        turn = TurnRecord.new(
            session,
            _last([*path, *turns]),
            message["role"],
            content=[{"type": "text", "text": message["content"]}],
            prompt_token_ids=before,
            token_ids=own,
            replaces_history=extension.replaces_history and not turns,
            tokenizer=fingerprint,
        )
        if turn.replaces_history:
            turn.notes = _rewrite(extension)
        beside = {key: value for key, value in message.items() if key not in MESSAGE_FIELDS}
        if beside:
            turn.notes["message"] = beside
        turns.append(turn)
    return turns


def new_answer(
    session: str,
    path: Sequence[TurnRecord],
    turns: Sequence[TurnRecord],
    extension: Extension,
    fingerprint: str,
) -> TurnRecord:
    """The turn of an answer that is about to run, after `path` and the new `turns`."""
    anew = extension.replaces_history and not turns
    notes: dict[str, Any] = {"history_tokens": computed_tokens(path)}
    if anew or extension.rewrite is not None:
        notes |= _rewrite(extension)
    return TurnRecord.new(
        session,
        _last([*path, *turns]),
        "assistant",
        prompt_token_ids=extension.generation_prompt,
        replaces_history=anew,
        status="running",
        tokenizer=fingerprint,
        notes=notes,
    )


def keep_response(turn: TurnRecord) -> None:
    """Note what a response's answer is before it is gone on with: the response stays that."""
    if "response" not in turn.notes or "responded" in turn.notes:
        return
    turn.notes["responded"] = {
        "content": turn.content,
        "token_ids": turn.token_ids,
        "status": turn.status,
        "finish_reason": turn.finish_reason,
        "generation": turn.generation,
        "notes": {name: turn.notes[name] for name in _ENDED_NOTES if name in turn.notes},
    }
    turn.notes["generation"] = drawn_by(turn)


def as_responded(turn: TurnRecord) -> TurnRecord:
    """The turn as its response has it."""
    if (kept := turn.notes.get("responded")) is None:
        return turn
    return replace(turn, **(kept | {"notes": turn.notes | kept["notes"]}))


def drawn_by(turn: TurnRecord) -> str | None:
    """The generation that the turn's calls are named after: of a copy that of the turn it is a copy
    of, of an answer that was gone on with the first."""
    return turn.notes.get("generation") or turn.generation


def _last(turns: Sequence[TurnRecord]) -> str | None:
    return turns[-1].id if turns else None


def _rewrite(extension: Extension) -> dict[str, Any]:
    notes: dict[str, Any] = {"dropped": extension.dropped} if extension.dropped else {}
    if extension.rewrite is not None:
        notes["rewrite"] = {
            "reason": extension.rewrite.reason,
            "token": extension.rewrite.token,
            "before": extension.rewrite.before,
            "after": extension.rewrite.after,
        }
    return notes
