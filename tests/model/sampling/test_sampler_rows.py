from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch

import model.sampling.sampler as sampler_module
from model.engine.messages import RequestError
from model.engine.request import SamplingParams
from model.sampling.sampler import SampledToken, SamplingRow
from tests.model.sampling.rows import MakeSampler, random_logits, row, tokens

# ------------------------------------------------------------------------- independence


def mixed_params() -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0.0, top_logprobs=5),
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9, seed=2, top_logprobs=20),
        SamplingParams(temperature=0.7, top_k=40, seed=3, repetition_penalty=1.2),
        SamplingParams(temperature=1.5, top_p=0.98, seed=4, presence_penalty=0.5),  # beyond 64
        SamplingParams(temperature=1.0, min_p=0.05, seed=5, top_logprobs=0),
        SamplingParams(temperature=1.2, top_k=500, top_p=0.9, seed=6),  # beyond 64
        SamplingParams(temperature=2.0, seed=7, logit_bias={5: 8.0}, min_tokens=50),
        SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.3),
        SamplingParams(temperature=1.0, min_p=1e-5, seed=8),  # beyond 64
        SamplingParams(temperature=0.3, seed=9),
        SamplingParams(temperature=1.0, top_k=64, seed=10),
        SamplingParams(temperature=1.0, top_k=900, seed=11),
        SamplingParams(temperature=4.0, top_p=0.5, seed=12),
        SamplingParams(temperature=1.0, seed=13, top_logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.95, min_p=0.01, top_k=50, seed=14),
    ]


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", [49_152, 32_003])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(
    make_sampler: MakeSampler, vocab: int, threads: int
) -> None:
    rng = random.Random(vocab)
    params = mixed_params()
    logits = random_logits(16, vocab, 1)
    sampler = make_sampler(vocab)
    texts = [
        ([rng.randrange(vocab) for _ in range(60)], [rng.randrange(vocab) for _ in range(20)])
        for _ in params
    ]

    def fresh(i: int) -> SamplingRow:
        return row(params[i], texts[i][0], texts[i][1], (2, 7))

    torch.set_num_threads(1)
    alone = [sampler.sample(logits[i : i + 1], [fresh(i)])[0] for i in range(16)]
    assert all(isinstance(a, SampledToken) for a in alone)
    for size in range(1, 17):
        torch.set_num_threads(1 + size % 2)
        picked = rng.sample(range(16), size)
        together = sampler.sample(logits[picked], [fresh(i) for i in picked])
        assert together == [alone[i] for i in picked]  # log-probabilities to the last bit


def test_the_weights_themselves_are_the_same_bits(threads: int) -> None:
    # Equal tokens could hide a difference of one bit; here the numbers before the draw are seen.
    logits = random_logits(16, 49_152, 2)
    rows = [row(SamplingParams(seed=i, temperature=0.6 + i / 10)) for i in range(16)]
    highest = logits.amax(-1)
    blocks = logits.view(16, -1, 256)
    torch.set_num_threads(2)
    whole = sampler_module._Drawing(blocks, highest, rows, list(range(16))).weights()
    sums = sampler_module.block_sums(whole)
    for i in range(16):
        torch.set_num_threads(1 + i % 2)
        single = sampler_module._Drawing(
            blocks[i : i + 1], highest[i : i + 1], rows[i : i + 1], [0]
        )
        assert torch.equal(single.weights()[0], whole[i])
        assert torch.equal(sampler_module.block_sums(single.weights())[0], sums[i])


def test_kept_rows_give_the_same_tokens_as_fresh_ones(make_sampler: MakeSampler) -> None:
    # A request that is resumed elsewhere has no prepared edits; it must go on just the same.
    vocab = 800
    sampler = make_sampler(vocab)
    params = SamplingParams(
        temperature=1.0,
        top_p=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        min_tokens=10,
        seed=5,
    )
    kept = row(params, [1, 2, 3], [], (4, 5))
    for step in range(60):
        logits = random_logits(1, vocab, step)
        kept.position = 3 + len(kept.output_token_ids)
        fresh = row(params, [1, 2, 3], list(kept.output_token_ids), (4, 5))
        token = tokens(sampler.sample(logits, [kept]))[0]
        assert token == tokens(sampler.sample(logits, [fresh]))[0]
        kept.output_token_ids.append(token)


