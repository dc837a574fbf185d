"""Streams that are cut: wherever, however often, whatever dies in between, no text is lost."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.session_client import connected
from tests.e2e.streams import Reader, stream_events
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.e2e

NUM_TOKENS = 256
BODY = {
    "messages": [{"role": "user", "content": "Tell me of rivers."}],
    "stream": True,
    "resumable": True,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "seed": 7,
    "temperature": 1.0,
}
VARIANTS = ("greedy", "sampled", "characters", "stops", "stopped", "logprobs")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with serving(str(tiny_model), "--max-num-seqs", "32") as server:
        yield server


def begin(client: httpx.Client, **fields: Any) -> str:
    """Send the request, and leave as soon as it is taken. Returns the generation's id."""
    with client.stream("POST", "/v1/chat/completions", json={**BODY, **fields}) as response:
        assert response.status_code == 200, response.read()
        return response.headers["x-headwater-generation"]


def uncut(client: httpx.Client, **fields: Any) -> Reader:
    """The generation as one connection sees it, from its first token to its last."""
    return Reader(client, begin(client, **fields)).read_all()


def fields_of(variant: str, client: httpx.Client) -> dict[str, Any]:
    """What makes text be held back in some other way."""
    match variant:
        case "greedy":
            return {"temperature": 0}
        case "characters":  # the bytes of two emoji, in any order: halves and wholes
            said = client.post("/tokenize", json={"text": "😀🦊", "add_special_tokens": False})
            return {"logit_bias": {str(id_): 100 for id_ in said.json()["tokens"]}}
        case "stops" | "stopped":
            text = uncut(client).text
            common = [c for c, _ in Counter(text).most_common(15) if c.isprintable()]
            stops = [f"{c}{c}\x00never" for c in common[:7]] + [f"{c}\x00" for c in common[7:]]
            if variant == "stopped":
                at = 2 * len(text) // 3
                stops.append(text[at : at + 5])
            return {"stop": stops}
        case "logprobs":
            return {"logprobs": True, "top_logprobs": 2}
    return {}


def same(reader: Reader, whole: Reader) -> None:
    """`reader`, in its pieces, has got what `whole` got."""
    assert reader.text == whole.text
    assert reader.done is not None and whole.done is not None
    assert reader.done["finish_reason"] == whole.done["finish_reason"]
    assert reader.place == whole.place
    if not reader.chat:
        assert reader.token_ids == whole.token_ids
        assert reader.logprobs == whole.logprobs
        assert (
            reader.done["usage"]["completion_tokens"] == (whole.done["usage"]["completion_tokens"])
        )


