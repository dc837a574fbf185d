"""The cache of prepared models: where it is, who may write it, and what makes an entry complete.

An entry is a folder with a `manifest.json` that is written last. The manifest stamps every file the
model needs with its size and time of change, so that a prepared model is found again without
reading its weights. An entry appears whole (a temporary folder, renamed) or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

MANIFEST = "manifest.json"
GIB = 1024**3


class HubError(Exception):
    """A model cannot be found, fetched, read or held; one line says why and what to do."""


class FileStamp(msgspec.Struct, frozen=True):
    """One file as it was when it was last checked: `size` in bytes, `mtime_ns` since 1970.
    `path` is relative to the manifest's `folder`, or absolute when the file lies elsewhere."""

    path: str
    size: int
    mtime_ns: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a prepared model. `converter` names the code that wrote the folder's files;
    `folder` is "." for the entry itself. `weights` come first in load order; `files` are the rest.
    `weights_digest` is blake3 over the weights' bytes; `num_parameters` counts their elements."""

    converter: str
    format: Literal["gguf", "safetensors"]
    folder: str
    weights: tuple[FileStamp, ...]
    files: tuple[FileStamp, ...]
    weights_digest: str
    num_parameters: int


def cache_folder() -> Path:
    """`HEADWATER_CACHE`, else `headwater` in the user's cache folder (XDG is respected)."""
    if own := os.environ.get("HEADWATER_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "headwater"
    base = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / base / "headwater"


def entry_folder(kind: str, key: str) -> Path:
    """The folder of an entry; `key` may be any text (a path, a repository id)."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / kind / digest


def stamp(path: Path, base: Path) -> FileStamp:
    """Stamps a file. Raises OSError when it is not there."""
    status = path.stat()
    name = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    return FileStamp(name, status.st_size, status.st_mtime_ns)


def read_manifest(entry: Path) -> Manifest | None:
    """The entry's manifest, or None when there is none that can be read."""
    try:
        return msgspec.json.decode((entry / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def manifest_folder(entry: Path, manifest: Manifest) -> Path:
    """The folder that the manifest's relative paths start from."""
    return entry if manifest.folder == "." else Path(manifest.folder)


def unchanged(folder: Path, stamps: tuple[FileStamp, ...]) -> bool:
    """Whether every stamped file is there with the same size and time of change."""
    try:
        return all(stamp(folder / old.path, folder) == old for old in stamps)
    except OSError:
        return False


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that it is seen whole or not at all, also after a power cut."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def locked(entry: Path, console: Console | None) -> Iterator[None]:
    """Holds the entry against other processes; the lock ends with the process that holds it.

    Raises HubError when the cache cannot be written or the disk is full."""
    from filelock import FileLock, Timeout

    with explained(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.with_name(entry.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if console is not None:
                console.print("another process is preparing this model; waiting for it")
            lock.acquire()
    try:
        with explained(entry):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """A temporary folder that becomes `entry` when the block ends well. Hold the entry's lock."""
    for stale in entry.parent.glob(f".{entry.name}.*.part"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a killed process; we hold the lock
    part = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".part", dir=entry.parent))
    part.chmod(0o755)  # a cache may be shared by users; mkdtemp makes it private
    try:
        yield part
        for path in part.iterdir():
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if entry.exists():
            # A folder cannot be replaced in one step: the old one goes where it is cleaned up.
            old = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".part", dir=entry.parent))
            os.replace(entry, old / "old")
            os.replace(part, entry)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def explained(entry: Path) -> Iterator[None]:
    """Turns what the file system says about the cache into one line for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: no room for the model in {entry.parent}; free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            message = (
                f"the model cache {cache_folder()} cannot be written ({error.strerror}); "
                "make it writable"
            )
        else:
            raise HubError(f"the model could not be prepared: {error}") from error
        raise HubError(f"{message} or set HEADWATER_CACHE to another folder") from error


def check_space(folder: Path, needed: int) -> None:
    """Raises HubError when the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HubError(
            f"the disk is full: the model needs {needed / GIB:.2f} GiB in {folder} and "
            f"{free / GIB:.2f} GiB are free; free some space or set HEADWATER_CACHE "
            "to another folder"
        )
