from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import model.sampling.sampler as sampler_module
from model.engine.messages import RequestError
from model.engine.request import SamplingParams
from model.sampling.draws import uniform
from model.sampling.sampler import SampledToken, Sampler, SamplingRow
from tests.model.sampling.rows import TOP, MakeSampler, random_logits, row, tokens

# ------------------------------------------------------------------------- the slow oracle


def oracle_logits(x: Tensor, r: SamplingRow) -> Tensor:
    """Bias, penalties and bans, token by token, in float32 as the sampler does."""
    p, x = r.params, x.clone()
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in set(r.prompt_token_ids) | set(r.output_token_ids):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(r.output_token_ids):
        x[token] -= p.presence_penalty + p.frequency_penalty * r.output_token_ids.count(token)
    if len(r.output_token_ids) < p.min_tokens:
        x[list(r.end_token_ids)] = -math.inf
    return x


def oracle_kept(values: np.ndarray, p: SamplingParams, slack: float) -> tuple[np.ndarray, int]:
    """Weights in rank order and how many are kept, by a full sort and plain sums in float64.
    `slack` moves the top-p and min-p borders by a rounding error."""
    weights = np.exp((values - values[0]) / p.temperature)
    n = min(p.top_k, len(values)) if p.top_k > 0 else len(values)
    if p.top_p < 1:
        need = p.top_p * (1 + slack) * weights[:n].sum()
        n = min(n, int((np.cumsum(weights[:n]) < need).sum()) + 1)
    n = min(n, max(1, int((weights >= p.min_p * (1 + slack)).sum())))
    return weights, n


def oracle(logits: Tensor, r: SamplingRow) -> set[int]:
    """The tokens that the draw may give: one, unless the draw falls on a border."""
    x = oracle_logits(logits, r).double().numpy()
    order = np.lexsort((np.arange(len(x)), -x))
    p, vocab = r.params, len(x)
    if p.temperature == 0:
        return {int(order[0])}
    u = uniform(p.seed, p.prompt_index, p.choice_index, r.position)
    accepted = set()
    for slack in (0.0, -2e-6, 2e-6):
        weights, n = oracle_kept(x[order], p, slack)
        kept, mass = order[:n], weights[:n]
        filtered = p.top_p < 1 or p.min_p > 0 or 0 < p.top_k < vocab
        # In rank order when the 64 highest decide, in the vocabulary's order else.
        real = max(1, int((mass > 0).sum()))
        seen = x[order[TOP - 1]] if vocab >= TOP else -math.inf
        decided = x[order[real - 1]] > seen
        decided &= not (TOP < p.top_k < vocab and p.top_p < 1)
        if not (filtered and decided):
            by_id = np.argsort(kept)
            kept, mass = kept[by_id], mass[by_id]
        sums = np.cumsum(mass)
        for shift in (0.0, -2e-6, 2e-6):
            at = int((sums <= min(max(u + shift, 0.0), 1 - 2**-53) * sums[-1]).sum())
            accepted.add(int(kept[min(at, n - 1)]))
    return accepted


