"""kill -9 of everything, SIGTERM, a second server: what was acknowledged is there, once."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import shutil
import sqlite3
import subprocess
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.listeners import Ask, answers, goals, listen, new_session
from tests.e2e.streams import Reader
from tests.fixtures.server import Server, headwater, serving, wait_until

pytestmark = pytest.mark.e2e

NUM_SESSIONS = 4
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


class Talker(threading.Thread):
    """A person in one session, who asks one question after the other and does not lose patience.

    When the server dies, `urls` gives the next one. Half of them then go on with the stream that
    they were reading, the others send the request again under its idempotency key. `answered` are
    the turns whose `done` they saw."""

    def __init__(self, number: int, server: Server, num_turns: int) -> None:
        super().__init__(daemon=True)
        self.session = new_session(server)
        self.urls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.answered: list[Reader] = []
        self.waits = False
        self.fault: BaseException | None = None
        self._number = number
        self._num_turns = num_turns
        self._client = httpx.Client(base_url=server.url, timeout=60)
        self._reader: Reader | None = None

    @property
    def num_heard(self) -> int:
        reader = self._reader
        read = [*self.answered, *([] if reader is None else [reader])]
        return sum(len(reader.token_ids) for reader in read)

    def question(self, turn: int) -> str:
        return f"Question {turn} of {self._number}?"

    def run(self) -> None:
        try:
            for turn in range(self._num_turns):
                while not self._ask(turn):
                    pass
                assert self._reader is not None
                reader, self._reader = self._reader, None
                self.answered.append(reader)
        except BaseException as error:
            self.fault = error
        finally:
            self._client.close()

    def _ask(self, turn: int) -> bool:
        """One attempt; False when the server died meanwhile, and another one is there."""
        try:
            if self._reader is None:
                self._reader = Reader(self._client, self._post(turn))
            # The server may have died right behind the end of it.
            assert self._reader.done is not None or self._reader.read(), "a stream broke off"
            return True
        except httpx.TransportError:
            self.waits = True
            url = self.urls.get(timeout=60)
            self.waits = False
            self._client.close()
            self._client = httpx.Client(base_url=url, timeout=60)
            if self._number % 2:
                self._reader = None
            elif self._reader is not None:
                self._reader.client = self._client
            return False

    def _post(self, turn: int) -> str:
        chooser = random.Random(100 * self._number + turn)
        body = {
            "input": self.question(turn),
            "stream": True,
            "max_tokens": chooser.randint(4, 36),
            "ignore_eos": True,
            "seed": chooser.randrange(1 << 32),
            "temperature": chooser.choice([0, 1]),
        }
        key = {"idempotency-key": f"{self.session}-{turn}"}
        path = f"/v1/sessions/{self.session}/turns"
        with self._client.stream("POST", path, json=body, headers=key) as response:
            assert response.status_code == 200, response.read()
            return response.headers["x-headwater-generation"]


def talk(server: Server, num_turns: int) -> list[Talker]:
    talkers = [Talker(number, server, num_turns) for number in range(NUM_SESSIONS)]
    for talker in talkers:
        talker.start()
    return talkers


def wait_heard(talkers: list[Talker], count: int) -> None:
    def heard() -> bool:
        for talker in talkers:
            if talker.fault is not None:
                raise talker.fault
        return sum(t.num_heard for t in talkers) >= count

    wait_until(heard, 60, "the talk has ceased")


def wait_noticed(talkers: list[Talker]) -> None:
    """Until everybody has read what was on its way when the server died."""
    wait_until(
        lambda: all(t.waits or not t.is_alive() for t in talkers), 10, "somebody still reads"
    )


def finish(talkers: list[Talker]) -> list[list[tuple[str, list[int]]]]:
    """All their answers."""
    for talker in talkers:
        talker.join(60)
        assert not talker.is_alive(), "somebody waits for an answer for ever"
        if talker.fault is not None:
            raise talker.fault
    return [[(reader.text, reader.token_ids) for reader in t.answered] for t in talkers]


def check_store(data: Path, copy: Path) -> None:
    """What the dead server left is whole. Looked at in a copy, so that the next one finds it as it
    was left."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in data.glob("headwater.db*"):
        shutil.copy(file, copy)
    with contextlib.closing(sqlite3.connect(copy / "headwater.db")) as store:
        assert store.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert store.execute("PRAGMA foreign_key_check").fetchall() == []


