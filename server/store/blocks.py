"""Which turns have which KV blocks, and the blocks that nobody has and the engine must forget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, Select, bindparam, delete, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from server.store.queries import path_to
from server.store.records import TurnRecord
from server.store.schema import dropped_block, turn, turn_block


def link(connection: Connection, owner: TurnRecord, keys: Sequence[bytes]) -> None:
    """Gives the turn those of the blocks, all of its sequence from the root on, that no turn above
    it has."""
    path = path_to(owner.session, owner.id)
    above: set[bytes] = set()
    own: dict[int, bytes] = {}
    for row in connection.execute(select(turn_block).join(path, turn_block.c.turn == path.c.id)):
        if row.turn == owner.id:
            own[row.position] = row.key
        else:
            above.add(row.key)
    new = {
        position: key
        for position, key in enumerate(keys)
        if key not in above and own.get(position) != key
    }
    if not new:
        return
    rows = [{"turn": owner.id, "position": position, "key": key} for position, key in new.items()]
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(turn_block)
    # An answer that is gone on with has other keys than before where another engine computed it.
    statement = statement.on_conflict_do_update(
        index_elements=["turn", "position"], set_={"key": statement.excluded.key}
    )
    connection.execute(statement, rows)
    used = select(turn_block.c.key).where(turn_block.c.turn == owner.id)
    connection.execute(delete(dropped_block).where(dropped_block.c.key.in_(used)))
    drop(connection, [own[position] for position in new if position in own])


def copy(connection: Connection, copied: Sequence[tuple[str, str]], num_blocks: int) -> None:
    """Gives the second turn of each pair what the first has of the first `num_blocks` blocks."""
    rows = select(
        bindparam("copy", type_=turn_block.c.turn.type), turn_block.c.position, turn_block.c.key
    ).where(turn_block.c.turn == bindparam("original"), turn_block.c.position < num_blocks)
    if copied:
        connection.execute(
            insert(turn_block).from_select(["turn", "position", "key"], rows),
            [{"original": original, "copy": copy} for original, copy in copied],
        )


def keys_of_session(session_id: str) -> Select[tuple[bytes]]:
    has = turn_block.c.turn == turn.c.id
    return select(turn_block.c.key).join(turn, has).where(turn.c.session == session_id)


def drop(connection: Connection, keys: Sequence[bytes]) -> list[bytes]:
    """Notes that those of the blocks that no turn has are to be forgotten, and returns them."""
    used: set[bytes] = set()
    for some in _batches(keys):
        used.update(connection.scalars(select(turn_block.c.key).where(turn_block.c.key.in_(some))))
    unused = [key for key in dict.fromkeys(keys) if key not in used]
    if unused:
        dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
        statement = dialect.insert(dropped_block).on_conflict_do_nothing()
        connection.execute(statement, [{"key": key} for key in unused])
    return unused


def forgotten(connection: Connection, keys: Sequence[bytes]) -> None:
    for some in _batches(keys):
        connection.execute(delete(dropped_block).where(dropped_block.c.key.in_(some)))


def _batches(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    """Databases bound the number of a statement's parameters."""
    return (keys[start : start + 10_000] for start in range(0, len(keys), 10_000))
