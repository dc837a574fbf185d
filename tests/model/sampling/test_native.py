"""The native sampler against torch's, token by token; what they both must do is tested with both
in test_sampler and test_sampler_rows."""

from __future__ import annotations

import random

import pytest

from model.engine.request import SamplingParams
from model.ops import kernels
from model.ops.native import NativeOps
from model.sampling.native import RESULT, ROW, NativeSampler
from model.sampling.sampler import SampledToken, Sampler, SamplingRow
from tests.model.sampling.rows import random_logits, row, tokens

VOCAB = 1000


@pytest.fixture(scope="module")
def pair() -> tuple[Sampler, Sampler]:
    try:
        return Sampler(VOCAB, "cpu"), NativeSampler(VOCAB, NativeOps(2))
    except kernels.NoKernels as error:
        pytest.skip(str(error))


def random_row(rng: random.Random, position: int) -> SamplingRow:
    params = SamplingParams(
        temperature=rng.choice([0.2, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 40, 300]),
        top_p=rng.choice([1.0, 0.9, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.1]),
        presence_penalty=rng.choice([0.0, 0.3]),
        frequency_penalty=rng.choice([0.0, 0.7]),
        seed=rng.randrange(2**63),
    )
    prompt = [rng.randrange(VOCAB) for _ in range(20)]
    return row(params, prompt, prompt[:5] * 2, position=position)


@pytest.mark.parametrize(
    "draws", [10_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_the_same_tokens_as_torch(pair: tuple[Sampler, Sampler], draws: int) -> None:
    """But for draws within a rounding error of a border; in 100,000 there was none."""
    rng = random.Random(draws)
    differing = 0
    for start in range(0, draws, 50):
        logits = random_logits(50, VOCAB, start)
        rows = [random_row(rng, start + i) for i in range(50)]
        expected, got = (tokens(sampler.sample(logits, rows)) for sampler in pair)
        differing += sum(a != b for a, b in zip(expected, got, strict=True))
    assert differing <= draws // 10_000


def test_log_probabilities_are_those_of_torch(pair: tuple[Sampler, Sampler]) -> None:
    for seed, top_n in enumerate((0, 1, 5, 20, 64, 65, 300, VOCAB)):
        logits = random_logits(8, VOCAB, seed)
        if seed % 2:
            logits = (logits * 2).round() / 2  # many equals: the lowest id goes first
        params = SamplingParams(seed=seed, logit_bias={3: 50.0, 5: -9.0}, top_logprobs=top_n)
        rows = [row(params, position=i) for i in range(8)]
        expected, got = (sampler.sample(logits, rows) for sampler in pair)
        for a, b in zip(expected, got, strict=True):
            assert isinstance(a, SampledToken) and isinstance(b, SampledToken)
            assert a.logprob is not None and b.logprob is not None
            assert (a.token_id, a.logprob.rank) == (b.token_id, b.logprob.rank)
            assert [t for t, _ in a.logprob.top] == [t for t, _ in b.logprob.top]
            assert b.logprob.logprob == pytest.approx(a.logprob.logprob, abs=1e-5)
            assert [x for _, x in b.logprob.top] == pytest.approx(
                [x for _, x in a.logprob.top], abs=1e-5
            )


def test_the_rows_have_the_layout_of_the_kernel() -> None:
    try:
        library = kernels.load().library
    except kernels.NoKernels as error:
        pytest.skip(str(error))
    assert library.hw_sizeof_sample_row() == ROW.size
    assert library.hw_sizeof_sample_result() == RESULT.size
