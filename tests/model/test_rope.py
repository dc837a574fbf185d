"""Every rope scaling against transformers: the tables to the bit, the logits of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import RopeConfig, from_hf
from model.rope import RopeFactors, RopeTable, inverse_frequencies
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import (
    Pool,
    assert_logits_close,
    expected_logits,
    load_decoder,
    make_tokens,
    read_config,
)

SHORT = [1.0 + 0.05 * i for i in range(8)]
LONG = [1.5 + 0.9 * i for i in range(8)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("llama", {"rope_type": "default", "rope_theta": 500.0}),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "llama3": ("llama", LLAMA3),
    "yarn": ("qwen3", YARN),
    "yarn with betas": ("llama", {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}),
    "yarn with mscale": ("llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn not truncated": ("llama", {**YARN, "truncate": False, "attention_factor": 1.2}),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(name: str, tmp_path: Path) -> None:
    family, rope = SCALINGS[name]
    make_tiny(family, tmp_path, rope_parameters={"rope_theta": 10_000.0, **rope})
    tokens = make_tokens(100)
    pool = Pool(load_decoder(tmp_path), [tokens])
    assert_logits_close(pool.run(0, [60, 39, 1]), expected_logits(tmp_path, tokens))


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope_on_both_sides(side: str, partial: float, tmp_path: Path) -> None:
    """transformers picks the factors by the sequence's length, we by the limit: each side alone."""
    count = int(8 * partial)
    make_tiny(
        "phi3",
        tmp_path,
        original_max_position_embeddings=32,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": partial,
            "short_factor": SHORT[:count],
            "long_factor": LONG[:count],
        },
    )
    tokens = make_tokens(30 if side == "short" else 70)
    decoder = load_decoder(tmp_path, max_model_len=32 if side == "short" else 256)
    theirs = expected_logits(tmp_path, tokens)
    assert_logits_close(Pool(decoder, [tokens]).run(0, [20, len(tokens) - 20]), theirs)
    other = load_decoder(tmp_path, max_model_len=256 if side == "short" else 32)
    if side == "short":  # the two sets really differ
        assert (Pool(other, [tokens]).run(0, [30]) - theirs).abs().max() > 1e-2
    assert other.rope.variant != decoder.rope.variant


def test_tables_equal_transformers_to_the_bit(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    make_tiny("llama", tmp_path, rope_parameters={"rope_theta": 10_000.0, **LLAMA3})
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(256)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    table = RopeTable.build(read_config(tmp_path).rope, 256)
    assert torch.equal(table.cos, cos[0, :, :8])
    assert torch.equal(table.sin, sin[0, :, :8])


def test_the_older_spelling_of_the_configuration(tmp_path: Path) -> None:
    """transformers 4: rope_theta at the top, the scaling in rope_scaling, `type` for its kind."""
    import json

    make_tiny("llama", tmp_path, rope_parameters={"rope_theta": 777.0, **LLAMA3})
    config = json.loads((tmp_path / "config.json").read_text())
    new = from_hf(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    assert from_hf(config) == new
    assert new.rope.theta == 777.0


def test_factors_stored_as_tensors() -> None:
    """GGUF: rope_freqs divides the frequencies; rope_factors_* make it longrope."""
    rope = RopeConfig(theta=10_000.0, rotary_dim=16, original_max_position_embeddings=64, factor=4)
    plain, _, _ = inverse_frequencies(rope, 64)
    freqs = torch.linspace(1, 8, 8)
    divided, factor, _ = inverse_frequencies(rope, 64, RopeFactors(freqs=freqs))
    assert torch.equal(divided, plain / freqs)
    assert factor == 1.0
    stored = RopeFactors(short=torch.tensor(SHORT), long=torch.tensor(LONG))
    named = RopeConfig(
        theta=10_000.0,
        rotary_dim=16,
        kind="longrope",
        factor=4,
        original_max_position_embeddings=64,
        short_factor=tuple(SHORT),
        long_factor=tuple(LONG),
    )
    for limit in (64, 65):
        ours, factor, _ = inverse_frequencies(rope, limit, stored)
        theirs, expected, _ = inverse_frequencies(named, limit)
        assert torch.equal(ours, theirs)
        assert factor == expected > 1


def test_missing_or_misshapen_factors_are_refused() -> None:
    rope = RopeConfig(theta=1e4, rotary_dim=16, kind="longrope", original_max_position_embeddings=8)
    with pytest.raises(ValueError, match="short factors of longrope must have 8 values, got 0"):
        inverse_frequencies(rope, 8)
    with pytest.raises(ValueError, match="rope_freqs must have 8 values, got 3"):
        inverse_frequencies(
            RopeConfig(theta=1e4, rotary_dim=16), 8, RopeFactors(freqs=torch.ones(3))
        )
    with pytest.raises(ValueError, match="max_model_len"):
        RopeTable.build(RopeConfig(theta=1e4, rotary_dim=16), 0)
