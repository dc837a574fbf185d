"""WeightFiles: the tensors of a model under one naming, out of safetensors or GGUF.

The naming is that of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`). Tensors
are read one at a time, packed as they are; nothing here prepares or keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch

from model.config import DecoderConfig
from model.gguf.file import GGUFError, GGUFFile
from model.rope import RopeFactors
from model.weights.raw_tensor import RawTensor, from_numpy

_SAFETENSORS_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
# Buffers that old checkpoints carry; they follow from the configuration.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class WeightsError(ValueError):
    """The files do not hold the weights that the configuration asks for; one line that says why."""


class WeightFiles(Protocol):
    """Open weight files."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, without reading it."""

    @property
    def rope_factors(self) -> RopeFactors | None:
        """Rope divisors that are stored as tensors."""

    def read(self, name: str) -> RawTensor:
        """One tensor; a view of the file where its rows need no permutation."""

    def close(self) -> None:
        """Let go of the files; what `read` gave stays valid."""


def open_weights(paths: Path | Sequence[Path], config: DecoderConfig) -> WeightFiles:
    """Open a folder, or the weight files themselves. Raises WeightsError."""
    files = _find(paths) if isinstance(paths, Path) else list(paths)
    if not files:
        raise WeightsError(f"there are no weights in {paths}: expected *.safetensors or one *.gguf")
    kinds = {file.suffix for file in files}
    if kinds == {".safetensors"}:
        return SafetensorsFiles(files)
    if kinds == {".gguf"} and len(files) == 1:
        return GGUFWeights(files[0], config)
    names = ", ".join(file.name for file in files)
    raise WeightsError(f"expected safetensors files or one GGUF file, got {names}")


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{index.name} is not a valid index of shards") from None
        files = []
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise WeightsError(f"{index.name} names a file outside its folder: {name!r}")
            if not (path / name).is_file():
                raise WeightsError(f"{index.name} names {name}, which is missing")
            files.append(path / name)
        return files
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))


class SafetensorsFiles:
    """One or several safetensors files, mapped into memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rope_factors: RopeFactors | None = None
        self._types: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()
        for path in paths:
            try:
                handle = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except (safetensors.SafetensorError, OSError) as error:
                self.close()
                raise WeightsError(f"{path.name} cannot be read: {error}") from error
            for name in handle.keys():
                if _IGNORED.fullmatch(name):
                    continue
                if name in self._handles:
                    self.close()
                    raise WeightsError(f"tensor {name} is in two files, {path.name} is the second")
                view = handle.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self._types[name] = view.get_dtype()
                self._handles[name] = handle

    def read(self, name: str) -> RawTensor:
        kind = _SAFETENSORS_TYPES.get(self._types[name])
        if kind is None:
            raise WeightsError(
                f"tensor {name} is {self._types[name]}; expected one of "
                f"{', '.join(_SAFETENSORS_TYPES)}"
            )
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        shape = self.shapes[name]
        return RawTensor(name, kind, shape, tensor.reshape(shape[0], -1).view(torch.uint8))

    def close(self) -> None:
        self._handles.clear()
        self._stack.close()


class GGUFWeights:
    """A GGUF file under canonical names, its llama rows back in Hugging Face's order."""

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        try:
            self._file = GGUFFile.open(path)
        except (GGUFError, OSError) as error:
            raise WeightsError(f"{path.name} cannot be read: {error}") from error
        self._config = config
        self._permuted = self._file.metadata.get("general.architecture") == "llama"
        self._names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._file.tensors.items():
            if name.startswith(("rope_freqs.", "rope_factors_")):
                continue
            canonical = self._canonical(name)
            self._names[canonical] = name
            self.shapes[canonical] = tensor.shape
        self.rope_factors = self._rope_factors()

    def _canonical(self, name: str) -> str:
        match = _GGUF_NAME.fullmatch(name)
        if match is None or match[2] not in _GGUF_NAMES:
            return name  # named as unexpected by the loader
        target = _GGUF_NAMES[match[2]]
        if self._config.family == "phi3" and match[2] == "ffn_up":
            target = "mlp.gate_up_proj"
        layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
        return f"{layer}{target}.{match[3]}"

    def _rope_factors(self) -> RopeFactors | None:
        def values(*names: str) -> torch.Tensor | None:
            for name in names:
                if name in self._file.tensors:
                    return torch.tensor(self._file.dequantize(name).astype(np.float32))
            return None

        freqs = values("rope_freqs.weight")
        short, long = values("rope_factors_short.weight"), values("rope_factors_long.weight")
        if freqs is None and short is None and long is None:
            return None
        return RopeFactors(freqs, short, long)

    def read(self, name: str) -> RawTensor:
        stored = self._names[name]
        tensor = self._file.tensors[stored]
        try:
            raw = from_numpy(name, tensor.type.name, tensor.shape, self._file.read(stored))
        except ValueError as error:
            raise WeightsError(str(error)) from error
        if self._permuted and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name):
            raw = raw.take_rows(_unpermuted_rows(tensor.shape[0], self._config.head_dim))
        return raw

    def close(self) -> None:
        """Nothing to do: the mapping goes with its last view."""


def _unpermuted_rows(num_rows: int, head_dim: int) -> torch.Tensor:
    """Where each row of q or k lies in a GGUF file of architecture llama.

    The converter turns each head's halves (i, i + head_dim / 2) into neighbours (2i, 2i + 1), for
    ggml's interleaved rotation. Whole rows move, so packed ones do too, without loss."""
    rows = torch.arange(num_rows).view(-1, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
