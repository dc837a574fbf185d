"""The container files, checked without a Docker engine: what they name must exist."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from server.cli import app
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("cpu", "cuda")


@dataclass
class Stage:
    """One FROM and the (instruction, argument) pairs after it, continuation lines joined."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]


def read_dockerfile() -> dict[str, Stage]:
    text = (ROOT / "docker/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, value = line.strip().partition(" ")
        if instruction == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", value)
            assert match, f"a stage without a name: {line}"
            stage = Stage(match[1], match[2])
            assert stage.name not in stages
            stages[stage.name] = stage
        else:
            assert stage is not None
            stage.steps.append((instruction, value.strip()))
    return stages


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """The stage and those it is built on, itself first."""
    found = [stages[name]]
    while found[-1].base in stages:
        found.append(stages[found[-1].base])
    return found


def read_compose() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert isinstance(document, dict)
    return document


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets the path into the build: the last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps = pattern.startswith("!")
        pattern = pattern.lstrip("!").rstrip("/").replace("**/", "*")
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + "/*"):
            sent = keeps
    return sent


def parsed(command: list[str]) -> dict[str, Any]:
    """The options of a `headwater` command line, read by the command line's own parser: an
    unknown command or option raises."""
    group: Any = typer.main.get_command(app)
    assert command[0] in group.commands, f"headwater has no command {command[0]}"
    context = group.commands[command[0]].make_context(command[0], command[1:])
    return dict(context.params)


def commands() -> list[tuple[str, list[str]]]:
    """Every `headwater` command line in the container files, with the place it is from."""
    found = [(t, json.loads(read_dockerfile()[t].last("CMD"))) for t in TARGETS]
    found += [(f"compose {n}", s["command"]) for n, s in read_compose()["services"].items()]
    text = (ROOT / "docker/Dockerfile").read_text()
    for match in re.findall(r"^#\s+headwater:(?:cpu|cuda) (.+)$", text, re.MULTILINE):
        found.append(("the Dockerfile's example", shlex.split(match)))
    assert len(found) == 5
    return found


# ------------------------------------------------------------------------------- Dockerfile


def test_every_stage_named_exists() -> None:
    stages = read_dockerfile()
    assert set(TARGETS) <= set(stages)
    seen: set[str] = set()
    for name, stage in stages.items():
        if ":" not in stage.base:
            assert stage.base in seen, f"{name} is built on {stage.base}, which is not above it"
        for copy in stage.all("COPY"):
            if source := re.match(r"--from=(\S+)", copy):
                assert source[1] in seen, f"{name} copies from {source[1]}"
        seen.add(name)
    assert list(stages)[-1] == "cpu", "the last stage is what a build without --target makes"


def test_every_path_copied_exists_and_is_sent_to_the_build() -> None:
    copied = set()
    for stage in read_dockerfile().values():
        for copy in stage.all("COPY"):
            if not copy.startswith("--from="):
                copied.update(copy.split()[:-1])
    assert {"model/", "server/", "pyproject.toml", "requirements/run.txt"} <= copied
    for path in sorted(copied):
        assert (ROOT / path).exists(), f"COPY {path}: it is not in the repository"
        assert (ROOT / path).is_dir() == path.endswith("/")
        inside = path + "config.py" if path.endswith("/") else path
        assert is_sent(inside), f"COPY {path}: .dockerignore leaves it out"


def test_what_the_image_does_not_need_is_not_sent() -> None:
    for path in (".git/config", ".venv/bin/python", ".env", "tests/test_docker.py"):
        assert not is_sent(path)
    assert not is_sent("model/__pycache__/kv.cpython-311.pyc")


def test_the_package_is_what_its_own_file_says() -> None:
    # Without these the build backend stops, or the wheel lacks what the code opens at run time.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = " ".join(c for s in read_dockerfile().values() for c in s.all("COPY"))
    for path in (project["project"]["readme"], *project["project"]["license-files"]):
        assert path in copied
    data = project["tool"]["setuptools"]["package-data"]
    for package in ("model", "server"):
        for file in (ROOT / package).rglob("*"):
            if file.is_dir() or file.suffix == ".py" or "__pycache__" in file.parts:
                continue
            inside = file.relative_to(ROOT / package).as_posix()
            assert any(fnmatch.fnmatchcase(inside, p) for p in data[package]), (
                f"{package}/{inside} would be missing from an installed package: "
                "name it in [tool.setuptools.package-data]"
            )


