from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.sampling.logprobs import raw_logprobs
from model.sampling.ranking import exact_top, ranked_top, shortest_prefix


def logits_of(n: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def in_rank_order(x: Tensor) -> list[int]:
    values = x.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@pytest.mark.parametrize("vocab", [5, 255, 256, 257, 5000])
def test_against_log_softmax(vocab: int) -> None:
    x = logits_of(40, vocab)
    targets = [(i * 37) % vocab for i in range(40)]
    top_ns = [i % 21 for i in range(40)]
    expected = torch.log_softmax(x.double(), -1)
    for i, entry in enumerate(raw_logprobs(x, targets, top_ns)):
        assert entry.token_id == targets[i]
        assert entry.logprob == pytest.approx(expected[i, targets[i]].item(), abs=1e-6)
        order = in_rank_order(x[i])
        assert entry.rank == order.index(targets[i])
        assert [t for t, _ in entry.top] == order[: top_ns[i]]
        for token, logprob in entry.top:
            assert logprob == pytest.approx(expected[i, token].item(), abs=1e-6)


def test_equals_go_by_the_lowest_id() -> None:
    x = torch.zeros(2, 1000)
    x[1, ::2] = 1.0
    flat, striped = raw_logprobs(x, [500, 3], [4, 4])
    assert flat.rank == 500
    assert [t for t, _ in flat.top] == [0, 1, 2, 3]
    assert striped.rank == 501
    assert [t for t, _ in striped.top] == [0, 2, 4, 6]


def test_minus_infinity_stays() -> None:
    x = torch.full((1, 300), -math.inf)
    x[0, 7] = 2.0
    (entry,) = raw_logprobs(x, [8], [3])
    assert entry.logprob == -math.inf
    assert entry.rank == 8
    assert entry.top == [(7, 0.0), (0, -math.inf), (1, -math.inf)]


def test_a_bad_row_is_nan_and_the_others_are_as_ever() -> None:
    x = logits_of(3, 400)
    before = raw_logprobs(x, [1, 2, 3], [5, 5, 5])
    x[1, 9] = math.nan
    after = raw_logprobs(x, [1, 2, 3], [5, 5, 5])
    assert math.isnan(after[1].logprob)
    assert (after[0], after[2]) == (before[0], before[2])


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 400"):
        raw_logprobs(logits_of(2, 400), [1, 400], [0, 0])
    with pytest.raises(ValueError, match="2 rows"):
        raw_logprobs(logits_of(2, 400), [1], [0, 0])


@pytest.mark.parametrize("step", [0.0, 0.5, 8.0])
def test_ranked_and_exact_top_with_ties(step: float) -> None:
    x = logits_of(8, 700)
    if step:
        x = (x / step).round() * step
    values, ids = ranked_top(x, 64)
    for i in range(8):
        order = in_rank_order(x[i])
        certain = [t for t in order[:64] if x[i, t] > values[i, -1]]
        assert ids[i, : len(certain)].tolist() == certain
        assert torch.equal(x[i][ids[i]], values[i])
        for k in (0, 1, 20, 64, 699, 700, 900):
            assert exact_top(x[i], k) == order[:k]


@pytest.mark.parametrize("kind", ["smooth", "ties", "equal", "outlier", "masked"])
def test_shortest_prefix_against_a_full_sort(kind: str) -> None:
    for seed in range(20):
        x = logits_of(1, 900, seed)[0]
        if kind == "ties":
            x = x.round()
        elif kind == "equal":
            x = torch.full_like(x, 1.5)
        elif kind == "outlier":
            x[400] = 1e30
        elif kind == "masked":
            x[::3] = -math.inf
        order = in_rank_order(x)
        for need in (0, 1, 2, 63, 450, 899, 900):
            keep = shortest_prefix(x, torch.ones(900, dtype=torch.float64), need)
            assert keep.nonzero()[:, 0].tolist() == sorted(order[: max(need, 1)])
        assert shortest_prefix(x, torch.ones(900, dtype=torch.float64), 901).all()
        mass = torch.softmax(x.double(), -1)
        for share in (0.1, 0.5, 0.93):
            kept = shortest_prefix(x, mass, share)
            n = int(kept.sum())
            assert kept.nonzero()[:, 0].tolist() == sorted(order[:n])
            assert math.fsum(mass[order[:n]].tolist()) >= share - 1e-12
            assert math.fsum(mass[order[: n - 1]].tolist()) < share + 1e-12
