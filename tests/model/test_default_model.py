"""The default model through our GGUF loader against transformers, both dequantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.generate import transformers_model
from model import hub
from model.decoder import Decoder
from model.ops.reference import ReferenceOps
from model.weights.load import load_weights
from tests.model.decoding import Pool, assert_logits_close, make_tokens
from tests.model.inspecting import attention_rows, check_rows

# "The capital of France is Paris. The capital of Germany is", in SmolLM2's vocabulary.
PROMPT = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 4521, 314]


@pytest.fixture(scope="module")
def files() -> hub.ModelFiles:
    return hub.resolve("smollm2-135m")


@pytest.fixture(scope="module")
def decoder(files: hub.ModelFiles) -> Decoder:
    ops = ReferenceOps()
    weights = load_weights(files.weights, files.config, ops)
    assert weights.num_parameters == 134_515_008
    assert weights.quantization == "Q4_1 + Q8_0 embedding"
    return Decoder(files.config, weights, ops)


@pytest.fixture(scope="module")
def theirs(files: hub.ModelFiles) -> Any:
    model = transformers_model(files.weights[0])
    model.set_attn_implementation("eager")
    return model


def test_logits_equal_transformers(decoder: Decoder, theirs: Any) -> None:
    tokens = PROMPT + make_tokens(28, vocab_size=decoder.config.vocab_size)
    ours = Pool(decoder, [tokens]).run(0, [12, 20, 1, 7])
    with torch.inference_mode():
        theirs = theirs(torch.tensor([tokens])).logits[0]
    assert_logits_close(ours, theirs, tolerance=5e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_attention_equals_transformers(decoder: Decoder, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT]), output_attentions=True).attentions
    for layer in (0, 14, 29):
        check_rows(attention_rows(decoder, PROMPT, layer), expected[layer][0], 1e-3)
