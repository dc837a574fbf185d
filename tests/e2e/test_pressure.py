"""Too little of something: a block pool that is too small for its sessions, disks that are full."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.listeners import Ask, answers, listen, new_session
from tests.e2e.streams import Reader, stream_events
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.e2e

# ------------------------------------------------------------------------------ a small pool

NUM_WORKERS = 8
POOL = "1MiB"
LONG = "The river bends because the water is faster on the outside of the curve. " * 12


class Crowd:
    """People who share some sessions and get in each other's way: each of `NUM_WORKERS` threads
    does one random thing after the other until `num_turns` turns were answered in all."""

    def __init__(self, server: Server, num_turns: int) -> None:
        self._server = server
        self._left = num_turns
        self._lock = threading.Lock()
        self._sessions: list[str] = []
        self.told: Counter[str] = Counter()
        """How often each thing was done, and each refusal had."""
        self.num_checked = 0
        self.faults: list[BaseException] = []

    def run(self, num_sessions: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            for number in range(num_sessions):
                self._begin(client, random.Random(number))
        threads = [
            threading.Thread(target=self._work, args=(random.Random(1000 + i),), daemon=True)
            for i in range(NUM_WORKERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive(), f"somebody waits for ever: {self.told}"
        if self.faults:
            raise self.faults[0]

    def num_blocks(self) -> int:
        """Full blocks of all sessions' paths; what forks have in common counts once."""
        blocks: set[tuple[int, ...]] = set()
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            for session in self._sessions:
                found = client.get(f"/v1/sessions/{session}?include=token_ids").json()["turns"]
                tokens = [id_ for t in found for id_ in t["prompt_token_ids"] + t["token_ids"]]
                blocks |= {tuple(tokens[:end]) for end in range(16, len(tokens) + 1, 16)}
        return len(blocks)

    def _work(self, chooser: random.Random) -> None:
        try:
            with httpx.Client(base_url=self._server.url, timeout=60) as client:
                while self._left > 0 and not self.faults:
                    self._act(client, chooser)
        except BaseException as error:
            self.faults.append(error)

    def _act(self, client: httpx.Client, chooser: random.Random) -> None:
        with self._lock:
            session = chooser.choice(self._sessions)
        what = chooser.choices(
            ["turn", "cut turn", "left turn", "regenerate", "cancel", "fork", "rewind", "delete"],
            [8, 2, 2, 2, 2, 1, 3, 1],
        )[0]
        self.told[what] += 1
        match what:
            case "turn":
                self._answer(client, session, "turns", self._turn(chooser))
            case "cut turn":
                body = {**self._turn(chooser), "max_tokens": 64}
                self._answer(client, session, "turns", body, cut=True)
            case "left turn":
                body = {**self._turn(chooser), "stream": True}
                with client.stream("POST", f"/v1/sessions/{session}/turns", json=body) as left:
                    self._status(left)
            case "regenerate":
                self._answer(client, session, "regenerate", {"max_tokens": 12})
            case "cancel":
                self._status(client.post(f"/v1/sessions/{session}/cancel"))
            case "rewind":
                found = client.get(f"/v1/sessions/{session}")
                if self._status(found) and len(found.json()["turns"]) > 2:
                    head = found.json()["turns"][1]["id"]
                    self._status(client.patch(f"/v1/sessions/{session}", json={"head": head}))
            case "fork":
                made = client.post(f"/v1/sessions/{session}/fork", json={})
                if self._status(made):
                    self._replace(client, made.json()["id"], chooser)
            case "delete":
                self._begin(client, chooser)
                with self._lock:
                    if session not in self._sessions:
                        return
                    self._sessions.remove(session)
                self._status(client.delete(f"/v1/sessions/{session}"))

    def _turn(self, chooser: random.Random) -> dict[str, Any]:
        return {
            "input": f"Now {chooser.randrange(1000)}.",
            "max_tokens": chooser.randint(1, 16),
            "seed": chooser.randrange(1 << 32),
            "on_busy": chooser.choice(["error", "queue", "cancel_previous"]),
        }

    def _begin(self, client: httpx.Client, chooser: random.Random) -> None:
        """One more session, with a long question that is its own, and an answer."""
        session: str = client.post("/v1/sessions", json={}).json()["id"]
        body = {"input": f"{chooser.random()} {LONG}", "max_tokens": 4}
        self._answer(client, session, "turns", body)
        with self._lock:
            self._sessions.append(session)

    def _replace(self, client: httpx.Client, session: str, chooser: random.Random) -> None:
        """`session` comes in the place of another one."""
        with self._lock:
            gone = self._sessions.pop(chooser.randrange(len(self._sessions)))
            self._sessions.append(session)
        self._status(client.delete(f"/v1/sessions/{gone}"))

    def _answer(
        self,
        client: httpx.Client,
        session: str,
        route: str,
        body: dict[str, Any],
        *,
        cut: bool = False,
    ) -> None:
        """Have an answer, and see what it was an answer to. `cut`: cancel it once it began."""
        path = f"/v1/sessions/{session}/{route}"
        events = []
        with client.stream("POST", path, json={**body, "stream": True}) as response:
            if not self._status(response):
                return
            for event in stream_events(response):
                events.append(event)
                if cut and event.event == "delta":
                    cut = False
                    self._status(client.post(f"/v1/sessions/{session}/cancel"))
        assert events[-1].event == "done", events[-1]
        done, text = events[-1].data, "".join(e.data.get("text", "") for e in events)
        self.told[done["finish_reason"]] += 1
        with self._lock:
            self._left -= 1
        exported = client.get(f"/v1/sessions/{session}/export")
        if not self._status(exported):
            return
        turns = {turn["id"]: turn for turn in exported.json()["turns"]}
        if not turns:  # somebody deleted it while it was read
            assert client.get(f"/v1/sessions/{session}").status_code == 404
            return
        answer = turns[done["turn"]]
        assert answer["content"][0]["text"] == text
        history = len(answer["prompt_token_ids"])
        at = answer["parent"]
        if route == "turns":
            assert turns[at]["content"][0]["text"] == body["input"]
        while at is not None:
            history += len(turns[at]["prompt_token_ids"]) + len(turns[at]["token_ids"])
            at = turns[at]["parent"]
        assert done["usage"]["prompt_tokens"] == history
        self.num_checked += 1

    def _status(self, response: httpx.Response) -> bool:
        """Whether it was done; nothing but what others may have caused is a reason not to."""
        if response.status_code in (200, 204):
            return True
        response.read()
        code = response.json()["error"]["code"]
        self.told[code] += 1
        allowed = {"not_found", "session_busy", "context_length_exceeded", "invalid_value"}
        assert code in allowed, response.text
        return False


