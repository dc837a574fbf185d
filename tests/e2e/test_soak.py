"""Minutes of everything at once: nothing grows."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Show
from tests.fixtures.server import Server, serving
from tests.server.test_disconnects import abort_somewhere

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MINUTES = 3
CONCURRENCY = 16


def mixed(server: Server, seed: int) -> None:
    """A tenth of what is asked is left alone, a twentieth read again; the rest are turns, chats and
    responses."""
    chooser = random.Random(seed)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        fields = {"max_tokens": chooser.randint(1, 60), "seed": seed}
        message = {"role": "user", "content": f"Tell me of river {seed}."}
        drawn = chooser.random()
        if drawn < 0.1:
            abort_somewhere(server, seed)
        elif drawn < 0.15:
            body = {"messages": [message], "resumable": True, **fields}
            answer = http.post("/v1/chat/completions", json=body)
            generation = answer.headers["x-headwater-generation"]
            assert http.get(f"/v1/streams/{generation}").status_code == 200
        elif drawn < 0.5:
            session = http.post("/v1/sessions", json={}).json()["id"]
            for text in ("Hello", "And then?"):
                turn = http.post(f"/v1/sessions/{session}/turns", json={"input": text, **fields})
                assert turn.status_code == 200, turn.text
            assert http.delete(f"/v1/sessions/{session}").status_code == 204
        elif drawn < 0.6:
            body = {"input": "Hi", "max_output_tokens": fields["max_tokens"]}
            response = http.post("/v1/responses", json=body).json()["id"]
            assert http.delete(f"/v1/responses/{response}").status_code == 200
        else:
            body = {"messages": [message], "stream": chooser.random() < 0.5, **fields}
            assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.timeout(600)
def test_nothing_grows(tiny_model: Path, show: Show) -> None:
    """What is kept for an hour (logs, keys) is kept for a second here, so that it comes to rest."""
    options = ("--stream-retention", "1", "--disk-cache", "16MiB")
    with serving(str(tiny_model), *options) as server, ThreadPoolExecutor(CONCURRENCY) as pool:
        processes = [psutil.Process(server.process.pid), server.engine]

        def memory() -> list[float]:
            return [process.memory_info().rss / 2**20 for process in processes]

        def rest() -> list[float]:
            server.wait_idle()
            return [server.metric("headwater_asyncio_tasks"), *(p.num_threads() for p in processes)]

        seed, begun, counts, at_rest = 0, time.monotonic(), [], []
        found = []
        for minute in range(MINUTES):
            while time.monotonic() < begun + 60 * (minute + 1):
                list(pool.map(lambda i: mixed(server, i), range(seed, seed + 64)))
                seed += 64
            at_rest.append(rest())
            found.append(memory())
            counts.append(seed)
        show(f"requests by the minute: {counts}; MiB of server and engine: {found}")
        assert server.metric("headwater_engine_restarts_total") == 0
        # The first minute warms up: pools, caches of the tokenizer and of the allocator.
        for now, then in zip(found[-1], found[0], strict=True):
            assert now - then < 8, "it grows"
        assert all(now <= then + 4 for now, then in zip(at_rest[-1], at_rest[0], strict=True))
