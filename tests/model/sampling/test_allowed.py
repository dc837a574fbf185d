"""Rows that may draw some tokens only, beside rows that may draw all."""

from __future__ import annotations

import random

import pytest
import torch

from model.engine.messages import RequestError
from model.engine.request import SamplingParams
from model.sampling.allowed import AllowedTokens
from model.sampling.sampler import SampledToken, SamplingRow
from tests.model.sampling.rows import MakeSampler, random_logits, row, tokens

VOCAB = 1003  # neither whole words of bits nor whole blocks


def restricted(params: SamplingParams, ids: set[int], **more: object) -> SamplingRow:
    made = row(params, **more)  # type: ignore[arg-type]
    made.allowed = AllowedTokens(VOCAB, ids)
    return made


@pytest.mark.parametrize("count", [1, 2, 31, 64, 65, 500, VOCAB - 1])
def test_the_draw_is_that_of_the_allowed_alone(make_sampler: MakeSampler, count: int) -> None:
    """As from logits in which all others are minus infinity, whatever the filters and penalties."""
    rng = random.Random(count)
    sampler = make_sampler(VOCAB)
    logits = random_logits(40, VOCAB, count)
    rows, plain, masked = [], [], logits.clone()
    for i in range(40):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 0, 40, 300]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.02]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.7]),
            logit_bias={rng.randrange(VOCAB): 9.0},
            seed=rng.randrange(2**63),
        )
        ids = set(rng.sample(range(VOCAB), count))
        prompt = [rng.randrange(VOCAB) for _ in range(20)]
        output = rng.sample(sorted(ids), min(count, 5))
        rows.append(restricted(params, ids, prompt=prompt, output=output))
        plain.append(row(params, prompt, output))
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[list(ids)] = False
        masked[i, others] = float("-inf")
    drawn = tokens(sampler.sample(logits, rows))
    assert drawn == tokens(sampler.sample(masked, plain))
    for one, token in zip(rows, drawn, strict=True):
        assert one.allowed is not None and one.allowed.as_booleans(VOCAB)[token]


def test_all_allowed_is_as_without(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(VOCAB)
    logits = random_logits(30, VOCAB)
    params = [SamplingParams(seed=i, top_p=0.95, top_logprobs=3) for i in range(30)]
    free = [row(p) for p in params]
    assert sampler.sample(logits, free) == sampler.sample(
        logits, [restricted(p, set(range(VOCAB))) for p in params]
    )


def test_other_rows_and_the_logits_are_as_they_were(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(VOCAB)
    logits = random_logits(4, VOCAB)
    before = logits.clone()
    params = SamplingParams(seed=4, repetition_penalty=1.2)
    free = [row(params, [1, 2], position=i) for i in range(4)]
    alone = tokens(sampler.sample(logits, free))
    mixed = [*free[:2], restricted(params, {7}, prompt=[1, 2], position=2), free[3]]
    assert tokens(sampler.sample(logits, mixed)) == [*alone[:2], 7, alone[3]]
    assert torch.equal(logits, before)


def test_log_probabilities_stay_those_of_the_raw_distribution(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(VOCAB)
    logits = random_logits(1, VOCAB)
    token = int(logits.argmin())
    (drawn,) = sampler.sample(logits, [restricted(SamplingParams(top_logprobs=2), {token})])
    assert isinstance(drawn, SampledToken) and drawn.logprob is not None
    expected = float(torch.log_softmax(logits[0].double(), -1)[token])
    assert drawn.logprob.logprob == pytest.approx(expected, abs=1e-4)
    assert drawn.logprob.rank == VOCAB - 1
    assert drawn.logprob.top[0][0] == int(logits.argmax())


def test_end_tokens_are_held_back_unless_nothing_else_is_left(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(VOCAB)
    logits = random_logits(1, VOCAB)
    params = SamplingParams(temperature=0.0, min_tokens=5)
    one = restricted(params, {3, 8}, ends=(3,))
    assert tokens(sampler.sample(logits, [one])) == [8]
    one = restricted(params, {3}, ends=(3,))
    assert isinstance(sampler.sample(logits, [one])[0], RequestError)
    assert one.allowed is not None
    one.allowed.must_end = True
    assert tokens(sampler.sample(logits, [one])) == [3]


def test_nothing_allowed_is_that_row_s_error(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(VOCAB)
    logits = random_logits(2, VOCAB)
    params = SamplingParams(temperature=0.0)
    first, second = sampler.sample(logits, [restricted(params, set()), row(params)])
    assert isinstance(first, RequestError) and "no token is left" in first.message
    assert isinstance(second, SampledToken)
