"""The chat in a real browser, against the real server and the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.server import Server, serving
from tests.web.conftest import Browse

pytestmark = [pytest.mark.e2e, pytest.mark.alone]  # an engine is killed, tasks are timed


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One of its own: the engine is killed in it."""
    with serving("smollm2-135m") as server:
        yield server


@pytest.mark.timeout(180)
def test_one_talks_and_keeps_order(browse: Browse, server: Server) -> None:
    """First visit, stop, continue, branches, fork, parameters, export, search, delete."""
    browse("chat", server, seconds=170)


@pytest.mark.timeout(180)
def test_answers_survive_reloads_lost_lines_and_the_engines_death(
    browse: Browse, server: Server
) -> None:
    browse("resume", server, seconds=170, HEADWATER_ENGINE=str(server.engine.pid))


@pytest.mark.timeout(180)
def test_what_one_has_written_is_not_lost(browse: Browse, server: Server) -> None:
    """Refused, stopped on its way, left alone, and with another window in the same session."""
    browse("words", server, seconds=170)


@pytest.mark.timeout(180)
def test_by_keyboard_on_a_phone_and_in_the_dark(browse: Browse, server: Server) -> None:
    browse("looks", server, seconds=170)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_thousand_turns_stream_without_a_slow_frame(
    browse: Browse, wide_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(str(wide_model)) as server:
        told = browse("long", server, seconds=170)
    with capsys.disabled():
        print(f"\nthe page's main thread, 1,000 turns, 300 tokens/s: {told}")  # noqa: T201
    assert told["longest_ms"] <= 50


@pytest.mark.timeout(180)
def test_a_long_session_scrolls_and_streams(browse: Browse, wide_model: Path) -> None:
    """The same, shorter."""
    with serving(str(wide_model)) as server:
        told = browse("long", server, seconds=170, HEADWATER_TURNS="200", HEADWATER_LENGTH="900")
    assert told["longest_ms"] <= 50
