"""The `headwater` command as people meet it: what it says, where, and how it exits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hub.cache import cache_folder
from model.ops.kernels import find_compiler
from tests.fixtures.server import Server, headwater, wait_until
from tests.model.hub.hub_files import write_gguf

WATCHDOG_SECONDS = 30.0
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache, with the kernels of this machine in it, which would take seconds to
    compile in each test, and no settings but a test's own."""
    kernels = cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    for name in [name for name in os.environ if name.startswith("HEADWATER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HEADWATER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)  # no .env but a test's own
    return tmp_path / "cache"


def command(*args: str, stdin: str | bytes = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, which must come soon and leave no process behind."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    with started(*args, **env) as process:
        out, err = process.communicate(data, timeout=WATCHDOG_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


@contextlib.contextmanager
def started(*args: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own, so that all that it starts can be found."""
    process = subprocess.Popen(
        [*headwater(), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
        start_new_session=True,
        # A shell ignores SIGINT for what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with process:
            pass
        wait_until(lambda: not session_of(process.pid), 3, "processes are left behind")


def session_of(session: int) -> list[psutil.Process]:
    """The processes of a session that are alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *causes: str) -> None:
    assert result.returncode == code, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("headwater: ")
    for cause in causes:
        assert cause in lines[0]


# ------------------------------------------------------------ models that cannot be served


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | changes))

    return damage


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)


def with_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, folder / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no tokenizer": (remove("tokenizer.json"), ("missing: tokenizer.json",)),
    "broken tokenizer": (write("tokenizer.json", '{"model": 1}'), ("tokenizer.json",)),
    "no config": (remove("config.json"), ("missing: config.json",)),
    "broken config": (write("config.json", "{"), ("config.json is broken",)),
    "a config that is a list": (write("config.json", "[]"), ("config.json is broken",)),
    "a config without sizes": (edit("config.json", hidden_size=None), ("hidden_size",)),
    "remote code": (edit("config.json", auto_map={"AutoModel": "x.Y"}), ("auto_map",)),
    "another architecture": (
        edit("config.json", architectures=["GPT2LMHeadModel"]),
        ("GPT2LMHeadModel", "Llama"),
    ),
    "heads that do not divide": (edit("config.json", num_key_value_heads=3), ("3 KV heads",)),
    "broken template": (
        edit("tokenizer_config.json", chat_template="{% for"),
        ("chat template", "line 1"),
    ),
    "no weights": (remove(WEIGHTS), ("missing: *.safetensors",)),
    "only a pickle": (pickle_only, ("pickle", "pytorch_model.bin")),
    "cut weights": (cut(WEIGHTS, 20_000), (f"{WEIGHTS} is broken or cut off",)),
    "weights cut to nothing": (cut(WEIGHTS, 0), (f"{WEIGHTS} is broken or cut off",)),
    "a missing tensor": (without_a_tensor, ("lack model.layers.1.mlp.up_proj.weight",)),
    "a wrong shape": (with_another_shape, ("model.norm.weight", "[63]", "[64]")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model(tiny_model: Path, tmp_path: Path, name: str) -> None:
    damage, causes = DAMAGES[name]
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    assert_refused(command("serve", str(folder), "--port", "0"), 1, *causes)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "too short"),
        (bytes(range(256)) * 40, "not a GGUF file"),
        (b"GGUF" + bytes(range(255)) * 40, "GGUF"),
        (-400, "truncated or broken"),
        (200, "model.gguf"),
    ],
    ids=["empty", "bytes", "bytes after the magic", "cut tensor", "cut header"],
)
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes | int, cause: str) -> None:
    path = tmp_path / "model.gguf"
    if isinstance(content, int):
        write_gguf(path, padding=200)
        content = path.read_bytes()[:content]
    path.write_bytes(content)
    assert_refused(command("serve", str(path), "--port", "0"), 1, "model.gguf", cause)


