"""What can go wrong in the store. Each message is one line for people.

StoreError                the store cannot be opened, read or written
 ├─ StoreLocked           another server has it
 └─ StoreConflict         one operation contradicts what is stored: an id or key that exists
                          already, or a session, turn or generation that is gone
"""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot be opened, read or written."""


class StoreLocked(StoreError):
    """Another server has the store; the message names it."""


class StoreConflict(StoreError):
    """The operation contradicts what is stored, and changed nothing."""
