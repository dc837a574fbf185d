"""The disk tier through real processes: what was computed before a kill -9 is found again."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import xxhash

from tests.fixtures.server import Server, headwater, serving, wait_until
from tests.fixtures.spoilt import WAYS, spoilt

PROMPT = "The river runs to the sea. " * 12
BODY = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def ask(server: Server, **change: Any) -> tuple[str, int, int]:
    """The answer, the tokens of the prompt, and how many of them were found."""
    answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, **change}, timeout=60).json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], usage["prompt_tokens"], cached


def disk(server: Server, what: str) -> float:
    return server.metric(f"headwater_disk_{what}")


def wait_written(server: Server, num_tokens: int) -> None:
    """Until all full blocks of a sequence of that many computed tokens are on disk."""
    wait_until(
        lambda: disk(server, "written_total") >= num_tokens // 16, 20, "the blocks are not written"
    )


def kill_all(server: Server) -> None:
    engine = server.engine
    server.process.kill()
    server.process.wait()
    wait_until(
        lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE,
        5,
        "the engine is an orphan",
    )


def files(data: Path) -> list[Path]:
    return sorted((data / "kv").glob("??/*.kv"))


def test_a_prompt_goes_on_from_the_disk_after_kill_9(tiny_model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    with serving(str(tiny_model), env=env) as server:
        text, num_tokens, cached = ask(server)
        assert cached == 0 and num_tokens > 80
        wait_written(server, num_tokens + 23)
        kill_all(server)
    full = (num_tokens - 1) // 16 * 16
    with serving(str(tiny_model), env=env) as server:
        assert ask(server) == (text, num_tokens, full)
        assert server.metric("headwater_prefix_hit_tokens_total", tier="disk") == full
        assert server.metric("headwater_prefix_hit_tokens_total", tier="device") == 0
        assert server.metric("headwater_prefill_tokens_total") == num_tokens - full
        assert disk(server, "hits_total") == full // 16
        assert disk(server, "files") == len(files(tmp_path))
        assert disk(server, "bytes") == sum(f.stat().st_size for f in files(tmp_path))
        assert ask(server) == (text, num_tokens, full)  # from memory now
        assert server.metric("headwater_prefix_hit_tokens_total", tier="device") == full

        # An engine that dies alone is no different.
        server.engine.kill()
        wait_until(lambda: not server.ready(), 5, "/ready does not turn 503")
        wait_until(server.ready, 30, "the engine is not back")
        assert ask(server) == (text, num_tokens, full)
        assert server.metric("headwater_prefix_hit_tokens_total", tier="disk") == full
        kill_all(server)

    # One bit of one file in the middle.
    found = {file.stat().st_mtime_ns: file for file in files(tmp_path)}
    chain = [found[when] for when in sorted(found, reverse=True)]  # the root was used last
    data = bytearray(chain[2].read_bytes())
    data[len(data) // 2] ^= 1
    chain[2].write_bytes(data)
    with serving(str(tiny_model), env=env) as server:
        assert ask(server) == (text, num_tokens, 2 * 16)
        assert disk(server, "corrupt_total") == 1
        wait_until(lambda: disk(server, "written_total") >= 1, 20, "it is not written again")
        kill_all(server)
    with serving(str(tiny_model), env=env) as server:
        assert ask(server) == (text, num_tokens, full)


def test_what_a_server_that_ends_has_computed_is_on_disk(tiny_model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    with serving(str(tiny_model), env=env) as server:
        text, num_tokens, _ = ask(server)
    with serving(str(tiny_model), env=env) as server:
        assert ask(server) == (text, num_tokens, (num_tokens - 1) // 16 * 16)
    assert not list((tmp_path / "kv").rglob("*.tmp"))


# ------------------------------------------------------------------------------ spoilt files

NUM_SPOILT = 1000
NUM_PROMPTS = 1024  # the others' files stay good
PROMPTS_A_REQUEST = 64
LINK = "link"
DIGEST_BYTES, ROOT = 16, slice(32, 64)  # of a file, see model/engine/block_file.py


def spoil(path: Path, other: bytes, kind: str, chooser: random.Random) -> None:
    """Make another file of it. `other` is a good one, of another block."""
    data = bytearray(path.read_bytes())
    if kind in WAYS:
        data = bytearray(spoilt(data, other, kind, chooser))
    elif kind == "bits of the payload":
        for place in chooser.sample(range(len(data) // 2, len(data) - DIGEST_BYTES), 200):
            data[place] ^= 1 << chooser.randrange(8)
    elif kind == "another model":  # whole in itself, and its keys and values are other ones
        data[ROOT] = chooser.randbytes(32)
        for place in chooser.sample(range(len(data) // 2, len(data) - DIGEST_BYTES), 200):
            data[place] ^= 1 << chooser.randrange(8)
        data[-DIGEST_BYTES:] = xxhash.xxh3_128(data[:-DIGEST_BYTES]).digest()
    else:
        assert kind == LINK  # to the very bytes that belong there
        target = path.with_suffix(".elsewhere")
        target.write_bytes(data)
        path.unlink()
        path.symlink_to(target)
        return
    path.write_bytes(data)


KINDS = [*WAYS, "bits of the payload", "another model", LINK]


def test_a_thousand_spoilt_files_make_no_wrong_token(tiny_model: Path, tmp_path: Path) -> None:
    """A thousand prompts, whose KV was one file each, are answered as before, to the last bit of
    the log-probabilities."""
    chooser = random.Random(8)
    # One full block, and a token that is always computed.
    prompts = [[chooser.randrange(3, 512) for _ in range(17)] for _ in range(NUM_PROMPTS)]
    env = {"HEADWATER_DATA": str(tmp_path)}

    def ask_all(server: Server) -> tuple[list[Any], int]:
        """All answers, and how many tokens of their prompts were found."""
        choices, num_cached = [], 0
        for start in range(0, NUM_PROMPTS, PROMPTS_A_REQUEST):
            body = {"prompt": prompts[start : start + PROMPTS_A_REQUEST], "max_tokens": 4}
            sent = httpx.post(
                f"{server.url}/v1/completions",
                json={**body, "temperature": 0, "logprobs": 1, "ignore_eos": True},
                timeout=60,
            )
            assert sent.status_code == 200, sent.text
            answer = sent.json()
            choices += answer["choices"]
            num_cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return choices, num_cached

    with serving(str(tiny_model), env=env) as server:
        first, num_cached = ask_all(server)
        assert (len(first), num_cached) == (NUM_PROMPTS, 0)
        assert all(len(choice["logprobs"]["tokens"]) == 4 for choice in first)
    found = files(tmp_path)
    assert len(found) == NUM_PROMPTS
    chooser.shuffle(found)
    other = found[-1].read_bytes()  # of a block that stays good
    spoilt = [(path, KINDS[i % len(KINDS)]) for i, path in enumerate(found[:NUM_SPOILT])]
    for path, kind in spoilt:
        if kind != LINK:
            spoil(path, other, kind, chooser)
    with serving(str(tiny_model), env=env) as server:
        engine = server.engine.pid
        for path, kind in spoilt:
            if kind == LINK:  # what is no file when the engine starts is not taken for one
                spoil(path, other, kind, chooser)
        again, num_cached = ask_all(server)
        assert again == first
        # What was not spoilt was found, so the others could have been.
        assert num_cached == 16 * (NUM_PROMPTS - NUM_SPOILT)
        assert disk(server, "hits_total") == NUM_PROMPTS - NUM_SPOILT
        assert disk(server, "corrupt_total") == NUM_SPOILT
        assert disk(server, "errors_total") == 0
        assert server.engine.pid == engine
        assert server.metric("headwater_engine_restarts_total") == 0
        assert "Traceback" not in server.log
        # All of them are written again, in the places of what was removed.
        wait_until(lambda: disk(server, "written_total") == NUM_SPOILT, 20, "they are not written")
    with serving(str(tiny_model), env=env) as server:
        assert ask_all(server) == (first, 16 * NUM_PROMPTS)
        assert disk(server, "corrupt_total") == 0


def test_off_is_off(tiny_model: Path, tmp_path: Path) -> None:
    with serving(
        str(tiny_model), "--disk-cache", "off", env={"HEADWATER_DATA": str(tmp_path)}
    ) as server:
        _, num_tokens, cached = ask(server)
        assert cached == 0
        assert ask(server)[2] == (num_tokens - 1) // 16 * 16
        assert disk(server, "written_total") == disk(server, "misses_total") == 0
    assert not (tmp_path / "kv").exists()


def test_what_is_no_size_is_told(tiny_model: Path) -> None:
    done = subprocess.run(
        [*headwater(), "serve", str(tiny_model), "--disk-cache", "plenty"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "headwater: --disk-cache: 'plenty' is not a size; write for example 512MiB or 2GiB\n"
    )
