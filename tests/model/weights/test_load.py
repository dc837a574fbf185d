"""Weights out of safetensors and GGUF: values, names, shapes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from model.config import from_gguf
from model.decoder import Decoder
from model.gguf.file import GGUFFile
from model.ops.reference import ReferenceOps
from model.weights.files import GGUFWeights
from model.weights.load import WeightsError, load_weights
from model.weights.raw_tensor import RawTensor
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import (
    Pool,
    assert_logits_close,
    expected_logits,
    load_decoder,
    make_tokens,
    read_config,
)
from tests.model.gguf_models import Array, permute, write_gguf

TOKENS = make_tokens(40)
K_SCALES = {  # where the fp16 scales of a block lie
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def plain(_: str, values: Array) -> tuple[npt.NDArray[Any], Kind]:
    return values, Kind.F32


def load_gguf(path: Path, max_model_len: int | None = None) -> Decoder:
    file = GGUFFile.open(path)
    config, ops = from_gguf(file.metadata, file.tensors), ReferenceOps()
    return Decoder(config, load_weights([path], config, ops), ops, max_model_len)


# ---------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),
    ],
)
def test_a_gguf_file_is_the_same_model(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Stored as F32, to the bit: names, fused and permuted rows, biases, a tied head."""
    make_tiny(family, tmp_path, **overrides)
    path = tmp_path / "model.gguf"
    write_gguf(tmp_path, read_config(tmp_path), path, plain)
    theirs = Pool(load_decoder(tmp_path), [TOKENS]).run(0, [30, 9, 1])
    assert torch.equal(Pool(load_gguf(path), [TOKENS]).run(0, [30, 9, 1]), theirs)


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
)
def test_quantised_gguf_equals_transformers_with_the_same_values(
    kind: Kind, llama: Path, tmp_path: Path
) -> None:
    def encode(_: str, values: Array) -> tuple[npt.NDArray[Any], Kind]:
        return gguf.quantize(values, kind), kind

    path = tmp_path / "model.gguf"
    write_gguf(llama, read_config(llama), path, encode)
    state = load_file(llama / "model.safetensors")
    for name, values in state.items():
        if values.dim() == 2:
            rounded = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind)
            state[name] = torch.from_numpy(rounded.reshape(values.shape).copy())
    rounded_model = tmp_path / "rounded"
    shutil.copytree(llama, rounded_model)
    save_file(state, rounded_model / "model.safetensors", metadata={"format": "pt"})
    decoder = load_gguf(path)
    ours = Pool(decoder, [TOKENS]).run(0, [39, 1])
    assert_logits_close(ours, expected_logits(rounded_model, TOKENS))
    config = read_config(llama)
    assert load_weights([path], config, ReferenceOps()).quantization == kind.name


