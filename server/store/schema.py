"""The tables, as SQLAlchemy Core; the same on SQLite and PostgreSQL.

`migrations/` makes them, and a test compares the two. Strings of people are JSON inside text, since
PostgreSQL's text takes no NUL and no half of a surrogate pair; `search` holds them folded.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


def plain(text: str) -> str:
    """`text` without the characters that not every database takes (NUL, halves of pairs)."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


class Name(TypeDecorator[str]):
    """An id, an owner or a key. One that no database could hold is not found, and no error."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else plain(value)


class TokenIds(TypeDecorator[list[int]]):
    """Token ids as little-endian uint32."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: list[int] | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002
        return None if value is None else struct.pack(f"<{len(value)}I", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[int] | None:  # noqa: ARG002
        return None if value is None else list(struct.unpack(f"<{len(value) // 4}I", value))


class Json(TypeDecorator[Any]):
    """A JSON value inside text; None is NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        if value is None:
            return None
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which only its escape can carry
            text = json.dumps(value, separators=(",", ":"))
        return text

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


# SQLite counts up by itself only in a column whose type is INTEGER.
_Number = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()

session = Table(
    "session",
    metadata,
    Column("id", Name, primary_key=True),
    Column("owner", Name, nullable=False),
    Column("title", Json),
    Column("instructions", Json),
    Column("metadata", Json, nullable=False),
    Column("defaults", Json, nullable=False),
    Column("overflow", Text, nullable=False),
    Column("head", Name),
    Column("listed", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("search", Text, nullable=False),
)
Index(
    "session_newest",
    session.c.owner,
    session.c.listed,
    session.c.updated_at.desc(),
    session.c.id.desc(),
)

turn = Table(
    "turn",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("id", Name, nullable=False),
    Column("session", Name, ForeignKey("session.id", ondelete="CASCADE"), nullable=False),
    Column("parent", Name),
    Column("role", Text, nullable=False),
    Column("content", Json, nullable=False),
    Column("prompt_token_ids", TokenIds, nullable=False),
    Column("token_ids", TokenIds, nullable=False),
    Column("replaces_history", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    Column("finish_reason", Text),
    Column("generation", Name),
    Column("tokenizer", Text, nullable=False),
    Column("notes", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("search", Text, nullable=False),
    UniqueConstraint("id", name="turn_id"),
    # a parent is a turn of the same session
    UniqueConstraint("session", "id", name="turn_session_id"),
    ForeignKeyConstraint(["session", "parent"], ["turn.session", "turn.id"], name="turn_of_parent"),
    Index("turn_session", "session", "number"),
    Index("turn_parent", "session", "parent"),
    sqlite_autoincrement=True,  # the number of a deleted turn is not given again
)

generation = Table(
    "generation",
    metadata,
    Column("id", Name, primary_key=True),
    Column("owner", Name, nullable=False),
    Column("session", Name, ForeignKey("session.id", ondelete="CASCADE")),
    Column("turn", Name),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("prompt_token_ids", TokenIds, nullable=False),
    Column("resumed_token_ids", TokenIds, nullable=False),
    Column("params", LargeBinary, nullable=False),
    Column("extra", Json, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("finish_reason", Text),
    Column("error", Json),
    Column("usage", Json),
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),
    Index("generation_status", "status"),
    Index("generation_session", "session"),
    Index("generation_ended_at", "ended_at"),
)
# Those whose log is still there: most of the ended ones are expired, and only known to have been.
Index(
    "generation_with_log",
    generation.c.ended_at,
    sqlite_where=generation.c.usage.is_not(None),
    postgresql_where=generation.c.usage.is_not(None),
)

generation_tokens = Table(
    "generation_tokens",
    metadata,
    Column("generation", Name, ForeignKey("generation.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("token_ids", TokenIds, nullable=False),
    Column("logprobs", LargeBinary),
    PrimaryKeyConstraint("generation", "position"),
)

# `position` counts the blocks of a sequence from its root. What a turn above has is not repeated.
turn_block = Table(
    "turn_block",
    metadata,
    Column("turn", Name, ForeignKey("turn.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("key", LargeBinary, nullable=False),
    PrimaryKeyConstraint("turn", "position"),
    Index("turn_block_key", "key"),
)

dropped_block = Table(
    "dropped_block",
    metadata,
    Column("key", LargeBinary, primary_key=True),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", Name, nullable=False),
    Column("key", Name, nullable=False),
    Column("body_hash", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    PrimaryKeyConstraint("owner", "key"),
    Index("idempotency_created_at", "created_at"),
)


def fold(text: str) -> str:
    """`text` as it is searched: without case, and of characters that every database takes."""
    return plain(text.casefold())


def text_of(content: Any) -> str:
    """The text in content items, however deep, one a line."""
    return "\n".join(_texts(content))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str):
                if name in ("text", "content"):
                    yield inner
            else:
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
