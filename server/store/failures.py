"""What the database said, as the store's own errors."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from server.store.errors import StoreConflict, StoreError


def store_error(error: Exception, where: str) -> Exception:
    """`error` of the database `where` as a StoreError; what is no database's error, as it is."""
    if not isinstance(error, SQLAlchemyError | sqlite3.Error):
        return error
    said = error.orig if isinstance(error, DBAPIError) else error
    why = " ".join(str(said).split()) or type(said).__name__
    if isinstance(error, IntegrityError):
        return StoreConflict(f"this contradicts what is in the store {where}: {why}")
    return StoreError(f"the store {where} cannot be used: {why}")


def is_unreachable(error: Exception) -> bool:
    """Whether the connection was lost, or none could be made: it may go better a moment later."""
    if not isinstance(error, DBAPIError):
        return False
    # psycopg gives a server's answers a sqlstate, and failures to reach the server none
    silent = isinstance(error, OperationalError) and getattr(error.orig, "sqlstate", "") is None
    return error.connection_invalidated or silent
