from __future__ import annotations

import math

import pytest

from model.sampling.draws import uniform


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, 0, 0, 0), 0.6263298458802132),
        ((1, 0, 0, 0), 0.12574854759804632),
        ((0, 1, 0, 0), 0.649884838660849),
        ((0, 0, 1, 0), 0.11698566786724895),
        ((0, 0, 0, 1), 0.7446479754481377),
        ((9223372036854775807, 63, 7, 131071), 0.6094788519571385),
        ((-1, 0, 0, 5), 0.7631895545998132),
    ],
)
def test_golden_values_never_change(key: tuple[int, int, int, int], expected: float) -> None:
    # A generation stored by one version goes on under the next: these values are a file format.
    assert uniform(*key) == expected


def test_a_seed_counts_modulo_64_bits() -> None:
    assert uniform(-1, 0, 0, 5) == uniform(2**64 - 1, 0, 0, 5)
    assert uniform(2**64 + 3, 0, 0, 5) == uniform(3, 0, 0, 5)


def chi_square(counts: list[int]) -> float:
    """How many standard deviations the statistic lies above its mean (Wilson-Hilferty)."""
    expected = sum(counts) / len(counts)
    freedom = len(counts) - 1
    statistic = sum((c - expected) ** 2 / expected for c in counts)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


@pytest.mark.parametrize("axis", range(4))
def test_draws_are_uniform_along_every_axis(axis: int) -> None:
    n, bins = 50_000, 100
    key = [7, 0, 0, 11]
    draws = []
    for i in range(n):
        key[axis] = i
        draws.append(uniform(*key))
    assert all(0.0 <= d < 1.0 for d in draws)
    assert len(set(draws)) == n
    counts = [0] * bins
    for d in draws:
        counts[int(d * bins)] += 1
    assert abs(chi_square(counts)) < 4
    pairs = [0] * 100
    for a, b in zip(draws[::2], draws[1::2], strict=True):
        pairs[int(a * 10) * 10 + int(b * 10)] += 1
    assert abs(chi_square(pairs)) < 4


def test_neighbouring_seeds_are_not_correlated() -> None:
    n = 20_000
    a = [uniform(1, 0, 0, i) - 0.5 for i in range(n)]
    b = [uniform(2, 0, 0, i) - 0.5 for i in range(n)]
    shifted = [uniform(1, 0, 0, i + 1) - 0.5 for i in range(n)]
    for other in (b, shifted):
        correlation = sum(x * y for x, y in zip(a, other, strict=True)) / n * 12
        assert abs(correlation) < 4 / math.sqrt(n)