@pytest.mark.parametrize("chat", [False, True], ids=["events", "chat"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_stream_is_read_on_from_every_place(
    client: httpx.Client, variant: str, chat: bool
) -> None:
    whole = uncut(client, **fields_of(variant, client))
    assert len(whole.token_ids) == NUM_TOKENS or variant == "stopped"
    if chat:
        chunks = Reader(client, whole.generation, chat=True).read_all()
        same(chunks, whole)
        assert len(chunks.logprobs) == len(whole.logprobs)
        whole.logprobs = chunks.logprobs
    for place in range(0, whole.place, 7 if chat else 1):
        rest = Reader(client, whole.generation, chat, place).read_all()
        assert whole.text.endswith(rest.text)
        assert rest.place == whole.place
        if place in whole.shown:  # where the live stream could have been cut
            assert whole.shown[place] + rest.text == whole.text, place
        num_had = min(max(place - 1, 0), len(whole.token_ids))
        assert rest.logprobs == whole.logprobs[num_had:]
        if not chat:
            assert rest.token_ids == whole.token_ids[num_had:]
    for place in (whole.place, whole.place + 1):
        ended = client.get(f"/v1/streams/{whole.generation}", headers={"last-event-id": str(place)})
        assert (ended.status_code, ended.content) == (204, b"")


@pytest.mark.parametrize("chat", [False, True], ids=["events", "chat"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_live_stream_is_cut_after_every_event(
    client: httpx.Client, variant: str, chat: bool
) -> None:
    fields = fields_of(variant, client)
    whole = uncut(client, **fields)
    reader = Reader(client, begin(client, **fields), chat)
    while not reader.read(1):
        pass
    if chat:
        whole.logprobs = Reader(client, whole.generation, chat=True).read_all().logprobs
        assert reader.logprobs == whole.logprobs
    same(reader, whole)
    assert reader.generation != whole.generation


def test_random_double_cuts(server: Server) -> None:
    double_cuts(server, 48)


@pytest.mark.slow
def test_200_random_double_cuts(server: Server) -> None:
    double_cuts(server, 200)


def double_cuts(server: Server, count: int) -> None:
    chooser = random.Random(4)
    with connected(server) as client:
        kinds = [{**fields_of(variant, client), "seed": i} for i, variant in enumerate(VARIANTS)]
        wholes = [uncut(client, **kind) for kind in kinds]

        def cut_twice(cuts: tuple[int, int, int, bool]) -> None:
            which, first, second, chat = cuts
            reader = Reader(client, begin(client, **kinds[which]), chat)
            if not reader.read(first) and not reader.read(second):
                reader.read_all()
            same(reader, wholes[which])

        cuts = [
            (i % len(kinds), chooser.randint(1, 60), chooser.randint(1, 60), i % 3 == 0)
            for i in range(count)
        ]
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(cut_twice, cuts))


# ------------------------------------------------------------------------- deaths in between


def begun(client: httpx.Client, kinds: list[dict[str, Any]]) -> list[Reader]:
    """A live stream of each kind, every one cut at another place (half of them as chat)."""

    def cut(i: int) -> Reader:
        reader = Reader(client, begin(client, **kinds[i]), chat=i % 2 == 1)
        reader.read(1 + 3 * i)
        return reader

    with ThreadPoolExecutor(len(kinds)) as pool:
        return list(pool.map(cut, range(len(kinds))))


def long_kinds(client: httpx.Client) -> list[dict[str, Any]]:
    """Each variant twice: once for a reader of events, once for one of chat chunks."""
    return [kind for v in VARIANTS for kind in [{"max_tokens": 1200, **fields_of(v, client)}] * 2]


def all_uncut(client: httpx.Client, kinds: list[dict[str, Any]]) -> list[Reader]:
    """The same without a cut. Two of a kind say the same, and are asked for once."""
    with ThreadPoolExecutor(len(kinds)) as pool:
        firsts = list(pool.map(lambda kind: uncut(client, **kind), kinds[::2]))
    return [whole for whole in firsts for _ in range(2)]


def finish(client: httpx.Client, readers: list[Reader], wholes: list[Reader]) -> None:
    for reader, whole in zip(readers, wholes, strict=True):
        reader.client = client
        # An event may hold many tokens: some readers were at the end before the cut.
        same(reader if reader.done is not None else reader.read_all(), whole)


def test_cuts_across_an_engine_that_is_killed(wide_model: Path) -> None:
    with serving(str(wide_model)) as server, connected(server) as client:
        kinds = long_kinds(client)
        wholes = all_uncut(client, kinds)
        restarts = server.metric("headwater_engine_restarts_total")
        readers = begun(client, kinds)
        engine = server.engine
        engine.suspend()
        assert server.metric("headwater_requests_running") >= len(kinds) // 2
        engine.kill()
        finish(client, readers, wholes)
        assert server.metric("headwater_engine_restarts_total") == restarts + 1
        server.wait_idle()


def test_cuts_across_a_restart_of_everything(wide_model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    with serving(str(wide_model), env=env) as first, connected(first) as client:
        kinds = long_kinds(client)
        wholes = all_uncut(client, kinds)
        readers = begun(client, kinds)
        first.engine.suspend()
        assert first.metric("headwater_requests_running") >= len(kinds) // 2
        first.kill_all()
    with serving(str(wide_model), env=env) as second, connected(second) as client:
        assert second.log.count("generation_resumed") >= len(kinds) // 2
        finish(client, readers, wholes)
        second.wait_idle()
        # What had ended before is read as before, from any place.
        for whole in wholes[::2]:
            for place in whole.places[:-1:100]:
                rest = Reader(client, whole.generation, place=place).read_all()
                assert whole.shown[place] + rest.text == whole.text
                assert rest.place == whole.place


# ----------------------------------------------------------------------- the ends of a stream


def test_after_beyond_the_log_waits(client: httpx.Client) -> None:
    whole = uncut(client, max_tokens=400)
    late = Reader(client, begin(client, max_tokens=400), place=301)
    late.read_all()
    assert late.places[0] > 301
    assert late.token_ids == whole.token_ids[300:]
    assert Reader(client, whole.generation, place=301).read_all().text == late.text
    assert whole.text.endswith(late.text)


def test_what_is_no_stream_and_no_place(client: httpx.Client) -> None:
    for id_ in ("gen_" + "0" * 32, "gen_1", "x" * 300):
        for method in ("GET", "DELETE"):
            answer = client.request(method, f"/v1/streams/{id_}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    whole = uncut(client, max_tokens=4)
    for place in ("x", "-1", "1.5", "9" * 13):
        answer = client.get(f"/v1/streams/{whole.generation}", headers={"last-event-id": place})
        assert answer.status_code == 400, place
        assert answer.json()["error"]["param"] == "Last-Event-ID"
    assert client.get(f"/v1/streams/{whole.generation}?after=-1").status_code == 400
    # A browser that reconnects sends the header beside the query it began with.
    both = client.get(
        f"/v1/streams/{whole.generation}?after=1",
        headers={"last-event-id": str(whole.place - 1)},
    )
    assert [event.event for event in stream_events(both)] == ["done"]


def test_a_reader_that_leaves_does_not_cancel_and_delete_does(client: httpx.Client) -> None:
    whole = uncut(client, max_tokens=400)
    assert whole.done is not None
    left = begin(client, max_tokens=400)
    Reader(client, left).read(3)
    assert Reader(client, left).read_all().text == whole.text

    cancelled = Reader(client, begin(client, max_tokens=400))
    cancelled.read(5)
    said = client.delete(f"/v1/streams/{cancelled.generation}").json()
    assert (said["id"], said["object"]) == (cancelled.generation, "generation")
    assert said["finish_reason"] == "abort"
    cancelled.read_all()
    assert cancelled.done is not None and cancelled.done["finish_reason"] == "abort"
    count = len(cancelled.token_ids)
    assert 3 <= count < 400
    assert whole.token_ids[:count] == cancelled.token_ids
    assert whole.text.startswith(cancelled.text)
    # Cancelling what has ended changes nothing.
    assert client.delete(f"/v1/streams/{cancelled.generation}").json() == said
    again = client.delete(f"/v1/streams/{whole.generation}").json()
    assert again["finish_reason"] == whole.done["finish_reason"]


def test_a_stream_expires_and_its_turn_stays(tiny_model: Path) -> None:
    with serving(str(tiny_model), "--stream-retention", "1") as server, connected(server) as client:
        session = client.post("/v1/sessions", json={}).json()["id"]
        turn = client.post(
            f"/v1/sessions/{session}/turns",
            json={"input": "Hi", "max_tokens": 8, "ignore_eos": True},
        )
        generation = turn.headers["x-headwater-generation"]
        assert client.get(f"/v1/streams/{generation}").status_code == 200
        ended = time.monotonic()
        wait_until(
            lambda: client.get(f"/v1/streams/{generation}").status_code == 404,
            20,
            "the stream does not expire",
        )
        assert time.monotonic() - ended > 0.5
        answer = client.get(f"/v1/streams/{generation}")
        assert answer.json()["error"]["code"] == "stream_expired"
        kept = client.get(f"/v1/sessions/{session}").json()["turns"][-1]
        assert kept["content"] == turn.json()["content"]
        assert kept["status"] == "complete"


# ------------------------------------------------------------------------ the default model


def test_the_default_model_is_cut_after_every_event(default_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Name rivers, and an emoji 🦊 for each."}]}
    with connected(default_server) as client:
        whole = uncut(client, **body)
        reader = Reader(client, begin(client, **body))
        while not reader.read(1):
            pass
        same(reader, whole)
        assert len(reader.places) > NUM_TOKENS // 2, "most cuts were not of a live stream"
        for place in whole.places[:-1:16]:
            rest = Reader(client, whole.generation, place=place).read_all()
            assert whole.shown[place] + rest.text == whole.text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_double_cuts_of_the_default_model(default_server: Server) -> None:
    chooser = random.Random(5)
    with connected(default_server) as client:
        wholes = [uncut(client, seed=seed) for seed in range(8)]

        def cut_twice(i: int) -> None:
            reader = Reader(client, begin(client, seed=i % 8))
            if not reader.read(chooser.randint(1, 120)) and not reader.read(
                chooser.randint(1, 120)
            ):
                reader.read_all()
            same(reader, wholes[i % 8])

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(cut_twice, range(200)))
