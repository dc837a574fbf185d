"""The server's secret: made once, for its owner's eyes, the same ever after."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from server.secret import NUM_BYTES, SecretError, load_secret
from server.settings import Settings


def test_it_is_made_once_and_private(tmp_path: Path) -> None:
    data = tmp_path / "a" / "data"
    secret = load_secret(data)
    assert len(secret) == NUM_BYTES
    assert load_secret(data) == secret
    assert os.listdir(data) == ["secret"]
    assert stat.S_IMODE((data / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert load_secret(tmp_path / "b") != secret


def test_servers_that_start_at_once_agree(tmp_path: Path) -> None:
    count = 8
    barrier = threading.Barrier(count)
    found: list[bytes] = []

    def start() -> None:
        barrier.wait(10)
        found.append(load_secret(tmp_path / "data"))

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == count and len(set(found)) == 1
    assert os.listdir(tmp_path / "data") == ["secret"]


@pytest.mark.parametrize("size", [0, NUM_BYTES - 1, NUM_BYTES + 1])
def test_a_damaged_one_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "secret").write_bytes(b"x" * size)
    with pytest.raises(SecretError, match=rf"secret should have 32 bytes and has {size}"):
        load_secret(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SecretError, match=r"file.*Not a directory.*HEADWATER_DATA"):
        load_secret(tmp_path / "file" / "data")


def test_where_the_data_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEADWATER_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Settings().data_folder == tmp_path / ".local/share/headwater"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # to be ignored, says the XDG specification
    assert Settings().data_folder == tmp_path / ".local/share/headwater"
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert Settings().data_folder == Path("/xdg/headwater")
    monkeypatch.setenv("HEADWATER_DATA", "/data")
    assert Settings().data_folder == Path("/data")