def check_sessions(url: str, talkers: list[Talker], answered: list[int]) -> dict[str, str]:
    """Of each session, that all that was acknowledged before is there, and nothing is twice.
    Returns the answers that are there in part."""
    partial = {}
    for talker, count in zip(talkers, answered, strict=True):
        turns = httpx.get(f"{url}/v1/sessions/{talker.session}", timeout=60).json()["turns"]
        tree = httpx.get(f"{url}/v1/sessions/{talker.session}/tree", timeout=60).json()["turns"]
        assert [turn["id"] for turn in tree] == [turn["id"] for turn in turns]
        texts = [turn["content"][0]["text"] for turn in turns if turn["content"]]
        assert texts[::2] == [talker.question(i) for i in range(len(texts[::2]))]
        assert texts[1 : 2 * count : 2] == [reader.text for reader in talker.answered[:count]]
        for turn, reader in zip(turns[1 : 2 * count : 2], talker.answered[:count], strict=True):
            assert turn["status"] == "complete"
            assert reader.done is not None and reader.done["turn"] == turn["id"]
            assert turn["num_tokens"] == len(reader.token_ids)
        for turn in turns[2 * count + 1 :: 2]:
            partial[turn["id"]] = turn["content"][0]["text"] if turn["content"] else ""
    return partial


def check_reboots(
    model: str, num_turns: int, num_kills: int, quiet: Server, folder: Path
) -> list[int]:
    """Returns how many answers were read in part after each restart."""
    twins = finish(talk(quiet, num_turns))
    places = goals(random.Random(num_kills), num_kills, sum(len(a[1]) for t in twins for a in t))
    env = {"HEADWATER_DATA": str(folder / "data")}
    talkers: list[Talker] = []
    partial: dict[str, str] = {}
    counts = []
    for place in [*places, None]:
        with serving(model, env=env) as server:
            if not talkers:
                talkers = talk(server, num_turns)
            else:
                found = check_sessions(server.url, talkers, [len(t.answered) for t in talkers])
                counts.append(len(found))
                partial |= found
                for talker in talkers:
                    talker.urls.put(server.url)
            if place is None:
                got = finish(talkers)
                whole = check_sessions(server.url, talkers, [num_turns] * NUM_SESSIONS)
                assert not whole
                server.wait_idle()
                continue
            wait_heard(talkers, place)
            server.kill_all()
        wait_noticed(talkers)
        check_store(folder / "data", folder / "copy")
    assert got == twins
    ends = {r.done["turn"]: r.text for t in talkers for r in t.answered if r.done is not None}
    for turn, text in partial.items():
        assert ends[turn].startswith(text)
    return counts


