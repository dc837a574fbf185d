"""Where a session's KV is, and why its last answer computed more than what was new."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from server.engine_client import EngineClient
from server.errors import HeadwaterError
from server.store.records import SessionRecord, TurnRecord
from server.text.history import path_token_ids


async def cache_report(
    client: EngineClient, session: SessionRecord, path: Sequence[TurnRecord], salt: bytes
) -> dict[str, Any]:
    """The blocks of the path's tokens by tier, and the report of its last answer. Raises an
    Overloaded error while there is no engine that could be asked."""
    tokens = path_token_ids(path)
    size = client.check_ready().block_size
    states = await client.cached_blocks(tokens, salt) if tokens else []
    tiers = {"device": 0, "host": 0, "disk": 0}
    blocks = []
    for i, state in enumerate(states):
        tier = "device" if state.device else "disk" if state.disk else "none"
        if tier != "none":
            tiers[tier] += size
        blocks.append(
            {
                "index": i,
                "start": i * size,
                "end": (i + 1) * size,
                "tier": tier,
                "device": state.device,
                "disk": state.disk,
            }
        )
    return {
        "object": "session.cache",
        "session": session.id,
        "head": session.head,
        "tokens": len(tokens),
        "block_size": size,
        "tiers": {**tiers, "none": len(tokens) - sum(tiers.values())},
        "on_disk": sum(size for state in states if state.disk),
        "blocks": blocks,
        "last_turn": _last_answer(path),
    }


async def computed_blocks(
    client: EngineClient, turns: Sequence[TurnRecord], salt: bytes
) -> list[bytes]:
    """The keys of all blocks that a session's branches can have, while an engine can tell; the
    store knows those of the answers that ended."""
    if not client.has_engine:
        return []
    there = {turn.id: turn for turn in turns}
    inner = {turn.parent for turn in turns}
    keys: list[bytes] = []
    for leaf in there.keys() - inner:
        path = []
        at: str | None = leaf
        while at is not None:
            path.append(there[at])
            at = there[at].parent
        if not any("history_tokens" in turn.notes for turn in path):
            continue  # nothing of it was ever computed here
        with contextlib.suppress(HeadwaterError):  # the engine went away meanwhile
            states = await client.cached_blocks(path_token_ids(path[::-1]), salt)
            keys += [state.key for state in states]
    return keys


def computed_tokens(path: Sequence[TurnRecord]) -> int:
    """How many of the path's tokens an engine of this server has seen: those up to the end of the
    last answer that was made here."""
    made = [i for i, turn in enumerate(path) if "cached_tokens" in turn.notes]
    return len(path_token_ids(path[: made[-1] + 1])) if made else 0


def _last_answer(path: Sequence[TurnRecord]) -> dict[str, Any] | None:
    """What the path's last answer found in the cache, and why it found no more."""
    answer = next((turn for turn in reversed(path) if "cached_tokens" in turn.notes), None)
    if answer is None:
        return None
    notes = answer.notes
    report: dict[str, Any] = {
        "turn": answer.id,
        "prompt_tokens": notes["prompt_tokens"],
        "cached_tokens": notes["cached_tokens"],
        "expected_tokens": notes["expected_tokens"],
        "miss": None,
    }
    if "rewrite" in notes:
        report["miss"] = notes["rewrite"]
    elif sum(notes["cached_tokens"].values()) < notes["expected_tokens"]:
        corrupt = notes.get("corrupt_blocks", 0) > 0
        report["miss"] = {
            "reason": "corrupt" if corrupt else "evicted",
            "token": sum(notes["cached_tokens"].values()),
        }
    return report
