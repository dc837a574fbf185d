"""The default model through our GGUF loader against transformers, both dequantised."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generate import transformers_model
from model import hub
from model.decoder import Decoder
from model.ops.reference import ReferenceOps
from model.weights.load import load_weights
from tests.model.decoding import Pool, assert_logits_close, make_tokens

# "The capital of France is Paris. The capital of Germany is", in SmolLM2's vocabulary.
PROMPT = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 4521, 314]


@pytest.fixture(scope="module")
def files() -> hub.ModelFiles:
    return hub.resolve("smollm2-135m")


def test_logits_equal_transformers(files: hub.ModelFiles) -> None:
    ops = ReferenceOps()
    weights = load_weights(files.weights, files.config, ops)
    assert weights.num_parameters == 134_515_008
    assert weights.quantization == "Q4_1 + Q8_0 embedding"
    tokens = PROMPT + make_tokens(28, vocab_size=files.config.vocab_size)
    pool = Pool(Decoder(files.config, weights, ops), [tokens])
    ours = pool.run(0, [12, 20, 1, 7])
    model = transformers_model(files.weights[0])
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0]
    assert_logits_close(ours, theirs, tolerance=5e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