def check_crowd(tiny_model: Path, num_turns: int) -> str:
    options = ["--kv-memory", POOL, "--disk-cache", "8MiB", "--max-num-seqs", "8"]
    with serving(str(tiny_model), *options) as server:  # with --check-accounting, as all tests have

        def blocks(state: str) -> int:
            return int(server.metric("headwater_blocks", state=state, tier="device"))

        total = blocks("free")
        assert total > 0 and blocks("cached") == blocks("referenced") == 0
        crowd = Crowd(server, num_turns)
        started = time.monotonic()
        crowd.run(num_sessions=5 * total * 16 // 240 + 1)
        took = time.monotonic() - started
        server.wait_idle()
        assert blocks("free") + blocks("cached") == total
        assert crowd.num_checked > num_turns * 3 // 4
        num_blocks = crowd.num_blocks()
        assert num_blocks >= 4 * total
        assert server.metric("headwater_evicted_blocks_total") > 4 * total
        assert server.metric("headwater_disk_hits_total") > 0
        assert server.metric("headwater_engine_restarts_total") == 0
        for what in ("cancel", "fork", "delete", "abort", "left turn"):
            assert crowd.told[what] > 0, what
        assert server.log.count("Traceback") == 0, server.log
        return (
            f"{num_turns} turns and {num_blocks} different blocks over a pool of {total} in "
            f"{took:.1f} s: {dict(crowd.told)}"
        )


def test_a_crowd_of_sessions_over_a_small_pool(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = check_crowd(tiny_model, 240)
    with capsys.disabled():
        sys.stdout.write(f"\n    {told}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_500_turns_over_a_small_pool(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = check_crowd(tiny_model, 500)
    with capsys.disabled():
        sys.stdout.write(f"\n    {told}")


# -------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size at `folder`. Skips where none can be mounted."""
    folder.mkdir(parents=True, mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not one byte is left on that disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk_of_the_cache_stops_nothing(
    tiny_model: Path, tiny_server: Server, tmp_path: Path
) -> None:
    body = {"prompt": LONG, "max_tokens": 40, "ignore_eos": True}
    asks = [Ask("/v1/completions", {**body, "seed": seed}) for seed in range(6)]
    expected = answers(listen(tiny_server, asks))
    kv = tmp_path / "kv"
    env = {"HEADWATER_DATA": str(tmp_path)}
    with small_disk(kv, "4m"):
        with serving(str(tiny_model), env=env) as server:

            def disk(what: str) -> float:
                return server.metric(f"headwater_disk_{what}")

            with full(kv):
                assert answers(listen(server, asks)) == expected
                wait_until(lambda: disk("errors_total") > 0, 20, "the full disk was not noticed")
                assert answers(listen(server, asks)) == expected
                assert disk("files") == len(list(kv.glob("??/*.kv"))) == disk("written_total") == 0
                assert not list(kv.rglob("*.tmp"))
                assert server.ready()
            wait_until(lambda: disk("written_total") >= 20, 30, "it does not recover")
            wait_until(lambda: not list(kv.rglob("*.tmp")), 10, "temporary files are left")
        with serving(str(tiny_model), env=env) as server:
            assert answers(listen(server, asks)) == expected
            assert server.metric("headwater_disk_hits_total") > 0


def test_a_full_disk_of_the_store_loses_nothing_that_was_acknowledged(
    tiny_model: Path, tiny_server: Server, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    questions = ["First.", "Second.", "Third.", "Fourth."]
    lengths = [20, 300, 20, 20]

    def ask(session: str, i: int) -> Ask:
        body = {"input": questions[i], "max_tokens": lengths[i], "ignore_eos": True, "seed": i}
        return Ask(f"/v1/sessions/{session}/turns", body)

    twin = new_session(tiny_server)
    expected = [answers(listen(tiny_server, [ask(twin, i)]))[0] for i in range(4)]
    env = {"HEADWATER_DATA": str(data)}
    options = ["--disk-cache", "off"]
    with small_disk(data, "4m"):
        with serving(str(tiny_model), *options, env=env) as server:
            session = new_session(server)

            assert answers(listen(server, [ask(session, 0)])) == expected[:1]
            acknowledged = turns_of(server, session)
            (unsaved,) = listen(server, [ask(session, 1)])
            wait_until(lambda: len(unsaved.times) > 20, 20, "the second answer does not come")
            with full(data):
                # An answer that could not be stored ends with an error, and no `done`.
                (answer,) = answers([unsaved])
                assert (answer.error, answer.finish_reason) == ("internal", None)
                assert unsaved.error_id is None
                assert expected[1].text.startswith(answer.text)
                # A turn that cannot be stored is refused, and leaves nothing.
                refused = httpx.post(f"{server.url}/v1/sessions", json={}, timeout=60)
                assert refused.status_code == 500
                assert "nothing was changed" in refused.json()["error"]["message"]
                (third,) = listen(server, [ask(session, 2)])
                answers([third])
                assert third.status != 200
                assert turns_of(server, session)[:2] == acknowledged
                # What needs no store goes on.
                plain = {"prompt": "On", "max_tokens": 5}
                served = httpx.post(f"{server.url}/v1/completions", json=plain, timeout=60)
                assert served.status_code == 200
                assert server.ready()
            # Nothing is asked of a session before its last answer is stored, and then all is there.
            wait_until(lambda: answers_again(server, ask(session, 2), expected[2]), 30, "no turn")
            found = turns_of(server, session)
            assert [turn["status"] for turn in found] == ["complete"] * 6
            assert found[:2] == acknowledged
            texts = [turn["content"][0]["text"] for turn in found[1::2]]
            assert texts == [each.text for each in expected[:3]]
            with httpx.Client(base_url=server.url) as client:
                reader = Reader(client, unsaved.generation).read_all()
                assert (reader.text, reader.token_ids) == (
                    expected[1].text,
                    expected[1].token_ids,
                )
            server.process.kill()
        with serving(str(tiny_model), *options, env=env) as server:
            assert turns_of(server, session) == found
            assert answers(listen(server, [ask(session, 3)])) == expected[3:]


def turns_of(server: Server, session: str) -> list[dict[str, Any]]:
    url = f"{server.url}/v1/sessions/{session}?include=token_ids"
    found: list[dict[str, Any]] = httpx.get(url, timeout=60).json()["turns"]
    return found


def answers_again(server: Server, ask: Ask, expected: object) -> bool:
    """Whether the turn is taken; then it must have the right answer."""
    (answer,) = answers(listen(server, [ask]))
    if answer.error is not None:
        assert answer.error in ("session_busy", "internal")
        return False
    assert answer == expected
    return True
