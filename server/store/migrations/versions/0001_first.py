"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "session",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("title", sa.Text),
        sa.Column("instructions", sa.Text),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("defaults", sa.Text, nullable=False),
        sa.Column("overflow", sa.Text, nullable=False),
        sa.Column("head", sa.Text),
        sa.Column("listed", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.Column("search", sa.Text, nullable=False),
    )
    op.create_index(
        "session_newest",
        "session",
        ["owner", "listed", sa.text("updated_at DESC"), sa.text("id DESC")],
    )

    op.create_table(
        "turn",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("session", sa.Text, _parent("session.id"), nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("replaces_history", sa.Boolean, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.Text),
        sa.Column("generation", sa.Text),
        sa.Column("tokenizer", sa.Text, nullable=False),
        sa.Column("notes", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("search", sa.Text, nullable=False),
        sa.UniqueConstraint("id", name="turn_id"),
        sa.UniqueConstraint("session", "id", name="turn_session_id"),
        sa.ForeignKeyConstraint(
            ["session", "parent"], ["turn.session", "turn.id"], name="turn_of_parent"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("turn_session", "turn", ["session", "number"])
    op.create_index("turn_parent", "turn", ["session", "parent"])

    op.create_table(
        "generation",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("session", sa.Text, _parent("session.id")),
        sa.Column("turn", sa.Text),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("resumed_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("params", sa.LargeBinary, nullable=False),
        sa.Column("extra", sa.Text, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("finish_reason", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("usage", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
    )
    op.create_index("generation_status", "generation", ["status"])
    op.create_index("generation_session", "generation", ["session"])
    op.create_index("generation_ended_at", "generation", ["ended_at"])
    op.create_index(
        "generation_with_log",
        "generation",
        ["ended_at"],
        sqlite_where=sa.text("usage IS NOT NULL"),
        postgresql_where=sa.text("usage IS NOT NULL"),
    )

    op.create_table(
        "generation_tokens",
        sa.Column("generation", sa.Text, _parent("generation.id"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("logprobs", sa.LargeBinary),
        sa.PrimaryKeyConstraint("generation", "position"),
    )

    op.create_table(
        "turn_block",
        sa.Column("turn", sa.Text, _parent("turn.id"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("turn", "position"),
    )
    op.create_index("turn_block_key", "turn_block", ["key"])
    op.create_table("dropped_block", sa.Column("key", sa.LargeBinary, primary_key=True))

    op.create_table(
        "idempotency",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("body_hash", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", "key"),
    )
    op.create_index("idempotency_created_at", "idempotency", ["created_at"])


def _parent(column: str) -> sa.ForeignKey:
    return sa.ForeignKey(column, ondelete="CASCADE")
