"""Idempotency keys on a real store: one request does the work, the others get what it made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import IdempotencyConflict, InvalidRequest
from server.events import Done
from server.generation import Generation
from server.generations import Generations
from server.idempotency import Idempotency, Once
from server.metrics import Metrics
from server.owners import Owner
from server.store.errors import StoreConflict
from server.store.records import SessionRecord
from server.store.store import Store
from server.text.tokenizer import Tokenizer
from tests.fixtures.tiny_tokenizer import write_tokenizer

ANN, BEN = Owner("ann", b"a"), Owner("ben", b"b")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(None, tmp_path / "data")
    yield store
    store.close()


def request(key: str | None, body: bytes = b"{}", path: str = "/v1/sessions") -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [] if key is None else [(b"idempotency-key", key.encode())]
    return Request({"type": "http", "method": "POST", "path": path, "headers": headers}, receive)


def idempotency(store: Store, retention: float = 3600.0) -> Idempotency:
    client = EngineClient()
    generations = Generations(client, None, Metrics(client), max_num_seqs=1, max_queue=0)  # type: ignore
    return Idempotency(store, generations, retention)


class Works:
    """Something that makes a session, as a route does, and counts how often."""

    def __init__(self, store: Store, retention: float = 3600.0) -> None:
        self.keys = idempotency(store, retention)
        self._store = store
        self.count = 0

    async def make(self, once: Once) -> None:
        self.count += 1
        id = f"sess_{self.count}"
        record = SessionRecord(id=id, owner="ann", created_at=1.0, updated_at=1.0)
        if once.record is not None:
            once.record.target = id
        await self._store.create_session(record, once.record)
        once.made = id

    async def __call__(self, sent: Request, owner: Owner = ANN) -> Any:
        async with self.keys.once(sent, owner) as once:
            if once.made is None:
                await self.make(once)
            return once.made


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_without_a_key_each_request_is_done(store: Store) -> None:
    async def work() -> None:
        works = Works(store)
        assert [await works(request(None)) for _ in range(2)] == ["sess_1", "sess_2"]

    run(work)


def test_the_same_request_is_done_once(store: Store) -> None:
    async def work() -> None:
        works = Works(store)
        made = [await works(request("k")) for _ in range(3)]
        assert made == ["sess_1"] * 3
        assert await works(request("another")) == "sess_2"
        assert await works(request("k"), BEN) == "sess_3"  # a key belongs to its owner

    run(work)


def test_concurrent_ones_wait_for_the_first(store: Store) -> None:
    async def work() -> None:
        works = Works(store)
        made = await asyncio.gather(*(works(request("k")) for _ in range(200)))
        assert set(made) == {"sess_1"}

    run(work)


@pytest.mark.parametrize(
    "other", [request("k", b"{ }"), request("k", path="/v1/sessions/import")], ids=["body", "path"]
)
def test_another_request_with_the_key_is_a_conflict(store: Store, other: Request) -> None:
    async def work() -> None:
        works = Works(store)
        await works(request("k"))
        with pytest.raises(IdempotencyConflict) as caught:
            await works(other)
        assert caught.value.headers() == {"x-should-retry": "false"}
        assert works.count == 1
        # Also where only the store knows the key: after a restart.
        with pytest.raises(IdempotencyConflict):
            await Works(store)(other)

    run(work)


def test_a_stored_key_outlives_the_process(store: Store) -> None:
    async def work() -> None:
        assert await Works(store)(request("k")) == "sess_1"
        later = Works(store)
        made = await asyncio.gather(*(later(request("k")) for _ in range(5)))
        assert (set(made), later.count) == ({"sess_1"}, 0)

    run(work)


def test_a_request_that_fails_leaves_its_key_free(store: Store) -> None:
    async def work() -> None:
        works = Works(store)
        began, go_on = asyncio.Event(), asyncio.Event()

        async def failing() -> None:
            async with works.keys.once(request("k"), ANN):
                began.set()
                await go_on.wait()
                raise InvalidRequest("no")

        first = asyncio.create_task(failing())
        await began.wait()
        others = [asyncio.create_task(works(request("k"))) for _ in range(3)]
        go_on.set()
        with pytest.raises(InvalidRequest):
            await first
        assert {await other for other in others} == {"sess_1"}
        assert works.count == 1

    run(work)


def test_a_request_that_was_left_leaves_its_key_free(store: Store) -> None:
    async def work() -> None:
        works = Works(store)

        @asynccontextmanager
        async def held() -> AsyncIterator[None]:
            async with works.keys.once(request("k"), ANN):
                yield

        async def hanging() -> None:
            async with held():
                await asyncio.Event().wait()

        task = asyncio.create_task(hanging())
        while not works.keys._entries:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await works(request("k")) == "sess_1"

    run(work)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_expired_key_stands_for_nothing(store: Store, restarted: bool) -> None:
    """Also while the store still has it: nobody has cleaned up there."""
    body = b'{"title": "x"}'

    async def work() -> None:
        works = Works(store, retention=1e-9)
        assert await works(request("k")) == "sess_1"
        stored = await store.idempotent("ann", "k")
        assert stored is not None and stored.target == "sess_1"
        if restarted:
            works.keys = idempotency(store, 1e-9)
        assert await works(request("k", body)) == "sess_2"
        stored = await store.idempotent("ann", "k")
        assert stored is not None and stored.target == "sess_2"
        # And now it stands for that, in this process and in the next.
        lasting = Works(store)
        assert await lasting(request("k", body)) == "sess_2"
        with pytest.raises(IdempotencyConflict):
            await lasting(request("k"))
        assert lasting.count == 0

    run(work)


def test_a_key_that_has_not_expired_is_not_replaced(store: Store) -> None:
    """The store itself says no, should a request get past the look-up."""

    async def work() -> None:
        works = Works(store)
        await works(request("k"))
        async with idempotency(store).once(request("other"), ANN) as once:
            assert once.record is not None
            once.record.key = "k"
            record = SessionRecord(id="sess_9", owner="ann", created_at=1.0, updated_at=1.0)
            with pytest.raises(StoreConflict):
                await store.create_session(record, once.record)
        assert await store.session("ann", "sess_9") is None

    run(work)


@pytest.mark.parametrize(("length", "fits"), [(1, True), (255, True), (256, False), (0, False)])
def test_the_length_of_keys(store: Store, length: int, fits: bool) -> None:
    async def work() -> None:
        works = Works(store)
        if fits:
            assert await works(request("k" * length)) == "sess_1"
            return
        with pytest.raises(InvalidRequest) as caught:
            await works(request("k" * length))
        assert caught.value.param == "Idempotency-Key"

    run(work)


def plain(tokenizer: Tokenizer, prompt: list[int]) -> Generation:
    return Generation(
        id="gen_0",
        owner=ANN,
        prompt_token_ids=prompt,
        params=SamplingParams(),
        stop=(),
        tokenizer=tokenizer,
        on_end=lambda generation, event: generation.publish(event),
    )


def test_a_plain_answer_that_was_cancelled_is_made_again(store: Store, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)

    async def work() -> None:
        keys = idempotency(store)

        async def ask() -> Any:
            async with keys.once(request("k"), ANN) as once:
                if once.made is None:
                    once.made = [plain(tokenizer, [5])]
                return once.made

        first = await ask()
        assert await ask() is first
        first[0].cancel()  # its client left
        second = await ask()
        assert second is not first
        second[0].publish(Done("stop"))
        assert await ask() is second

    run(work)


def test_plain_answers_are_kept_as_far_as_their_tokens_take_little_room(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.idempotency.MAX_TOKENS", 1000)
    monkeypatch.setattr("server.idempotency.LOOKED_AT", 4)
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)

    async def work() -> None:
        keys = idempotency(store)
        made: list[int] = []

        async def ask(key: int, num_tokens: int = 200) -> None:
            async with keys.once(request(f"k{key}"), ANN) as once:
                if once.made is None:
                    made.append(key)
                    once.made = [plain(tokenizer, [5] * num_tokens)]

        for key in range(12):
            await ask(key)
        assert len(keys._entries) <= 5 + 4  # they are counted with every fourth request
        made.clear()
        await ask(11)  # the newest is there
        assert made == []
        await ask(0)  # the oldest is not
        assert made == [0]

    run(work)
