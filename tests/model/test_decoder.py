"""The decoder against transformers, on random models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.ops.reference import ReferenceOps
from tests.fixtures.tiny import FAMILIES, make_tiny
from tests.model.decoding import (
    Pool,
    assert_logits_close,
    expected_logits,
    load_decoder,
    make_tokens,
    read_config,
)

LENGTH = 45


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "chunks",
    [[LENGTH], [16, 16, 13], [7, 1, 30, 7], [20] + [1] * 25, [1] * LENGTH],
    ids=["whole", "chunks", "odd chunks", "prefill and decode", "token by token"],
)
def test_every_family_equals_transformers(model: Path, chunks: list[int]) -> None:
    tokens = make_tokens(LENGTH)
    pool = Pool(load_decoder(model), [tokens])
    assert_logits_close(pool.run(0, chunks), expected_logits(model, tokens))


@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_ragged_batches_equal_transformers(model: Path, block_size: int) -> None:
    """Prefill chunks and decodes of very different lengths in the same steps, in any order."""
    lengths = [40, 9, 23, 2, 60]
    sequences = [make_tokens(length, seed=length) for length in lengths]
    pool = Pool(load_decoder(model), sequences, block_size)
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    plans = [
        [(0, 38), (2, 10)],
        [(1, 8), (0, 1), (3, 1)],
        [(2, 12), (4, 30), (3, 1), (1, 1), (0, 1)],
        [(4, 29), (2, 1)],
        [(4, 1)],
    ]
    for plan in plans:
        for (index, _), logits in zip(plan, pool.step(plan), strict=True):
            got[index].append(logits)
    for tokens, parts in zip(sequences, got, strict=True):
        assert_logits_close(torch.cat(parts), expected_logits(model, tokens))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 7}),
        ("phi3", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
    ],
)
@pytest.mark.parametrize("chunks", [[30], [11, 19], [12] + [1] * 18])
def test_a_sliding_window_shorter_than_the_sequence(
    family: str, overrides: dict[str, Any], chunks: list[int], tmp_path: Path
) -> None:
    make_tiny(family, tmp_path, **overrides)
    assert 7 in read_config(tmp_path).sliding_window
    tokens = make_tokens(30)
    pool = Pool(load_decoder(tmp_path), [tokens], block_size=4)
    assert_logits_close(pool.run(0, chunks), expected_logits(tmp_path, tokens))


def test_decodes_of_one_length_with_a_window(tmp_path: Path) -> None:
    """The decode path skips the mask when all lengths are equal; the window must still hold."""
    make_tiny("mistral", tmp_path, sliding_window=7)
    sequences = [make_tokens(21, seed=seed) for seed in range(3)]
    pool = Pool(load_decoder(tmp_path), sequences)
    pool.step([(0, 20), (1, 20), (2, 20)])
    plan = [(2, 1), (0, 1), (1, 1)]
    for (index, _), logits in zip(plan, pool.step(plan), strict=True):
        assert_logits_close(logits, expected_logits(tmp_path, sequences[index])[-1:])


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("phi3", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"head_dim": 16, "num_attention_heads": 6, "hidden_size": 96}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_biases_heads_and_tied_embeddings(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    make_tiny(family, tmp_path, **overrides)
    tokens = make_tokens(24)
    pool = Pool(load_decoder(tmp_path), [tokens])
    assert_logits_close(pool.run(0, [20, 1, 1, 1, 1]), expected_logits(tmp_path, tokens))


def test_many_decodes_are_split_into_groups_and_come_back_in_order(llama: Path) -> None:
    """More keys than one gather takes, with lengths out of order."""
    lengths = [130, 250, 3, 200, 250, 90, 180, 255, 17, 249]
    sequences = [make_tokens(length, seed=length) for length in lengths]
    decoder = load_decoder(llama)
    pool = Pool(decoder, sequences, num_blocks=160)
    pool.step([(i, length - 1) for i, length in enumerate(lengths)])
    step = pool.step([(i, 1) for i in range(len(lengths))])
    for tokens, logits in zip(sequences, step, strict=True):
        alone = Pool(decoder, [tokens]).run(0, [len(tokens)])[-1:]
        assert_logits_close(logits, alone)


def test_a_phi3_shaped_model(tmp_path: Path) -> None:
    """The widths of Phi-3 mini in one layer: [1, 6, 3072] and [1, 6, 32064]."""
    make_tiny(
        "phi3",
        tmp_path,
        dtype=torch.bfloat16,
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=32,
        initializer_range=0.02,
    )
    tokens = make_tokens(6, vocab_size=32064)
    decoder = load_decoder(tmp_path, ReferenceOps(dtype=torch.bfloat16))
    assert decoder.config.head_dim == 96
    pool = Pool(decoder, [tokens])
    hidden: list[torch.Tensor] = []
    logits_of = decoder.logits

    def keep(rows: torch.Tensor) -> torch.Tensor:
        hidden.append(rows)
        return logits_of(rows)

    decoder.logits = keep  # type: ignore[method-assign]
    logits = pool.run(0, [6])
    assert hidden[0].view(1, 6, -1).shape == (1, 6, 3072)
    assert logits.view(1, 6, -1).shape == (1, 6, 32064)
    assert logits.dtype == torch.float32
    theirs = expected_logits(tmp_path, tokens, torch.bfloat16)
    assert_logits_close(logits, theirs, tolerance=0.06)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.15)])
def test_a_gpu_computes_the_same(model: Path, dtype: torch.dtype, tolerance: float) -> None:
    sequences = [make_tokens(length, seed=length) for length in (40, 33, 20)]
    pool = Pool(load_decoder(model, ReferenceOps("cuda", dtype)), sequences)
    got: list[list[torch.Tensor]] = [[], [], []]
    for plan in ([(0, 38), (1, 16)], [(1, 16), (2, 19), (0, 1)], [(0, 1), (1, 1), (2, 1)]):
        for (index, _), logits in zip(plan, pool.step(plan), strict=True):
            got[index].append(logits.cpu())
    for tokens, parts in zip(sequences, got, strict=True):
        assert_logits_close(torch.cat(parts), expected_logits(model, tokens), tolerance)
