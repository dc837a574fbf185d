"""A GGUF file as a model: its header becomes the files that the rest of the program reads.

The converted folder holds `config.json` (a DecoderConfig), `tokenizer.json` and
`tokenizer_config.json` (with the chat template); the weights stay in the GGUF file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from model.config import DecoderConfig, UnsupportedModel
from model.hub.cache import HubError, Manifest, stamp
from model.hub.folder import BrokenFile, digest

if TYPE_CHECKING:
    from rich.console import Console

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def check_name(path: Path) -> None:
    """Raises HubError for a file of another kind, before anything reads it."""
    if path.suffix == ".safetensors":
        raise HubError(f"{path} is one file of a model; give its folder: {path.parent}")
    if path.suffix != ".gguf":
        raise HubError(
            f"{path} is not a model this program reads; give a .gguf file, or a folder with "
            "config.json, tokenizer.json and *.safetensors"
        )


def prepare(
    gguf: Path, folder: Path, console: Console | None, old: Manifest | None = None
) -> Manifest:
    """Writes the converted files into `folder`, which becomes the cache entry.

    `gguf` is either in that folder or anywhere else, where it stays. `old` spares the hashing of an
    unchanged file. Raises HubError for a broken or unsupported file."""
    # Only a conversion needs these; finding a prepared model should not wait for their imports.
    from model.config import from_gguf
    from model.gguf.file import GGUFError, GGUFFile
    from model.gguf.tokenizer import tokenizer_config, tokenizer_json

    weights = (stamp(gguf, folder),)
    try:
        file = GGUFFile.open(gguf)
    except GGUFError as error:
        raise BrokenFile(f"{gguf} is broken or not a GGUF file: {error}") from error
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise HubError(
            f"{gguf} is one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
    try:
        documents: list[Any] = [
            from_gguf(file.metadata, file.tensors),
            tokenizer_json(file.metadata),
            tokenizer_config(file.metadata),
        ]
    except UnsupportedModel as error:
        raise HubError(f"{gguf.name} cannot be served: {error}") from error
    except ValueError as error:
        raise HubError(f"the tokenizer of {gguf.name} cannot be used: {error}") from error
    for name, document in zip(_FILES, documents, strict=True):
        (folder / name).write_bytes(msgspec.json.encode(document))
    return Manifest(
        converter="",
        format="gguf",
        folder=".",
        weights=weights,
        files=tuple(stamp(folder / name, folder) for name in _FILES),
        num_parameters=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        weights_digest=digest(folder, weights, console, old),
    )


def read_config(folder: Path) -> DecoderConfig:
    """The config that `prepare` wrote. Raises HubError when it is not one."""
    try:
        return msgspec.json.decode((folder / "config.json").read_bytes(), type=DecoderConfig)
    except msgspec.DecodeError as error:
        raise HubError(f"{folder} is broken ({error}); delete it and try again") from error
