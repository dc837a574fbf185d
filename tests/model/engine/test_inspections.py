"""Inspections between steps: whose turn it is, and that the requests do not notice."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.engine.engine import Engine
from model.engine.inspections import MIN_STEPS, Inspections
from model.engine.loader import load_engine
from model.engine.messages import (
    AttentionInspection,
    CacheInspection,
    EngineStats,
    ForwardInspection,
    Inspect,
    Inspected,
    Start,
    Submit,
)
from model.engine.request import SamplingParams
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import make_tokens, read_config


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Units:
    """An inspector whose units take `seconds` each, and which fails after `fails_at`."""

    def __init__(self, clock: Clock, seconds: list[float], fails_at: int = 1 << 30) -> None:
        self._clock = clock
        self._seconds = seconds
        self._fails_at = fails_at
        self.closed = False

    def run(self, message: Inspect) -> Iterator[Inspected | None]:
        try:
            for i, seconds in enumerate(self._seconds):
                if i == self._fails_at:
                    raise RuntimeError("out of luck")
                self._clock.now += seconds
                yield Inspected(message.inspect_id) if i % 2 else None
        finally:
            self.closed = True


WHAT = Inspect(1, [1], ForwardInspection(1))


def test_alone_it_runs_at_once() -> None:
    clock = Clock()
    inspections = Inspections(Units(clock, [1.0] * 4), clock=clock)
    assert not inspections.has_work and inspections.advance(busy=False) is None
    inspections.add(WHAT)
    got = [inspections.advance(busy=False) for _ in range(5)]
    assert got[:4] == [None, Inspected(1), None, Inspected(1)]
    assert got[4] == Inspected(1, done=True)
    assert not inspections.has_work


@given(
    step=st.floats(0.001, 0.1),
    units=st.lists(st.floats(0.0001, 0.3), min_size=3, max_size=40),
)
def test_beside_requests_the_median_stays_and_the_mean_grows_by_half(
    step: float, units: list[float]
) -> None:
    clock = Clock()
    inspections = Inspections(Units(clock, units), clock=clock)
    inspections.add(WHAT)
    gaps: list[float] = []
    while inspections.has_work:
        begun = clock.now
        clock.now += step
        inspections.advance(busy=True)
        gaps.append(clock.now - begun)
    rested = [i for i, gap in enumerate(gaps) if gap > step * 1.00001]
    assert all(b - a >= MIN_STEPS for a, b in itertools.pairwise(rested))
    # A gap is a step, or a step and a unit; there is a unit in the first one.
    assert statistics.median(gaps[1:]) <= 1.5 * step
    assert statistics.mean(gaps[1:]) <= 1.51 * step + 1e-9


def test_one_after_the_other_and_ended_ones_are_dropped() -> None:
    clock = Clock()
    units = Units(clock, [0.0] * 3)
    inspections = Inspections(units, clock=clock)
    for inspect_id in (1, 2, 3):
        inspections.add(Inspect(inspect_id, [1], ForwardInspection(1)))
    inspections.advance(busy=False)
    assert inspections.advance(busy=False) == Inspected(1)
    inspections.end(1)
    assert units.closed  # what it held is gone with it
    inspections.end(3)
    inspections.end(9)
    got = [inspections.advance(busy=False) for _ in range(4)]
    assert got == [None, Inspected(2), None, Inspected(2, done=True)]
    assert not inspections.has_work


def test_what_fails_ends_alone() -> None:
    clock = Clock()
    inspections = Inspections(Units(clock, [0.0] * 9, fails_at=1), clock=clock)
    inspections.add(WHAT)
    inspections.add(Inspect(2, [1], ForwardInspection(1)))
    assert inspections.advance(busy=False) is None
    failed = inspections.advance(busy=False)
    assert failed is not None and failed.inspect_id == 1 and failed.error is not None
    assert failed.error.code == "internal" and "out of luck" in failed.error.message
    assert inspections.has_work


# ------------------------------------------------------------------------- in a real engine


@pytest.fixture(scope="module", params=["native", "reference"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = make_tiny("llama", tmp_path_factory.mktemp("model"))
    start = Start(
        epoch=1,
        name="tiny",
        config=read_config(model),
        weights=tuple(str(path) for path in Path(model).glob("*.safetensors")),
        fingerprint="tiny",
        device="cpu",
        ops=request.param,
        threads=1,
        kv_memory=1 << 20,
        check_accounting=True,
    )
    return load_engine(start)[0]


def pool(stats: EngineStats) -> tuple[int, int, int]:
    return stats.blocks_free, stats.blocks_cached, stats.evicted_blocks


INSPECTIONS = [
    ForwardInspection(5, [0, 1]),
    AttentionInspection(1, [0, 1, 2, 3], list(range(200))),
    CacheInspection(20),
]


@pytest.mark.parametrize("what", INSPECTIONS, ids=["forward", "attention", "cache"])
def test_requests_go_on_beside_it(engine: Engine, what: ForwardInspection) -> None:
    """The tokens are those that it draws alone, and the pool does not see the inspection."""
    params = SamplingParams(max_tokens=150, ignore_eos=True, seed=3)
    prompt = make_tokens(50)

    def draw(name: str, *, inspected: bool) -> list[int]:
        engine.submit(Submit(name, prompt, params))
        tokens: list[int] = []
        while engine.has_work:
            for output in engine.step().outputs:
                tokens += output.token_ids
            if inspected and len(tokens) == 5 and not engine.inspects and not found:
                assert engine.inspections is not None
                engine.inspections.add(Inspect(1, make_tokens(200, seed=1), what))
            part = engine.inspect()
            if part is not None:
                found.append(part)
                if engine.has_work:
                    times.append(len(tokens))
        return tokens

    found: list[Inspected] = []
    times: list[int] = []  # how many tokens there were when a part came
    engine.submit(Submit("warm", prompt, SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()
    expected = draw("alone", inspected=False)
    before = pool(engine.stats())
    tokens = draw("beside", inspected=True)
    assert tokens == expected and len(tokens) == 150
    assert pool(engine.stats()) == before
    assert all(b - a >= MIN_STEPS for a, b in itertools.pairwise(times))
    while engine.inspects:  # the rest of it, with nobody beside it
        part = engine.inspect()
        if part is not None:
            found.append(part)
    assert found[-1].done and all(part.error is None for part in found)
    assert pool(engine.stats()) == before