def random_case(rng: random.Random, vocab: int) -> tuple[Tensor, SamplingRow]:
    scale = rng.choice([0.1, 1.0, 3.0, 10.0])
    x = random_logits(1, vocab, rng.randrange(2**31))[0] * scale
    style = rng.randrange(8)
    if style == 0:
        x = torch.full_like(x, rng.choice([0.0, -3.5, 17.0]))
    elif style == 1:
        x = (x * 2).round() / 2  # many equals, also at the borders
    elif style == 2:
        x = x.bfloat16().float()
    elif style == 3:
        x[torch.rand(vocab) < 0.5] = -math.inf
        x[rng.randrange(vocab)] = 1.0
    elif style == 4:
        x = x + 100.0

    def pick(*values: float) -> float:
        return rng.choice(values)

    params = SamplingParams(
        temperature=pick(0.0, 0.2, 0.7, 1.0, 1.0, 1.0, 2.0, 50.0, 1e-12),
        top_k=int(pick(0, 0, 0, 1, 2, 40, 63, 64, 65, 200, vocab, vocab + 5)),
        top_p=pick(1.0, 1.0, 0.0, 1e-9, 0.3, 0.9, 0.95, 0.9999999),
        min_p=pick(0.0, 0.0, 0.0, 1e-4, 0.05, 0.5, 1.0),
        repetition_penalty=pick(1.0, 1.0, 1.3, 0.8),
        presence_penalty=pick(0.0, 0.0, 1.0, -2.0),
        frequency_penalty=pick(0.0, 0.0, 0.5, -0.25),
        logit_bias={}
        if rng.random() < 0.7
        else {rng.randrange(vocab): pick(-100.0, -1e30, 2.5, 100.0, 1e30) for _ in range(3)},
        min_tokens=int(pick(0, 0, 5)),
        seed=rng.randrange(2**63),
        prompt_index=rng.randrange(64),
        choice_index=rng.randrange(8),
        top_logprobs=rng.choice([None, None, 0, 5]),
    )
    prompt = [rng.randrange(vocab) for _ in range(rng.randrange(20))]
    output = [rng.randrange(vocab) for _ in range(rng.randrange(10))]
    ends = tuple(rng.sample(range(vocab), min(2, vocab - 1)))
    return x, row(params, prompt, output, ends)


@pytest.mark.parametrize("vocab", [3, 63, 64, 65, 256, 300, 1000])
def test_against_a_full_sort(make_sampler: MakeSampler, vocab: int) -> None:
    rng = random.Random(vocab)
    torch.manual_seed(vocab)
    sampler = make_sampler(vocab)
    certain = total = 0
    for _ in range(45):
        cases = [random_case(rng, vocab) for _ in range(rng.randint(1, 16))]
        logits = torch.stack([c[0] for c in cases])
        before = logits.clone()
        results = sampler.sample(logits, [c[1] for c in cases])
        assert torch.equal(logits, before), "the caller's logits were changed"
        for i, result in enumerate(results):
            r = cases[i][1]
            if oracle_logits(logits[i], r).max() == -math.inf:
                assert isinstance(result, RequestError)
                continue
            assert isinstance(result, SampledToken), result
            accepted = oracle(logits[i], r)
            assert result.token_id in accepted, (r.params, i)
            certain += len(accepted) == 1
            total += 1
            assert (result.logprob is None) == (r.params.top_logprobs is None)
            if result.logprob is not None:
                raw = torch.log_softmax(logits[i].double(), -1)
                assert result.logprob.logprob == pytest.approx(
                    raw[result.token_id].item(), abs=2e-5
                )
                assert len(result.logprob.top) == min(r.params.top_logprobs or 0, vocab)
    assert total > 250
    assert certain > 0.97 * total, "the oracle leaves too much open to prove anything"


# ------------------------------------------------------------------------- distributions