def test_kill_9_of_everything_loses_nothing_that_was_acknowledged(
    tiny_model: Path, tiny_server: Server, tmp_path: Path
) -> None:
    assert any(check_reboots(str(tiny_model), 7, 3, tiny_server, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_20_kills_of_everything_with_the_default_model(
    default_server: Server, tmp_path: Path
) -> None:
    counts = check_reboots("smollm2-135m", 30, 20, default_server, tmp_path)
    assert sum(map(bool, counts)) > 10, "the kills did not come during turns"


# ------------------------------------------------------------------- what `done` was worth

_SYNCED = re.compile(r"f(?:data)?sync\(\d+<[^>]*-wal>\)\s+= 0")
_SYNC_BEGAN = re.compile(r"^(\d+) +f(?:data)?sync\(\d+<[^>]*-wal> <unfinished")
_SYNC_ENDED = re.compile(r"^(\d+) +<\.\.\. f(?:data)?sync resumed>.*= 0")
_WAL_WRITE = re.compile(r"(?:pwrite64|write)\(\d+<[^>]*-wal>")
_DELTA, _DONE = r"event: delta\n", r"event: done\n"


def synced_before_done(trace: str) -> tuple[int, int]:
    """How many `done` frames were written, and for how many of them something was written to the
    write-ahead log after the last `delta` was shown, and all of it synced."""
    num_done = num_good = 0
    dirty = wrote = False
    syncing: set[str] = set()
    for line in trace.splitlines():
        if _DONE in line:
            num_done += 1
            num_good += wrote and not dirty
        elif _DELTA in line:
            wrote = False
        elif _WAL_WRITE.search(line):
            dirty = wrote = True
            syncing.clear()  # a sync that is under way may have come too early for it
        elif _SYNCED.search(line):
            dirty = False
        elif began := _SYNC_BEGAN.match(line):
            syncing.add(began[1])
        elif (ended := _SYNC_ENDED.match(line)) and ended[1] in syncing:
            syncing.remove(ended[1])
            dirty = False
    return num_done, num_good


def test_done_comes_after_fdatasync(tiny_model: Path, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian package strace)")
    trace = tmp_path / "trace"
    with serving(str(tiny_model)) as server:
        which = "trace=fdatasync,fsync,write,sendto,writev,sendmsg,pwrite64"
        command = [strace, "-f", "-y", "-s", "9999", "-e", which, "-o", str(trace), "-p"]
        tracer = subprocess.Popen([*command, str(server.process.pid)], stderr=subprocess.PIPE)
        try:
            assert tracer.stderr is not None
            said = tracer.stderr.readline().decode()
            if "attached" not in said:
                pytest.skip(f"strace may not trace here: {said.strip()}")
            session = new_session(server)
            body = {"input": "More of it.", "max_tokens": 20, "ignore_eos": True}
            for seed in range(10):
                ask = Ask(f"/v1/sessions/{session}/turns", {**body, "seed": seed})
                (answer,) = answers(listen(server, [ask]))
                assert answer.finish_reason == "length"
        finally:
            tracer.terminate()
            tracer.communicate(timeout=10)
    calls = trace.read_text(errors="replace")
    assert synced_before_done(calls) == (10, 10)
    without = [line for line in calls.splitlines() if "sync" not in line]
    assert synced_before_done("\n".join(without)) == (10, 0)


def test_a_second_server_on_the_folder_names_the_first(
    tiny_server: Server, tiny_model: Path
) -> None:
    data = tiny_server.log_path.parent / "data"
    second = subprocess.run(
        [*headwater(), "serve", str(tiny_model), "--port", "0"],
        env={**os.environ, "HEADWATER_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 1
    where = tiny_server.url.removeprefix("http://")
    assert f"another server uses the store {data}" in second.stderr
    assert f"pid {tiny_server.process.pid} at {where}" in second.stderr
    assert "Traceback" not in second.stderr
    assert tiny_server.ready()


# ---------------------------------------------------------------------------------- SIGTERM


def test_sigterm_lets_short_answers_end_and_long_ones_go_on_later(
    tiny_server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    body = {"ignore_eos": True, "seed": 5}
    env = {"HEADWATER_DATA": str(tmp_path), "HEADWATER_SHUTDOWN_GRACE": "3"}

    def asks(server: Server) -> list[Ask]:
        made = []
        for i in range(4):
            long = {**body, "max_tokens": 380 if i < 2 else 100}
            session = new_session(server)
            made.append(Ask(f"/v1/sessions/{session}/turns", {**long, "input": f"River {i}?"}))
            chat = {"messages": [{"role": "user", "content": f"Hill {i}?"}], "resumable": True}
            made.append(Ask("/v1/chat/completions", {**long, **chat}))
        return made

    expected = answers(listen(tiny_server, asks(tiny_server)))
    with serving(str(tiny_model), env=env) as server:
        wanted = asks(server)
        # The engine is stopped where the test must not be too late.
        engine = server.engine
        engine.suspend()
        listeners = listen(server, wanted)
        long, short = listeners[:4], listeners[4:]
        wait_until(lambda: all(e.status == 200 for e in listeners), 20, "they are not taken")
        engine.resume()
        wait_until(lambda: all(len(each.times) > 1 for each in listeners), 20, "they do not run")
        engine.suspend()
        assert all(each.answer.finish_reason is None for each in listeners), "too late"
        server.process.terminate()
        wait_until(lambda: not server.ready(), 2, "/ready stays 200")
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_draining"
        assert int(refused.headers["retry-after"]) >= 1
        engine.resume()
        assert answers(short, 10) == expected[4:]
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.suspend()
        assert all(each.answer.finish_reason is None for each in long), "nothing is left to cut"
        answers(long, 10)
        assert [each.answer.error for each in long] == ["server_draining"] * 4
        assert [each.error_id for each in long] == [None] * 4
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.resume()
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log
    with serving(str(tiny_model), env=env) as server, httpx.Client(base_url=server.url) as client:
        for each, whole in zip(long, expected[:4], strict=True):
            assert whole.text.startswith(each.answer.text)
            chat = not each.answer.token_ids
            reader = Reader(client, each.generation, chat=chat, place=each.place)
            rest = reader.read_all()
            assert rest.text and each.answer.text + rest.text == whole.text
            assert rest.done is not None and rest.done["finish_reason"] == "length"
        for each in short:
            ended = client.get(f"/v1/streams/{each.generation}?after={each.place}")
            assert ended.status_code == 204
        server.wait_idle()
