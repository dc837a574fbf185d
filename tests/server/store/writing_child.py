"""A server's store in a process of its own, to be killed: `URL FOLDER ROUND` writes for ever and
prints what was acknowledged; with `hold` for a round it only opens the store."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

from server.store.records import TokenChunk
from server.store.store import Store
from tests.server.store.making import a_generation, a_session, a_turn

NUM_WRITERS = 8


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def write(store: Store, name: str) -> None:
    await store.create_session(a_session(f"s{name}"))
    await store.begin(
        [a_turn(f"t{name}", f"s{name}", status="running")],
        a_generation(f"g{name}", session=f"s{name}", turn=f"t{name}"),
        head=(f"s{name}", f"t{name}"),
        updated_at=1.0,
    )
    position = 0
    while True:
        count = 1 + position % 3
        token_ids = list(range(position, position + count))
        await store.log_tokens([TokenChunk(f"g{name}", position, token_ids)])
        position += count
        tell(f"g{name} {position}")


async def main() -> None:
    url, folder, number = sys.argv[1:]
    store = Store.open(url or None, Path(folder), "http://127.0.0.1:8123")
    if number == "hold":
        tell("open")
        threading.Event().wait()
    await asyncio.gather(*(write(store, f"{number}-{n}") for n in range(NUM_WRITERS)))


if __name__ == "__main__":
    asyncio.run(main())