@pytest.mark.parametrize("target", TARGETS)
def test_installs_from_the_locked_requirements(target: str) -> None:
    stages = read_dockerfile()
    runs = " ".join(stages[f"{target}-build"].all("RUN"))
    assert "install --require-hashes -r requirements/run.txt" in runs
    assert "requirements/torch.txt" in runs
    assert "install --no-deps --no-build-isolation ." in runs
    assert f"--from={target}-build /opt/headwater /opt/headwater" in stages[target].all("COPY")
    # A virtual environment runs only with the Python that made it.
    assert stages[target].base == stages[f"{target}-build"].base


@pytest.mark.parametrize("target", TARGETS)
def test_runs_as_a_user_who_owns_the_volumes(target: str) -> None:
    stage = read_dockerfile()[target]
    uid, gid = stage.last("USER").split(":")
    assert int(uid) > 0 and int(gid) > 0
    made = " ".join(stage.all("RUN"))
    assert f"groupadd --gid {gid} headwater" in made
    assert f"useradd --uid {uid} --gid {gid}" in made
    assert "--owner=headwater --group=headwater /cache /data" in made
    assert json.loads(stage.last("VOLUME")) == ["/cache", "/data"]
    settings = " ".join(stage.all("ENV")).split()
    assert {"HEADWATER_CACHE=/cache", "HEADWATER_DATA=/data"} <= set(settings)
    # What runs as root comes before; nothing after USER needs it.
    order = [name for name, _ in stage.steps]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")


def test_the_bases_and_tools_of_the_targets() -> None:
    stages = read_dockerfile()
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-\S+", chain(stages, "cuda")[-1].base)
    cpu = " ".join(stages["cpu"].all("RUN"))
    assert re.search(r"apt-get install .*\bg\+\+", cpu), "kernels are compiled on first use"


@pytest.mark.parametrize("target", TARGETS)
def test_the_ports_agree(target: str) -> None:
    stage = read_dockerfile()[target]
    assert json.loads(stage.last("ENTRYPOINT")) == ["headwater"]
    options = parsed(json.loads(stage.last("CMD")))
    port = options["port"]
    assert stage.last("EXPOSE") == str(port)
    check = stage.last("HEALTHCHECK")
    probe = json.loads(check[check.index("CMD ") + 4 :])
    assert probe[:2] == ["python", "-c"]
    compile(probe[2], "HEALTHCHECK", "exec")
    assert f"http://127.0.0.1:{port}/health" in probe[2]
    assert options["device"] == target
    service = read_compose()["services"][target]
    assert parsed(service["command"])["port"] == port
    for published in service["ports"]:
        assert published.endswith(f":{port}")


@pytest.mark.parametrize(
    ("where", "command"), commands(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_command_and_option_exists(where: str, command: list[str]) -> None:
    options = parsed(command)
    assert options["host"] == "0.0.0.0", f"{where}: inside a container loopback reaches nobody"
    # The bare image refuses to be reachable without keys; compose publishes on loopback only.
    assert bool(options["no_auth"]) == (where not in TARGETS)


# ---------------------------------------------------------------------------------- compose


def test_compose_has_only_known_keys() -> None:
    document = read_compose()
    known = {"name", "services", "volumes", "networks", "configs", "secrets", "include"}
    assert {key for key in document if not key.startswith("x-")} <= known
    services = document["services"]
    assert set(services) == set(TARGETS)
    for service in services.values():
        assert set(service) <= {
            "image", "build", "command", "init", "restart", "stop_grace_period", "ports",
            "volumes", "environment", "cap_drop", "security_opt", "profiles", "deploy",
        }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_service_builds_its_target_and_stays_on_loopback(target: str) -> None:
    document = read_compose()
    service = document["services"][target]
    build = service["build"]
    assert build["target"] == target
    context = (ROOT / "docker" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    declared = {v.split("=")[0] for v in read_dockerfile()[f"{target}-build"].all("ARG")}
    assert set(build.get("args", {})) <= declared
    assert service["ports"]
    for published in service["ports"]:
        assert published.startswith("127.0.0.1:")
    mounted = dict(volume.split(":") for volume in service["volumes"])
    assert set(mounted) <= set(document["volumes"])
    assert set(mounted.values()) == set(json.loads(read_dockerfile()[target].last("VOLUME")))
    assert service["restart"] == "unless-stopped"
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace and int(grace[1]) >= Settings.model_fields["shutdown_grace"].default + 10
    for name in service["environment"]:
        assert name.removeprefix("HEADWATER_").lower() in Settings.model_fields


def test_the_gpu_is_only_asked_for_by_the_cuda_profile() -> None:
    services = read_compose()["services"]
    assert "profiles" not in services["cpu"] and "deploy" not in services["cpu"]
    assert services["cuda"]["profiles"] == ["cuda"]
    (device,) = services["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
