"""DecoderWeights: weight files -> prepared weights, checked against the configuration.

One tensor at a time: beside the prepared weights, memory holds at most one matrix more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.config import DecoderConfig
from model.ops.base import Ops, Weight
from model.rope import RopeFactors
from model.weights.files import GGUFWeights, WeightFiles, WeightsError, open_weights
from model.weights.raw_tensor import RawTensor

__all__ = ["DecoderWeights", "LayerWeights", "WeightsError", "load_weights"]

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` has the rows of q, k and v; `gate_up` those of gate and up."""

    attention_norm: Weight
    qkv: Weight
    q_norm: Weight | None
    k_norm: Weight | None
    output: Weight
    feed_forward_norm: Weight
    gate_up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a decoder. `lm_head` is `embedding` itself when they are tied.

    `parameters` counts what the files hold, by part; `quantization` is for people."""

    embedding: Weight
    layers: tuple[LayerWeights, ...]
    final_norm: Weight
    lm_head: Weight
    rope_factors: RopeFactors | None
    parameters: dict[str, int]
    quantization: str

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


def load_weights(paths: Path | Sequence[Path], config: DecoderConfig, ops: Ops) -> DecoderWeights:
    """Load a folder, or the weight files themselves, through `ops`.

    In a GGUF file the tensors tell whether the head is tied and which biases there are, whatever
    `config` says. Raises WeightsError when a file is broken, a tensor is missing or unexpected, a
    shape does not fit the configuration, or a type is not supported.
    """
    files = open_weights(paths, config)
    try:
        return _Loader(files, config, ops).load()
    finally:
        files.close()


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model with this configuration."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    linears: dict[str, tuple[tuple[int, int], bool]] = {
        "self_attn.o_proj": ((hidden, q), config.o_bias),
        "mlp.down_proj": ((hidden, inner), config.mlp_bias),
    }
    if config.family == "phi3":
        linears["self_attn.qkv_proj"] = ((q + 2 * kv, hidden), config.qkv_bias)
        linears["mlp.gate_up_proj"] = ((2 * inner, hidden), config.mlp_bias)
    else:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            linears[f"self_attn.{name}_proj"] = ((rows, hidden), config.qkv_bias)
        for name in ("gate", "up"):
            linears[f"mlp.{name}_proj"] = ((inner, hidden), config.mlp_bias)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    for name, (shape, bias) in linears.items():
        layer[f"{name}.weight"] = shape
        if bias:
            layer[f"{name}.bias"] = shape[:1]
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, hidden),
        _NORM: (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _as_stored(config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> DecoderConfig:
    first = "model.layers.0."
    qkv = ("self_attn.q_proj.bias", "self_attn.qkv_proj.bias")
    return replace(
        config,
        tie_word_embeddings=_HEAD not in shapes,
        qkv_bias=any(first + name in shapes for name in qkv),
        o_bias=f"{first}self_attn.o_proj.bias" in shapes,
        mlp_bias=f"{first}mlp.down_proj.bias" in shapes,
    )


def _check(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    for what, names in (
        ("lack", expected.keys() - found.keys()),
        ("have unexpected", found.keys() - expected.keys()),
    ):
        if names:
            shown = sorted(names)[:5]
            more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
            raise WeightsError(f"the weights {what} {', '.join(shown)}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise WeightsError(
                f"tensor {name} has the shape {list(found[name])}, expected {list(shape)} "
                "by the model's configuration"
            )


class _Loader:
    """Reads each tensor once, hands it to the ops, and counts."""

    def __init__(self, files: WeightFiles, config: DecoderConfig, ops: Ops) -> None:
        shapes = dict(files.shapes)
        if isinstance(files, GGUFWeights):
            config = _as_stored(config, shapes)
        elif config.tie_word_embeddings:
            shapes.pop(_HEAD, None)  # some checkpoints store the tied head a second time
        _check(shapes, expected_shapes(config))
        self._files = files
        self._config = config
        self._ops = ops
        self._shapes = shapes
        self._parameters = dict.fromkeys(
            ("embedding", "attention", "feed_forward", "norms", "lm_head"), 0
        )
        self._types: Counter[str] = Counter()

    def load(self) -> DecoderWeights:
        tied = self._config.tie_word_embeddings
        table = self._read(_EMBEDDING)
        embedding_type = table.type
        embedding = self._ops.prepare_embedding(table, tied=tied)
        del table
        layers = tuple(self._layer(index) for index in range(self._config.num_layers))
        main = [kind for kind, _ in self._types.most_common()]
        quantization = " + ".join(main)
        head = embedding
        if embedding_type not in main:
            quantization += f" + {embedding_type} embedding"
        if not tied:
            raw = self._read(_HEAD)
            if raw.type not in main:
                quantization += f" + {raw.type} head"
            head = self._ops.prepare_linear([raw])
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            final_norm=self._vector(_NORM),
            lm_head=head,
            rope_factors=self._files.rope_factors,
            parameters=self._parameters,
            quantization=quantization,
        )

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        attention = f"{prefix}self_attn."
        fused = self._config.family == "phi3"
        qk_norm = self._config.qk_norm
        return LayerWeights(
            attention_norm=self._vector(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(attention, ["qkv"] if fused else ["q", "k", "v"]),
            q_norm=self._vector(f"{attention}q_norm.weight") if qk_norm else None,
            k_norm=self._vector(f"{attention}k_norm.weight") if qk_norm else None,
            output=self._linear(attention, ["o"]),
            feed_forward_norm=self._vector(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(f"{prefix}mlp.", ["gate_up"] if fused else ["gate", "up"]),
            down=self._linear(f"{prefix}mlp.", ["down"]),
        )

    def _linear(self, prefix: str, names: list[str]) -> Weight:
        parts = [self._read(f"{prefix}{name}_proj.weight") for name in names]
        for part in parts:
            self._types[part.type] += part.num_elements
        biases = [f"{prefix}{name}_proj.bias" for name in names]
        present = [self._read(name) for name in biases if name in self._shapes]
        return self._ops.prepare_linear(parts, present)

    def _vector(self, name: str) -> Weight:
        return self._ops.prepare_vector(self._read(name))

    def _read(self, name: str) -> RawTensor:
        raw = self._files.read(name)
        self._parameters[_part(name)] += raw.num_elements
        return raw


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to; a bias to that of its matrix."""
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "feed_forward"
    return "lm_head" if name == _HEAD else "embedding"
