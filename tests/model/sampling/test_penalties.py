from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from model.engine.request import SamplingParams
from model.sampling.penalties import EditBatch, RowEdits, TokenCounts, needs_edits

VOCAB = 50


def edited(
    logits: Tensor,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    ends: tuple[int, ...] = (),
) -> Tensor:
    x = logits.clone()[None]
    batch = EditBatch(VOCAB)
    batch.add(0, RowEdits(params, prompt, ends, VOCAB), output)
    batch.apply(x)
    return x[0]


def random_logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    x = random_logits()
    out = edited(x, SamplingParams(repetition_penalty=1.5), [3, 4, 4], [5])
    for token in range(VOCAB):
        value = x[token]
        if token in (3, 4, 5):  # once each, however often the token is there
            value = value / 1.5 if value > 0 else value * 1.5
        assert out[token] == value
    assert {bool(x[t] > 0) for t in (3, 4, 5)} == {True, False}


def test_presence_penalty_is_subtracted_once_for_output_tokens_only() -> None:
    x = random_logits()
    out = edited(x, SamplingParams(presence_penalty=0.75), [1, 2], [2, 7, 7, 7])
    expected = x.clone()
    expected[[2, 7]] -= 0.75
    assert torch.equal(out, expected)


def test_frequency_penalty_is_subtracted_for_each_occurrence_in_the_output() -> None:
    x = random_logits()
    out = edited(x, SamplingParams(frequency_penalty=0.5), [1, 2, 2], [2, 7, 7, 7])
    expected = x.clone()
    expected[2] -= 0.5
    expected[7] -= 1.5
    assert torch.equal(out, expected)


def test_bias_comes_before_the_repetition_penalty() -> None:
    x = torch.full((VOCAB,), -1.0)
    params = SamplingParams(logit_bias={9: 5.0, 10: -2.0}, repetition_penalty=2.0)
    out = edited(x, params, [9], [10])
    assert out[9] == 2.0  # (-1 + 5) / 2: the bias made it positive first
    assert out[10] == -6.0  # (-1 - 2) * 2
    assert out[11] == -1.0


def test_all_penalties_together() -> None:
    x = torch.full((VOCAB,), 4.0)
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: 2.0}
    )
    out = edited(x, params, [1, 2], [2, 2, 3])
    assert out[:5].tolist() == [4.0, 3.0, 2.0 - 0.5 - 0.5, 2.0 - 0.5 - 0.25, 4.0]


def test_end_tokens_are_banned_until_min_tokens() -> None:
    x = random_logits()
    params = SamplingParams(min_tokens=2)
    # 99 is outside the vocabulary, so it cannot be drawn and needs no ban
    early = edited(x, params, [], [5], (1, 8, 99))
    assert early.isinf().nonzero()[:, 0].tolist() == [1, 8]
    assert torch.equal(edited(x, params, [], [5, 5], (1, 8)), x)


def test_each_row_of_a_batch_gets_its_own_edits() -> None:
    x = torch.stack([random_logits(i) for i in range(3)])
    params = [
        SamplingParams(logit_bias={VOCAB - 1: 3.0}),
        SamplingParams(repetition_penalty=1.1, min_tokens=4),
        SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5),
    ]
    rows = [([0, 1], [2]), ([VOCAB - 1, 0], [2, 3]), ([], [0, 0])]
    together = x.clone()
    batch = EditBatch(VOCAB)
    for i, (p, (prompt, output)) in enumerate(zip(params, rows, strict=True)):
        batch.add(i, RowEdits(p, prompt, (4,), VOCAB), output)
    batch.apply(together)
    for i, (p, (prompt, output)) in enumerate(zip(params, rows, strict=True)):
        assert torch.equal(together[i], edited(x[i], p, prompt, output, (4,)))


def test_counts_follow_the_output_token_by_token() -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(500) for _ in range(100)]
    output: list[int] = []
    counts = TokenCounts(500, prompt)
    for step in range(120):
        output += [rng.randrange(500) for _ in range(1 + step % 3)]
        ids, numbers = counts.update(output)
        expected = dict.fromkeys(prompt, 0) | Counter(output)
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected
        assert len(np.unique(ids)) == len(ids)


@pytest.mark.parametrize(
    ("params", "prompt", "output", "message"),
    [
        (SamplingParams(logit_bias={VOCAB: 1.0}), [], [], "logit_bias has token id 50"),
        (SamplingParams(logit_bias={-1: 1.0}), [], [], "logit_bias has token id -1"),
        (SamplingParams(logit_bias={1: float("nan")}), [], [], "not a finite number"),
        (SamplingParams(logit_bias={1: 1e300}), [], [], "not a finite number"),
        (SamplingParams(repetition_penalty=0.0), [], [], "must be over 0"),
        (SamplingParams(repetition_penalty=1.5), [VOCAB], [], "the prompt has token id 50"),
        (SamplingParams(presence_penalty=1.0), [], [-2], "the output has token id -2"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    params: SamplingParams, prompt: list[int], output: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        edited(random_logits(), params, prompt, output)


def test_plain_parameters_need_no_edits() -> None:
    assert not needs_edits(SamplingParams(temperature=0.3, top_k=5, top_p=0.5, seed=9))
    assert needs_edits(SamplingParams(min_tokens=1))
    assert needs_edits(SamplingParams(frequency_penalty=-0.1))
