"""A connection to PostgreSQL that is lost when nothing is answered.

TCP tells of a machine that is gone, not of a server that stands still.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")
ANSWER_SECONDS = 10.0


class AnsweredConnection(psycopg.Connection[Any]):
    """What it is asked must be answered within `ANSWER_SECONDS`."""

    def wait(
        self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None
    ) -> T:
        begun = time.monotonic()
        try:
            return super().wait(gen, interval, timeout or ANSWER_SECONDS)
        except psycopg.OperationalError:
            if timeout is None and time.monotonic() - begun >= ANSWER_SECONDS:
                self.pgconn.finish()
                raise psycopg.OperationalError("it does not answer") from None
            raise


def connect(
    _dialect: Any, _record: Any, arguments: list[Any], keywords: dict[str, Any]
) -> AnsweredConnection:
    """For SQLAlchemy's event `do_connect`."""
    return AnsweredConnection.connect(*arguments, **keywords)
