"""The same request gives the same bits, whatever happens around it: default model, native kernels.

Each request has its own length, seed and parameters. The tokens and the log-probabilities of a run
alone are what every other run must repeat exactly: in batches, in chunks, with a warm cache, with
other numbers of threads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from model.engine.engine import Engine
from model.engine.loader import load_engine
from model.engine.messages import Start, Submit, TokenLogprob
from model.engine.request import SamplingParams
from model.hub import ModelFiles, resolve

pytestmark = pytest.mark.e2e

NUM_TOKENS = 8


@dataclass(frozen=True)
class Around:
    """What is different around a request."""

    threads: int = 2
    batch: int = 1
    chunk: int = 512
    warm: bool = False


ALONE = Around()
OTHERS = [
    Around(batch=16),
    Around(batch=16, threads=1),
    Around(batch=7, chunk=17),
    Around(batch=16, chunk=64, warm=True),
    Around(chunk=512, warm=True),
    Around(batch=16, chunk=512, warm=True, threads=1),
]

Answer = tuple[list[int], list[TokenLogprob]]


def requests(count: int, longest: int) -> list[tuple[list[int], SamplingParams]]:
    chooser = random.Random(7)
    made = []
    for seed in range(count):
        length = 1 + round((longest - 1) * chooser.random() ** 3)  # many short ones, some long
        prompt = [chooser.randrange(17, 49152) for _ in range(length)]
        params = SamplingParams(
            temperature=chooser.choice([0.0, 0.7, 1.0]),
            top_p=chooser.choice([1.0, 0.9]),
            top_k=chooser.choice([0, 40]),
            repetition_penalty=chooser.choice([1.0, 1.1]),
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            top_logprobs=3,
            seed=seed,
        )
        made.append((prompt, params))
    return made


def make_engine(files: ModelFiles, around: Around) -> Engine:
    engine, info = load_engine(
        Start(
            epoch=1,
            name=files.name,
            config=files.config,
            weights=tuple(str(path) for path in files.weights),
            fingerprint=files.fingerprint,
            device="cpu",
            ops="native",
            threads=around.threads,
            max_num_seqs=min(around.batch, around.chunk),
            max_num_batched_tokens=around.chunk,
            kv_memory=512 << 20,
        )
    )
    assert info.reproducible
    return engine


def answers(
    engine: Engine, asked: list[tuple[list[int], SamplingParams]], name: str
) -> list[Answer]:
    got: dict[str, Answer] = {}
    for i, (prompt, params) in enumerate(asked):
        got[f"{name}{i}"] = ([], [])
        engine.submit(Submit(f"{name}{i}", list(prompt), params))
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            tokens, logprobs = got[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs
    return list(got.values())


def check(count: int, longest: int, around: list[Around]) -> None:
    files = resolve("smollm2-135m")
    asked = requests(count, longest)
    expected = answers(make_engine(files, ALONE), asked, "alone")
    assert all(len(tokens) == NUM_TOKENS for tokens, _ in expected)
    for other in around:
        engine = make_engine(files, other)
        # As many at a time as stay cached.
        many = max(other.batch, 8) if other.warm else count
        for first in range(0, count, many):
            some = asked[first : first + many]
            if other.warm:
                answers(engine, some, f"warm {first} ")
            before = engine.stats().reused_tokens
            assert answers(engine, some, f"again {first} ") == expected[first : first + many], other
            if other.warm:
                assert engine.stats().reused_tokens > before


def test_bits_do_not_depend_on_what_is_around() -> None:
    check(14, 120, OTHERS)


def test_bits_do_not_depend_on_chunks_of_one_token() -> None:
    check(4, 60, [Around(chunk=1), Around(chunk=1, threads=1)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_requests() -> None:
    check(200, 700, [*OTHERS, Around(chunk=17), Around(batch=16, chunk=17, warm=True)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_requests_in_chunks_of_one_token() -> None:
    check(200, 40, [Around(chunk=1)])
