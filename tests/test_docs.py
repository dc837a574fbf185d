"""What the documents say is true: links, settings, commands, routes, fields, codes, examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import typer
from anthropic.types.beta.message_create_params import MessageCreateParams as BetaMessageParams
from anthropic.types.message_create_params import MessageCreateParams as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParams as ChatParams
from openai.types.completion_create_params import CompletionCreateParams as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParams as ResponseParams
from pydantic import BaseModel

from server import errors
from server.api.chat import ChatRequest
from server.api.completions import CompletionRequest
from server.api.conversations import NewConversation
from server.api.inspect_bodies import (
    AttentionBody,
    CacheBody,
    ForwardBody,
    SubjectBody,
    TextBody,
)
from server.api.message_fields import MessagesRequest
from server.api.response_fields import ResponseRequest
from server.api.sampling import SamplingFields
from server.api.session_bodies import Fork, NewSession, NewTurn
from server.api.session_fields import Defaults
from server.api.tokens import DetokenizeRequest, TokenizeRequest
from server.cli import app
from server.settings import Settings
from tests.fixtures.server import Server

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {".git", ".venv", ".pytest_cache", "node_modules", "build", "dist"}
README = ROOT / "README.md"
API, OPERATING = ROOT / "docs/api.md", ROOT / "docs/operating.md"
SESSIONS = ROOT / "docs/sessions.md"
DEFAULT_URL = "http://127.0.0.1:8000"


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        found += [Path(folder) / name for name in names if name.endswith(".md")]
    return sorted(found)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> str:
    """The code in a document, inline and in blocks, a piece a line."""
    text = path.read_text()
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose)])


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The names that a link to a heading may have, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def rows(path: Path, heading: str) -> Iterator[list[str]]:
    """The cells of the table rows between a heading and the next one of any level."""
    text = "\n" + path.read_text()
    assert f"\n{heading}\n" in text, f"{name_of(path)} has no heading {heading!r}"
    section = re.split(r"^#", text.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| field "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def quoted(cell: str) -> str:
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, f"{cell!r} is not one name in backticks"
    return match[1]


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(ROOT), f"{target} leaves the repository"
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


# --------------------------------------------------------------------------------- settings


def known_variables() -> set[str]:
    names = {f"HEADWATER_{field.upper()}" for field in Settings.model_fields}
    sources = [*ROOT.glob("model/hub/*.py"), *ROOT.glob("clients/curl/*.sh")]
    for source in sources:
        names |= set(re.findall(r"HEADWATER_[A-Z_]+", source.read_text()))
    return names


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_variables_exist(path: Path) -> None:
    named = set(re.findall(r"HEADWATER_[A-Z_]*[A-Z]", path.read_text()))
    assert named <= known_variables()


def test_every_setting_is_documented_with_its_default() -> None:
    table = {
        quoted(cells[0]): cells[1]
        for cells in rows(README, "## Settings")
        if cells[0].startswith("`")
    }
    for name, field in Settings.model_fields.items():
        variable = f"HEADWATER_{name.upper()}"
        assert variable in table, f"{variable} is not in the README's table"
        if field.default is not None:
            said: dict[str, Any] = {name: quoted(table[variable])}
            assert getattr(Settings(**said), name) == field.default, variable


# --------------------------------------------------------------------------------- commands


def the_commands() -> dict[str, typer.core.TyperCommand]:
    group: Any = typer.main.get_command(app)
    commands: dict[str, typer.core.TyperCommand] = group.commands
    return commands


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^\s*make ([a-z-]+)", code_of(path), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_commands_exist(path: Path) -> None:
    named = re.findall(r"^\s*(?:\.venv/bin/)?headwater ([a-z]\S*)", code_of(path), re.MULTILINE)
    assert set(named) <= set(the_commands())


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_options_exist(path: Path) -> None:
    known = {o for command in the_commands().values() for p in command.params for o in p.opts}
    for line in code_of(path).splitlines():
        command = re.match(r"\s*headwater ([a-z]+)", line)
        options = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line))
        if command:
            assert options <= {o for p in the_commands()[command[1]].params for o in p.opts}, line
        elif re.match(r"--[a-z-]+", line):
            assert options <= known, line


def test_every_command_is_in_the_readme() -> None:
    for command in the_commands():
        assert f"`headwater {command}" in README.read_text()


# -------------------------------------------------------------------------------------- API


def test_every_route_is_documented_and_there(tiny_server: Server) -> None:
    paths = httpx.get(f"{tiny_server.url}/openapi.json").json()["paths"]
    there = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    table = {quoted(cells[0]) for cells in rows(API, "# The API") if cells[0].startswith("`")}
    assert table == there


@pytest.mark.parametrize(
    ("heading", "body", "common"),
    [
        ("## Sampling fields", SamplingFields, set()),
        ("## POST /v1/chat/completions", ChatRequest, set(SamplingFields.model_fields)),
        ("## POST /v1/completions", CompletionRequest, set(SamplingFields.model_fields)),
        ("## POST /v1/responses", ResponseRequest, set(SamplingFields.model_fields)),
        ("## POST /v1/messages", MessagesRequest, set(SamplingFields.model_fields)),
        ("## Conversations", NewConversation, set()),
        ("## POST /tokenize", TokenizeRequest, set()),
        ("### POST /v1/inspect/tokens", TextBody, set()),
        ("### POST /v1/inspect/forward", ForwardBody, set(TextBody.model_fields)),
        ("### POST /v1/inspect/attention", AttentionBody, set(SubjectBody.model_fields)),
        ("### POST /v1/inspect/kv-cache", CacheBody, set(TextBody.model_fields)),
        ("## POST /detokenize", DetokenizeRequest, set()),
    ],
)
def test_every_field_is_documented_and_there(
    heading: str, body: type[BaseModel], common: set[str]
) -> None:
    documented = [quoted(cells[0]) for cells in rows(API, heading) if cells[0].startswith("`")]
    assert len(documented) == len(set(documented))
    assert set(documented) == set(body.model_fields) - common


OFFICIAL: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    (
        "### OpenAI: chat completions",
        "/v1/chat/completions",
        get_args(ChatParams),
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    ),
    (
        "### OpenAI: completions",
        "/v1/completions",
        get_args(CompletionParams),
        {"prompt": "Hi", "max_tokens": 1},
    ),
    (
        "### OpenAI: responses",
        "/v1/responses",
        get_args(ResponseParams),
        {"input": "Hi", "max_output_tokens": 1},
    ),
    (
        "### Anthropic: messages",
        "/v1/messages",
        get_args(MessageParams) + get_args(BetaMessageParams),
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    ),
]


@pytest.mark.parametrize(("heading", "path", "kinds", "body"), OFFICIAL)
def test_every_field_of_the_official_apis_is_told_of_and_so_treated(
    heading: str, path: str, kinds: tuple[Any, ...], body: dict[str, Any], tiny_server: Server
) -> None:
    table = {quoted(cells[0]): cells[1] for cells in rows(API, heading) if "`" in cells[0]}
    assert set(table) == {
        f for kind in kinds for f in kind.__required_keys__ | kind.__optional_keys__
    }
    assert set(table.values()) == {"supported", "ignored", "refused"}
    for name, treatment in table.items():
        value = {} if name == "stream_options" else "x"
        answer = httpx.post(f"{tiny_server.url}{path}", json={**body, name: value}, timeout=30)
        if treatment == "ignored":
            assert answer.status_code == 200, f"{name}: {answer.text}"
        elif treatment == "refused":
            assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("heading", "body", "common"),
    [
        ("## Make one, and talk", {**NewSession.model_fields, **NewTurn.model_fields}, Defaults),
        ("## Fork at a turn, or at a token", Fork.model_fields, BaseModel),
    ],
)
def test_every_field_of_sessions_is_documented_and_there(
    heading: str, body: dict[str, Any], common: type[BaseModel]
) -> None:
    cells = [cells[0] for cells in rows(SESSIONS, heading) if cells[0].startswith("`")]
    documented = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    required = set(body) - set(common.model_fields)
    assert required <= documented <= set(body)


def test_every_error_is_documented_and_there() -> None:
    def tree(kind: type[errors.HeadwaterError]) -> Iterator[type[errors.HeadwaterError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    there = {(str(kind.status), kind.default_code) for kind in tree(errors.HeadwaterError)}
    table = {
        (cells[0], quoted(cells[1])) for cells in rows(OPERATING, "## Errors") if cells[0].isdigit()
    }
    assert table == there


def test_every_metric_is_documented_and_there(tiny_server: Server) -> None:
    text = httpx.get(f"{tiny_server.url}/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    there = {name for name in types if not name.endswith("_created")}
    table = {
        quoted(cells[0]).partition("{")[0]
        for cells in rows(OPERATING, "## Metrics")
        if cells[0].startswith("`")
    }
    assert table == there


# --------------------------------------------------------------------------------- examples


def curl_examples() -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(path)}-{number}")
        for path in documents()
        for number, block in enumerate(b for b in blocks(path, "sh") if b.startswith("curl "))
        if path != SESSIONS  # those hang together
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", curl_examples())
def test_curl_examples_run(block: str, tiny_server: Server) -> None:
    assert DEFAULT_URL in block
    done = subprocess.run(
        ["bash", "-ec", block.replace("curl ", "curl -sS --fail-with-body ", 1)
         .replace(DEFAULT_URL, tiny_server.url)],
        env={**os.environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    if '"stream": true' in block:
        assert done.stdout.endswith("data: [DONE]\n\n")
    else:
        assert done.stdout.startswith("{")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("path", [README, SESSIONS], ids=name_of)
def test_session_examples_run(path: Path, tiny_server: Server, tmp_path: Path) -> None:
    every = blocks(path, "sh") if path == SESSIONS else []
    parts = every or [b for b in blocks(path, "sh") if b.startswith("session=")]
    script = "\n".join(parts)
    assert DEFAULT_URL in script
    checked = 'set -o pipefail; curl() { command curl -sS --fail-with-body "$@"; }\n'
    # The tiny model would fill its context: long, and nothing more is learned.
    short = script.replace('"title": "Rivers"', '"title": "Rivers", "defaults": {"max_tokens": 9}')
    done = subprocess.run(
        ["bash", "-ec", checked + (short if path == README else script).replace(
            DEFAULT_URL, tiny_server.url)],
        cwd=tmp_path,
        env={**os.environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    assert "event: done" in done.stdout


def test_the_sdk_example_runs(tiny_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    assert DEFAULT_URL in block and "stream=True" in block
    names: dict[str, Any] = {}
    # The tiny model would go on to the end of its context: long, and nothing more is learned.
    text = block.replace(DEFAULT_URL, tiny_server.url).replace(
        "stream=True,", "stream=True, max_tokens=20, seed=1,"
    )
    exec(compile(text, "README.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out