# ------------------------------------------------------------------------- edges


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_fails_alone(make_sampler: MakeSampler, bad: float) -> None:
    logits = random_logits(16, 3000, 9)
    rows = [row(p, [1, 2], [3], (4,)) for p in mixed_params()]
    sampler = make_sampler(3000)
    healthy = sampler.sample(logits, rows)
    for victim in range(16):
        poisoned = logits.clone()
        poisoned[victim, 2999] = bad
        results = sampler.sample(poisoned, [row(p, [1, 2], [3], (4,)) for p in mixed_params()])
        error = results[victim]
        assert isinstance(error, RequestError)
        assert (error.type, error.code) == ("server_error", "internal")
        del results[victim]
        assert results == healthy[:victim] + healthy[victim + 1 :]


def test_bad_parameters_fail_alone(make_sampler: MakeSampler) -> None:
    logits = random_logits(4, 100)
    healthy = row(SamplingParams(seed=1, repetition_penalty=1.2), [5], [6])
    rows = [
        healthy,
        row(SamplingParams(logit_bias={100: 1.0})),
        row(SamplingParams(logit_bias={2**70: 1.0})),
        row(SamplingParams(repetition_penalty=1.2), [5, 100]),
    ]
    sampler = make_sampler(100)
    results = sampler.sample(logits, rows)
    assert results[0] == sampler.sample(logits[:1], [healthy])[0]
    for result in results[1:]:
        assert isinstance(result, RequestError)
        assert (result.type, result.code) == ("invalid_request_error", "invalid_value")
    assert "100" in results[1].message  # type: ignore[union-attr]


def test_a_row_without_any_token_left_is_an_error(make_sampler: MakeSampler) -> None:
    rows = [row(SamplingParams(min_tokens=1), ends=(0, 1)), row(SamplingParams())]
    first, second = make_sampler(2).sample(torch.zeros(2, 2), rows)
    assert isinstance(first, RequestError)
    assert "no token is left" in first.message
    assert isinstance(second, SampledToken)


def test_logprobs_are_of_the_raw_distribution(make_sampler: MakeSampler) -> None:
    x = random_logits(1, 600, 4)
    best = int(x.argmax())
    params = SamplingParams(
        temperature=0.0, logit_bias={best: -100.0}, repetition_penalty=2.0, top_logprobs=3
    )
    (result,) = make_sampler(600).sample(x, [row(params, list(range(600)))])
    assert isinstance(result, SampledToken) and result.logprob is not None
    raw = torch.log_softmax(x[0].double(), -1)
    assert result.token_id != best
    assert result.logprob.rank == 1
    assert result.logprob.logprob == pytest.approx(raw[result.token_id].item(), abs=1e-6)
    assert result.logprob.top[0] == (best, pytest.approx(raw[best].item(), abs=1e-6))


def test_prompt_logprobs(make_sampler: MakeSampler) -> None:
    x = random_logits(70, 300, 6)
    targets = torch.arange(70) * 4
    sampler = make_sampler(300)
    entries = sampler.prompt_logprobs(x, targets, 2)
    raw = torch.log_softmax(x.double(), -1)
    for i, entry in enumerate(entries):
        assert entry.token_id == 4 * i
        assert entry.logprob == pytest.approx(raw[i, 4 * i].item(), abs=1e-6)
        assert entry.top[0][0] == int(x[i].argmax()) and len(entry.top) == 2
    # alone or among others: the same bits
    assert sampler.prompt_logprobs(x[41:42], targets[41:42], 2) == entries[41:42]
    x[3, 3] = math.nan
    with pytest.raises(ValueError, match="position 3"):
        sampler.prompt_logprobs(x, targets, 2)


def test_what_does_not_fit_is_refused(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(10)
    with pytest.raises(ValueError, match=r"\[1, 10\] was expected"):
        sampler.sample(torch.zeros(1, 11), [row(SamplingParams())])
    with pytest.raises(ValueError, match="float32"):
        sampler.sample(torch.zeros(1, 10, dtype=torch.float16), [row(SamplingParams())])
    with pytest.raises(ValueError, match="at least 1"):
        make_sampler(0)
    assert sampler.sample(torch.zeros(0, 10), []) == []