def test_a_gguf_without_its_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert_refused(command("serve", str(path), "--port", "0"), 1, "lack", "model.embed_tokens")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("/no/such/folder", "/no/such/folder"),
        ("./nothing.gguf", "nothing.gguf"),
        ("smollm2-136m", "did you mean smollm2-135m?"),
        ("gpt-9", "'gpt-9'"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("", "not a model name"),
        ("two\nlines", "not a model name"),
    ],
)
def test_a_name_that_is_no_model(name: str, cause: str) -> None:
    assert_refused(command("serve", name, "--port", "0"), 1, cause)
    assert_refused(command("pull", name), 1, cause)


# ---------------------------------------------------------------------- options and settings


@pytest.mark.parametrize(
    ("options", "code", "causes"),
    [
        (["--port", "65536"], 2, ["--port", "65535"]),
        (["--port", "-1"], 2, ["--port"]),
        (["--port", "http"], 2, ["--port", "integer"]),
        (["--host", "256.0.0.1"], 1, ["--host '256.0.0.1'"]),
        (["--host", "no.such.host.invalid"], 1, ["--host 'no.such.host.invalid'"]),
        (["--host", ""], 1, ["--host ''"]),
        (["--host", "192.0.2.1", "--no-auth"], 1, ["192.0.2.1", "Cannot assign", "--host"]),
        (["--host", "0.0.0.0"], 1, ["--host 0.0.0.0", "--no-auth"]),
        (["--host", "192.0.2.1"], 1, ["--host 192.0.2.1", "--no-auth"]),
        (["--device", "cuda"], 1, ["--device cuda", "--device cpu"]),
        (["--device", "tpu"], 2, ["--device", "'tpu'"]),
        (["--dtype", "int4"], 2, ["--dtype", "'int4'"]),
        (["--threads", "0"], 2, ["--threads"]),
        (["--max-num-seqs", "0"], 2, ["--max-num-seqs"]),
        (["--max-model-len", "513"], 1, ["--max-model-len 513", "512"]),
        (["--max-model-len", "1"], 2, ["--max-model-len"]),
        (["--kv-memory", "plenty"], 2, ["--kv-memory", "'plenty'", "512MiB"]),
        (["--kv-memory", "-1GiB"], 2, ["--kv-memory", "'-1GiB'"]),
        (["--kv-memory", "1000"], 2, ["--kv-memory", "1048576"]),
        (["--kv-memory", "999TiB"], 1, ["too little memory", "--kv-memory"]),
        (["--log-level", "loud"], 2, ["--log-level", "'loud'"]),
        (["--colour", "blue"], 2, ["--colour"]),
        (["another-model"], 2, ["another-model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option(tiny_model: Path, options: list[str], code: int, causes: list[str]) -> None:
    port = [] if "--port" in options else ["--port", "0"]
    result = command("serve", str(tiny_model), *port, *options, CUDA_VISIBLE_DEVICES="")
    assert_refused(result, code, *causes)


def test_a_context_that_the_kv_memory_cannot_hold(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit("config.json", max_position_embeddings=65536)(folder)
    result = command(
        "serve", str(folder), "--port", "0", "--kv-memory", "1MiB", "--max-model-len", "60000"
    )
    assert_refused(result, 1, "--kv-memory", "--max-model-len 60000")


def test_a_block_that_the_kv_memory_cannot_hold(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit("config.json", head_dim=1024, num_hidden_layers=8)(
        folder
    )  # told before the weights are looked at
    result = command("serve", str(folder), "--port", "0", "--kv-memory", "1MiB")
    assert_refused(result, 1, "less than two blocks", "--kv-memory")


def test_a_port_that_is_taken(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = command("serve", str(tiny_model), "--port", port)
    assert_refused(result, 1, port, "in use", "--port")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may bind any port")
def test_a_privileged_port(tiny_model: Path) -> None:
    start = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if start <= 1:
        pytest.skip("every port is open to all here")
    assert_refused(command("serve", str(tiny_model), "--port", str(start - 1)), 1, "--port")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("HEADWATER_PORT", "http", 2),
        ("HEADWATER_KV_MEMORY", "many", 2),
        ("HEADWATER_NO_AUTH", "perhaps", 2),
        ("HEADWATER_ENGINE_TIMEOUT", "-1", 2),
        ("HEADWATER_BLOCK_SIZE", "0", 2),
        ("HEADWATER_MODEL", "/no/such/model", 1),
    ],
)
def test_a_wrong_variable(tmp_path: Path, name: str, value: str, code: int) -> None:
    cause = value if code == 1 else name
    assert_refused(command("serve", **{name: value}), code, cause, value)
    (tmp_path / ".env").write_text(f"{name}={value}\n")
    assert_refused(command("serve"), code, cause, value)


@pytest.mark.parametrize("below", ["", "/models"])
def test_a_cache_that_cannot_be_written(tiny_model: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    env = {"HEADWATER_CACHE": f"{tmp_path}/file{below}"}
    for args in (["serve", str(tiny_model), "--port", "0"], ["pull", str(tiny_model)]):
        assert_refused(command(*args, **env), 1, env["HEADWATER_CACHE"], "HEADWATER_CACHE to")
    doctor = command("doctor", **env)
    assert doctor.returncode == 1
    assert "cannot be written" in doctor.stdout


# -------------------------------------------------------------------------------- headwater run


def ask(server: Server, content: str, **changes: Any) -> str:
    """The server's answer to the same question."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "seed": 5}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body | changes)
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


LIMITS = ["--max-tokens", "12", "--seed", "5"]


@pytest.mark.parametrize(
    ("args", "stdin", "content"),
    [
        (["Why do rivers bend?"], "", "Why do rivers bend?"),
        ([], "Why do rivers bend?\n", "Why do rivers bend?\n"),
        (["Summarise this"], "a café\n", "Summarise this\n\na café\n"),
    ],
    ids=["argument", "stdin", "both"],
)
def test_run(
    tiny_model: Path, tiny_server: Server, args: list[str], stdin: str, content: str
) -> None:
    """One answer on stdout and nothing else, the same as the server gives."""
    expected = ask(tiny_server, content)
    assert expected
    result = command("run", str(tiny_model), *args, *LIMITS, stdin=stdin)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (expected if expected.endswith("\n") else f"{expected}\n")
    assert result.stderr in ("", "stopped after 12 tokens\n")


def test_run_with_a_model_from_the_environment(tiny_model: Path, tiny_server: Server) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    expected = ask(tiny_server, "", messages=messages, temperature=0)
    result = command(
        *["run", "Hello", "--system", "Be brief.", "--temperature", "0", *LIMITS],
        HEADWATER_MODEL=str(tiny_model),
    )
    assert (result.returncode, result.stdout.rstrip("\n")) == (0, expected.rstrip("\n"))


def test_run_refuses(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_MODEL", str(tiny_model))
    assert_refused(command("run"), 2, "no prompt")
    assert_refused(command("run", stdin=" \n"), 2, "no prompt")
    assert_refused(command("run", stdin=b"\xff\xfe"), 2, "UTF-8")
    assert_refused(command("run", "x", "--max-tokens", "0"), 2, "--max-tokens")
    assert_refused(command("run", "x", "--temperature", "3"), 2, "--temperature")
    assert_refused(command("run", "/no/such/model", "x"), 1, "/no/such/model")
    assert_refused(command("run", "word " * 1000), 1, "512")
    assert_refused(command("run", "\udcff"), 1, "surrogate")
    broken = shutil.copytree(tiny_model, tmp_path / "model")
    without_a_tensor(broken)
    assert_refused(command("run", str(broken), "x"), 1, "lack model.layers.1.mlp.up_proj.weight")


@pytest.fixture
def endless_model(tiny_model: Path, tmp_path: Path) -> Path:
    """It has no end token, and room for minutes of text."""
    folder = shutil.copytree(tiny_model, tmp_path / "endless")
    edit("config.json", max_position_embeddings=65536, eos_token_id=None)(folder)
    edit("generation_config.json", eos_token_id=None)(folder)
    return folder


def engine_of(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children()
        return any("model.engine" in child.cmdline() for child in children)
    return False


def test_ctrl_c_ends_a_run_with_130(endless_model: Path) -> None:
    with started("run", str(endless_model), "Hello") as process:
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdin = None
        assert process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)  # the engine gets it too, as at a terminal
        _, err = process.communicate(timeout=5)
        assert (process.returncode, err) == (130, b"")


def test_a_reader_that_has_seen_enough_ends_a_run(endless_model: Path) -> None:
    with started("run", str(endless_model), "Hello") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.close()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(5) == 1
        assert process.stderr.read() == b""


def end_while_loading(
    model: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    with started("serve", str(model), "--port", "0") as process:
        wait_until(lambda: engine_of(process), WATCHDOG_SECONDS, "no engine")
        send(process.pid, number)
        out, err = process.communicate(timeout=5)
        assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_loads_ends_the_server(
    tiny_model: Path, number: signal.Signals
) -> None:
    end_while_loading(tiny_model, number, os.kill)


def test_ctrl_c_at_a_terminal_while_the_engine_loads(tiny_model: Path) -> None:
    end_while_loading(tiny_model, signal.SIGINT, os.killpg)


# ------------------------------------------------------------------------------- the others


def test_pull_of_a_folder(tiny_model: Path, cache: Path) -> None:
    for _ in range(2):
        result = command("pull", str(tiny_model))
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{tiny_model.name} is ready in {tiny_model}\n"
    assert list(cache.glob("local/*/manifest.json"))


def test_doctor() -> None:
    result = command("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    said = " ".join(result.stdout.split())
    for word in ("Python", "torch 2.", "CPU", "memory", "disk", f"with {find_compiler()}", "GPU"):
        assert word in said, word
    assert "headwater pull" in said  # this test's cache is empty


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (find_compiler, "made with {}: "),
        (lambda: shutil.which("false"), "{} cannot compile the kernels"),
        (lambda: "", "no C++ compiler is installed; install g++ (apt-get install g++)"),
    ],
    ids=["the one", "one that is none", "none"],
)
def test_doctor_tells_which_compiler_is_used(compiler: Callable[[], str], words: str) -> None:
    result = command("doctor", CXX=compiler(), PATH="/nowhere")
    assert (result.returncode, result.stderr) == (0, "")
    assert words.format(compiler()) in " ".join(result.stdout.split())


def test_bench(tiny_server: Server) -> None:
    result = command(
        *["bench", "--url", tiny_server.url, "--concurrency", "1,2", "--num-requests", "2"],
        *["--prompt-tokens", "20", "--max-tokens", "8"],
    )
    assert (result.returncode, result.stderr) == (0, "")
    *table, last = result.stdout.splitlines()
    document = json.loads(last)
    assert [level["concurrency"] for level in document["levels"]] == [1, 2]
    assert "tiny-llama" in last
    assert len(table) > 3


def test_bench_refuses() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        result = command("bench", "--url", url)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and url in result.stderr
    assert_refused(command("bench", "--concurrency", "1,many"), 2, "--concurrency", "1,many")
    for options in (["--max-tokens", "0"], ["--concurrency", "0"], ["--url", "ftp://x"]):
        result = command("bench", *options)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


def test_version_and_help() -> None:
    root = Path(__file__).parents[1]
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert command("--version").stdout == f"headwater {version}\n"
    result = command("--help")
    assert (result.returncode, result.stderr) == (0, "")
    commands = ("serve", "run", "pull", "bench", "doctor")
    for name in commands:
        assert f" {name} " in result.stdout
        about = command(name, "--help")
        assert (about.returncode, about.stderr) == (0, "")
        assert f"headwater {name}" in about.stdout
    nothing = command()
    assert nothing.returncode == 2
    assert nothing.stderr == "" and "serve" in nothing.stdout
    assert_refused(command("serv"), 2, "'serv'", "'serve'")