@pytest.mark.parametrize("kind", K_SCALES)
def test_k_quants(kind: Kind, tmp_path: Path) -> None:
    """Random blocks through our reader: values, un-permuted rows, slices of packed rows."""
    rng = np.random.default_rng(0)
    make_tiny("llama", tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    config = read_config(tmp_path)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed: dict[str, npt.NDArray[np.uint8]] = {}

    def encode(name: str, values: Array) -> tuple[npt.NDArray[Any], Kind]:
        rows = values.shape[0]
        blocks = rng.integers(0, 256, (rows * values.shape[1] // block, size), dtype=np.uint8)
        for start in K_SCALES[kind]:
            scales = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
            blocks[:, start : start + 2] = scales.view(np.uint8)
        packed[name] = blocks.reshape(rows, -1)
        return packed[name], kind

    path = tmp_path / "model.gguf"
    write_gguf(tmp_path, config, path, encode)
    files = GGUFWeights(path, config)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, data in packed.items():
        values = gguf.dequantize(data, kind)
        raw = files.read(name)
        got = raw.to_torch(torch.float32).numpy()
        if name.split(".")[-2] in heads:
            got = permute(got, heads[name.split(".")[-2]])
        np.testing.assert_array_equal(got, values)
    assert load_weights(path, config, ReferenceOps()).quantization == kind.name


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_unpacking_equals_the_gguf_package_to_the_bit(kind: Kind) -> None:
    """Enough rows for several chunks, every byte random but the scales."""
    rng = np.random.default_rng(1)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = 300, 1024
    blocks = rng.integers(0, 256, (rows * cols // 32, size), dtype=np.uint8)
    for start in (0, 2) if kind.name.endswith("_1") else (0,):
        scales = rng.normal(0, 1, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    data = blocks.reshape(rows, -1)
    raw = RawTensor("x", kind.name, (rows, cols), torch.from_numpy(data))
    expected = torch.from_numpy(gguf.dequantize(data, kind))
    assert torch.equal(raw.to_torch(torch.float32), expected)
    assert torch.equal(raw.to_torch(torch.bfloat16), expected.bfloat16())
    order = torch.randperm(rows)
    assert torch.equal(raw.take_rows(order).to_torch(torch.float32), expected[order])


def test_rope_factors_are_read(llama: Path, tmp_path: Path) -> None:
    config = read_config(llama)
    freqs = np.linspace(1, 4, config.head_dim // 2, dtype=np.float32)
    path = tmp_path / "model.gguf"
    write_gguf(llama, config, path, plain, {"rope_freqs.weight": freqs})
    decoder = load_gguf(path)
    turned = torch.atan2(decoder.rope.sin[1], decoder.rope.cos[1])
    frequencies = 1.0 / (config.rope.theta ** (torch.arange(0, 16, 2) / 16)) / torch.tensor(freqs)
    torch.testing.assert_close(turned, frequencies)


def test_mixed_types_are_named(llama: Path, tmp_path: Path) -> None:
    def encode(name: str, values: Array) -> tuple[npt.NDArray[Any], Kind]:
        kind = Kind.Q8_0 if "embed" in name else Kind.F16 if "lm_head" in name else Kind.Q4_1
        return gguf.quantize(values, kind), kind

    config, path = read_config(llama), tmp_path / "model.gguf"
    write_gguf(llama, config, path, encode)
    weights = load_weights([path], config, ReferenceOps())
    assert weights.quantization == "Q4_1 + Q8_0 embedding + F16 head"
    state = load_file(llama / "model.safetensors")
    assert weights.num_parameters == sum(tensor.numel() for tensor in state.values())


def test_gguf_types_that_are_not_supported(llama: Path, tmp_path: Path) -> None:
    def encode(_: str, values: Array) -> tuple[npt.NDArray[Any], Kind]:
        return values.astype(np.float64), Kind.F64

    path = tmp_path / "model.gguf"
    write_gguf(llama, read_config(llama), path, encode)
    with pytest.raises(WeightsError, match=r"is F64 .* supported are matrices of F32"):
        load_weights([path], read_config(llama), ReferenceOps())


# ---------------------------------------------------------------------------- safetensors


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole = make_tiny("llama", tmp_path / "whole")
    parts = make_tiny("llama", tmp_path / "parts", max_shard_size="50KB")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2
    expected = Pool(load_decoder(whole), [TOKENS]).run(0, [40])
    assert torch.equal(Pool(load_decoder(parts), [TOKENS]).run(0, [40]), expected)
    config, ops = read_config(parts), ReferenceOps()
    given = Decoder(config, load_weights(files, config, ops), ops)
    assert torch.equal(Pool(given, [TOKENS]).run(0, [40]), expected)


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, dtype=torch.bfloat16)
    weights = load_weights(tmp_path, read_config(tmp_path), ReferenceOps())
    assert weights.quantization == "BF16"
    ours = Pool(load_decoder(tmp_path), [TOKENS]).run(0, [40])
    assert_logits_close(ours, expected_logits(tmp_path, TOKENS))


def test_a_tied_head_that_is_stored_again_is_left_alone(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, tie_word_embeddings=True)
    expected = Pool(load_decoder(tmp_path), [TOKENS]).run(0, [40])
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.zeros_like(state["model.embed_tokens.weight"])
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(Pool(load_decoder(tmp_path), [TOKENS]).run(0, [40]), expected)


def change(state: dict[str, torch.Tensor], what: str) -> None:
    down = "model.layers.1.mlp.down_proj.weight"
    if what == "missing":
        del state[down]
    elif what == "unexpected":
        state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    elif what == "shape":
        state[down] = torch.zeros(64, 32)
    elif what == "type":
        state[down] = torch.zeros(64, 96, dtype=torch.float64)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"the weights lack model\.layers\.1\.mlp\.down_proj\.weight"),
        ("unexpected", r"have unexpected model\.layers\.0\.self_attn\.q_proj\.bias"),
        ("shape", r"down_proj\.weight has the shape \[64, 32\], expected \[64, 96\]"),
        ("type", r"down_proj\.weight is F64; expected one of F32, F16, BF16"),
    ],
)
def test_weights_that_do_not_fit(what: str, message: str, llama: Path, tmp_path: Path) -> None:
    state = load_file(llama / "model.safetensors")
    change(state, what)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_weights(tmp_path, read_config(llama), ReferenceOps())


def test_a_long_list_of_missing_tensors_is_cut(llama: Path, tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lack lm_head\.weight, .* and 15 more$"):
        load_weights(tmp_path, read_config(llama), ReferenceOps())


def test_broken_and_absent_files(llama: Path, tmp_path: Path) -> None:
    config, ops = read_config(llama), ReferenceOps()
    with pytest.raises(WeightsError, match="there are no weights in"):
        load_weights(tmp_path, config, ops)
    data = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        load_weights(tmp_path, config, ops)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"model\.gguf cannot be read"):
        load_weights([tmp_path / "model.gguf"], config, ops)
    with pytest.raises(WeightsError, match="expected safetensors files or one GGUF file"):
        load_weights(list(tmp_path.iterdir()), config, ops)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../model.safetensors"}}, "names a file outside its folder"),
        ({"weight_map": {"x": "absent.safetensors"}}, r"absent\.safetensors, which is missing"),
        ({"weight_map": ["x"]}, "not a valid index"),
        ([], "not a valid index"),
    ],
)
def test_indexes_that_are_refused(index: object, message: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        load_weights(tmp_path, read_config(llama), ReferenceOps())


def test_the_same_tensor_in_two_files(llama: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(llama / "model.safetensors", tmp_path / name)
    with pytest.raises(WeightsError, match=r"is in two files, b\.safetensors is the second"):
        load_weights(tmp_path, read_config(llama), ReferenceOps())