def z_score(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square in standard deviations above its mean (Wilson-Hilferty)."""
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


@pytest.mark.parametrize(
    ("params", "reach"),
    [
        ({"temperature": 1.3}, 300),
        ({"temperature": 0.8, "top_p": 0.9}, 64),
        ({"temperature": 1.0, "top_k": 30, "top_p": 0.95, "min_p": 0.02}, 64),
        ({"temperature": 3.0, "top_p": 0.97}, 300),
        ({"temperature": 2.0, "top_k": 120}, 300),
    ],
)
def test_chi_square_against_the_exact_distribution(
    make_sampler: MakeSampler, params: dict[str, float], reach: int
) -> None:
    vocab, n = 300, 12_000 if reach == 64 else 6_000
    x = random_logits(1, vocab, 5)[0]
    base = SamplingParams(seed=17, **params)  # type: ignore[arg-type]
    order = np.lexsort((np.arange(vocab), -x.numpy()))
    weights, kept = oracle_kept(x.double().numpy()[order], base, 0.0)
    assert (kept <= 64) == (reach == 64), "the case must take the path it is there for"
    sampler = make_sampler(vocab)
    counts = np.zeros(vocab)
    for start in range(0, n, 400):
        rows = [row(base, position=start + i) for i in range(400)]
        np.add.at(counts, tokens(sampler.sample(x.expand(400, -1), rows)), 1)
    ranked = counts[order]
    assert ranked[kept:].sum() == 0
    expected = weights[:kept] / weights[:kept].sum() * n
    rare = expected < 8
    if rare.any():  # the test needs a few expected draws in each cell
        cells = np.append(ranked[:kept][~rare], ranked[:kept][rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        cells = ranked[:kept]
    assert abs(z_score(cells, expected)) < 4


def test_the_draw_depends_on_seed_choice_prompt_and_position(make_sampler: MakeSampler) -> None:
    x = torch.zeros(1, 4096)
    sampler = make_sampler(4096)

    def draw(position: int = 3, **key: int) -> int:
        params = SamplingParams(seed=key.pop("seed", 1), **key)  # type: ignore[arg-type]
        return tokens(sampler.sample(x, [row(params, position=position)]))[0]

    # A flat distribution in vocabulary order: the token is the draw itself, scaled.
    assert draw() == int(uniform(1, 0, 0, 3) * 4096)
    assert draw(seed=2) == int(uniform(2, 0, 0, 3) * 4096)
    assert draw(position=4) == int(uniform(1, 0, 0, 4) * 4096)
    assert draw(prompt_index=1) == int(uniform(1, 1, 0, 3) * 4096)
    assert draw(choice_index=1) == int(uniform(1, 0, 1, 3) * 4096)
    assert len({draw(seed=s) for s in range(50)}) > 45


# ------------------------------------------------------------------------- borders


def test_greedy_takes_the_lowest_id_of_equals(make_sampler: MakeSampler) -> None:
    for vocab in (5, 256, 700):
        x = torch.full((2, vocab), -1.0)
        x[0, [vocab // 2, vocab - 1]] = 3.0
        greedy = row(SamplingParams(temperature=0.0))
        assert tokens(make_sampler(vocab).sample(x, [greedy, greedy])) == [vocab // 2, 0]


def test_ties_at_the_border_of_top_k_go_to_the_lowest_ids(make_sampler: MakeSampler) -> None:
    vocab = 500
    sampler = make_sampler(vocab)
    x = torch.zeros(1, vocab)
    x[0, 400] = 0.5
    for top_k in (1, 3, 64, 100):
        seen = {
            t
            for start in range(0, 1500, 500)
            for t in tokens(
                sampler.sample(
                    x.expand(500, -1),
                    [row(SamplingParams(top_k=top_k), position=start + i) for i in range(500)],
                )
            )
        }
        assert seen == {400, *range(top_k - 1)}


def test_the_exact_fallback_is_taken_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    real = sampler_module.shortest_prefix

    def seen(x: Tensor, mass: Tensor, need: float) -> Tensor:
        calls.append(need)
        return real(x, mass, need)

    monkeypatch.setattr(sampler_module, "shortest_prefix", seen)
    sampler = Sampler(2000, "cpu")
    peaked = torch.linspace(0, -400, 2000)[None]
    flat = torch.linspace(0, -1, 2000)[None]
    for params, x, expected in [
        (SamplingParams(top_p=0.9), peaked, 0),
        (SamplingParams(top_k=40, top_p=0.9, min_p=0.1), flat, 0),
        (SamplingParams(top_k=63), flat, 0),
        (SamplingParams(top_p=0.9), flat, 1),
        (SamplingParams(top_k=65), flat, 1),
        (SamplingParams(top_k=65, top_p=0.5), flat, 2),
    ]:
        calls.clear()
        tokens(sampler.sample(x, [row(params)]))
        assert len(calls) == expected, params
