"""What can go wrong in the store. Each message is one line for people.

StoreError                the store cannot be opened, read or written
 ├─ StoreLocked           another server has it
 └─ StoreConflict         one operation contradicts what is stored: an id or key that exists
                          already, or a session, turn or generation that is gone
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError


class StoreError(Exception):
    """The store cannot be opened, read or written."""


class StoreLocked(StoreError):
    """Another server has the store; the message names it."""


class StoreConflict(StoreError):
    """The operation contradicts what is stored, and changed nothing."""


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
