"""A folder of safetensors as Hugging Face lays it out: what must be there, and whether it is whole.

Expected: `config.json`, `tokenizer.json`, and either `model.safetensors`, the shards named by
`model.safetensors.index.json`, or any other `*.safetensors`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
import msgspec

from model.config import DecoderConfig, UnsupportedModel, from_hf
from model.hub.cache import FileStamp, HubError, Manifest, stamp, unchanged
from model.hub.wheel import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_INDEX = "model.safetensors.index.json"
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK = 16 << 20
_SHOW_FROM = 1 << 30  # hashing less than this is over before a bar can be read


class BrokenFile(HubError):
    """A file that is there but cut or damaged: fetching it again may help."""


def check(folder: Path) -> None:
    """Raises HubError when the folder lacks something, or holds what is not supported."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.json" in names:
        read_config(folder)
    missing = [name for name in _REQUIRED if name not in names]
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if "config.json" in missing and ggufs:
        raise HubError(f"{folder} is a folder; name the file in it: {folder / ggufs[0]}")
    weights = [path.name for path in weight_files(folder)]
    if not weights:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise HubError(
                f"{folder} has only a pickle checkpoint ({pickles[0]}), which is not read because "
                "loading one can run code; convert it to safetensors (transformers: "
                "save_pretrained with safe_serialization)"
            )
        missing.append("*.safetensors")
    missing += [name for name in weights if name not in names]
    if missing:
        hint = ""
        if "tokenizer.json" in missing and "tokenizer.model" in names:
            hint = " (tokenizer.model alone is not read: save it as a fast tokenizer)"
        raise HubError(
            f"{folder} is not a whole model, missing: {', '.join(missing)}{hint}; "
            "add what is missing, or download the model again"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in load order; a shard that the index names may not exist."""
    index = folder / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BrokenFile(f"{index} is broken: it has no weight_map; download it again")
        shards = sorted({str(name) for name in weight_map.values()})
        for name in shards:
            if "/" in name or "\\" in name or not name.endswith(".safetensors"):
                raise HubError(f"{index} names {name!r}, which is not a file beside it")
        return [folder / name for name in shards]
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def prepare(folder: Path, console: Console | None, old: Manifest | None = None) -> Manifest:
    """Checks and hashes the folder's files. `old` spares the hashing of unchanged weights.

    Raises HubError, and BrokenFile for a file that is cut or damaged."""
    check(folder)
    weights = weight_files(folder)
    stamps = tuple(stamp(path, folder) for path in weights)
    present = [folder / name for name in (*_REQUIRED, *_OPTIONAL) if (folder / name).exists()]
    files = tuple(stamp(path, folder) for path in present)
    for path in present:
        if path.suffix == ".json":
            read_json(path)
    return Manifest(
        converter="",
        format="safetensors",
        folder=str(folder),
        weights=stamps,
        files=files,
        num_parameters=sum(_count_parameters(path) for path in weights),
        weights_digest=digest(folder, stamps, console, old),
    )


def digest(
    base: Path, stamps: Sequence[FileStamp], console: Console | None, old: Manifest | None = None
) -> str:
    """blake3 (hex) over the files' sizes and bytes, in order; taken from `old` when it has the
    same files, unchanged."""
    if old is not None and old.weights == tuple(stamps) and unchanged(base, old.weights):
        return old.weights_digest
    total = sum(one.size for one in stamps)
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    done = 0
    with progress_bar(console if total >= _SHOW_FROM else None, "checking", total) as show:
        for one in stamps:
            hasher.update(one.size.to_bytes(8, "little"))
            with open(base / one.path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    hasher.update(chunk)
                    done += len(chunk)
                    show(done)
    return hasher.hexdigest()


def _count_parameters(path: Path) -> int:
    """Elements of all tensors of a file, whose header is checked against its size on the way."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    except SafetensorError as error:
        raise BrokenFile(
            f"{path} is broken or cut off ({error}); download or copy it again"
        ) from error
    return sum(math.prod(shape) for shape in shapes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BrokenFile when the file holds something else."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BrokenFile(
            f"{path} is broken: not a JSON object ({error}); download or copy it again"
        ) from error
    return document


def read_config(folder: Path) -> DecoderConfig:
    """The decoder's config, with the end tokens of `generation_config.json` added.

    Raises HubError for a model that is not supported."""
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():
        ends = [*_ids(config), *_ids(read_json(generation))]
        config["eos_token_id"] = list(dict.fromkeys(ends)) or None
    try:
        return from_hf(config)
    except UnsupportedModel as error:
        raise HubError(f"{folder.name} cannot be served: {error}") from error


def _ids(document: dict[str, Any]) -> list[int]:
    value = document.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int)]


def read_chat_template(folder: Path) -> str | None:
    """The template's source: `chat_template.jinja`, else the (default) one of the tokenizer's
    config. None when the model has none."""
    own = folder / "chat_template.jinja"
    if own.exists():
        return own.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
