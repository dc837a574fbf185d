"""One server a store: who holds it, and how a second one finds out.

A folder is held by a `flock` on its file `lock`, a PostgreSQL database by an advisory lock of the
very connection that writes, so that nothing is ever written without it. Both end with their
holder, however it ends; neither can be left over.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from sqlalchemy import Connection, text

from server.store.errors import StoreError, StoreLocked

ADVISORY_KEY = 0x48454144_57415452  # "HEADWATR"
# A killed holder's backend notices within milliseconds, but not always before its successor starts.
ADVISORY_PATIENCE = 2.0
# One whose machine or network is gone says nothing: PostgreSQL finds out after 20 seconds.
_KEEPALIVES = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "2",
}


def holder(address: str | None) -> str:
    """This process, for people: its id, the address it serves where known, its host."""
    at = f" at {address}" if address else ""
    return f"pid {os.getpid()}{at} on {socket.gethostname()}"


class FolderLock:
    """The lock on a folder. Raises StoreLocked, or StoreError where no lock can be had."""

    def __init__(self, folder: Path, address: str | None) -> None:
        path = folder / "lock"
        try:
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"the data folder {folder} cannot be used: {path}: {error.strerror}; choose "
                "another with HEADWATER_DATA"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = self._file.readline().strip()
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise StoreError(f"{path} cannot be locked: {error.strerror}") from None
            raise _locked(str(folder), who, "choose another with HEADWATER_DATA") from None
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.truncate()
        self._file.write(f"{holder(address)} since {since}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()


def lock_database(connection: Connection, where: str, address: str | None) -> None:
    """Have the connection hold its database's lock, until it ends. Raises StoreLocked."""
    settings = {"application_name": f"headwater {holder(address)}", **_KEEPALIVES}
    for name, value in settings.items():
        connection.execute(
            text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value}
        )
    give_up = time.monotonic() + ADVISORY_PATIENCE
    lock = text("SELECT pg_try_advisory_lock(:key)")
    while not connection.scalar(lock, {"key": ADVISORY_KEY}):
        if time.monotonic() >= give_up:
            raise _locked(where, _database_holder(connection), "choose another database")
        time.sleep(0.05)
    connection.commit()


def _database_holder(connection: Connection) -> str:
    row = connection.execute(
        text(
            "SELECT application_name, backend_start FROM pg_stat_activity JOIN pg_locks USING (pid)"
            " WHERE locktype = 'advisory' AND granted AND objsubid = 1"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND (classid::bigint << 32) | objid::bigint = :key"
        ),
        {"key": ADVISORY_KEY},
    ).one_or_none()
    if row is None or not row.application_name:
        return ""
    since = f" since {row.backend_start:%Y-%m-%dT%H:%M:%S%z}" if row.backend_start else ""
    return f"{row.application_name.removeprefix('headwater ')}{since}"


def _locked(where: str, who: str, remedy: str) -> StoreLocked:
    return StoreLocked(
        f"another server uses the store {where}: {who or 'it left no name'}; stop it, or {remedy}"
    )
