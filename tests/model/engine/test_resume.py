"""A generation that is cut anywhere and submitted again goes on as if nothing had happened: the
same tokens, log-probabilities and end, whatever the parameters, also when it is preempted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.engine.engine import Engine
from model.engine.messages import Submit
from model.engine.request import SamplingParams
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import make_tokens
from tests.model.engine.simulation import VOCAB, disk_tier, make_engine, submit
from tests.model.engine.test_generation import Answer, load
from tests.model.engine.test_scheduler import prompt_without_end

PRESSURE = "pressure"  # the ids of requests that are there to take blocks away


def hear(engine: Engine, submission: Submit) -> Answer:
    """One request's answer; whatever else runs ends too."""
    answer = Answer()
    engine.submit(submission)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            if output.request_id != submission.request_id:
                continue
            assert answer.finish_reason is None, "an output after the end"
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.prompt_logprobs += output.prompt_logprobs
            answer.finish_reason = output.finish_reason
            if output.num_reused_tokens >= 0:
                assert answer.num_reused_tokens < 0, "told twice"
                answer.num_reused_tokens = output.num_reused_tokens
                answer.num_disk_tokens = output.num_disk_tokens
    return answer


# ------------------------------------------------------------------------ over a simulated model


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    max_tokens=st.integers(1, 14),
    stops=st.sets(st.integers(0, VOCAB - 1), max_size=2),
    ignore_eos=st.booleans(),
    done=st.integers(0, 14),
    others=st.integers(0, 3),
    block_size=st.sampled_from([1, 3, 4]),
)
def test_simulated(
    prompt: list[int],
    max_tokens: int,
    stops: set[int],
    ignore_eos: bool,
    done: int,
    others: int,
    block_size: int,
) -> None:
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=tuple(stops), ignore_eos=ignore_eos
    )
    num_blocks = 36 // block_size
    alone, _ = make_engine(num_blocks=num_blocks, block_size=block_size)
    whole = hear(alone, Submit("r", prompt, params))
    assert len(whole.token_ids) <= max_tokens
    done = min(done, len(whole.token_ids))
    tight, _ = make_engine(num_blocks=num_blocks, block_size=block_size)
    for i in range(others):  # older, so that it is not them who have to go
        submit(tight, f"{PRESSURE}{i}", prompt_without_end(8, 20, seed=i), max_tokens=20)
    rest = hear(tight, Submit("r", prompt, params, output_token_ids=whole.token_ids[:done]))
    assert whole.token_ids[:done] + rest.token_ids == whole.token_ids
    assert rest.finish_reason == whole.finish_reason


def test_it_is_preempted_where_others_are_older() -> None:
    """That the examples above meet what they are meant to meet."""
    engine, _ = make_engine(num_blocks=9)
    for i in range(3):
        submit(engine, f"{PRESSURE}{i}", prompt_without_end(8, 20, seed=i), max_tokens=20)
    hear(engine, Submit("r", [1] * 4, SamplingParams(max_tokens=14), output_token_ids=[2, 3]))
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("done", [0, 1, 6, 13, 19])
def test_what_is_found_and_computed_counts_all_given_tokens(done: int, tmp_path: Path) -> None:
    """Tokens that were drawn earlier are found, or prefilled again, as those of the prompt are."""
    prompt = prompt_without_end(10, 20)
    params = SamplingParams(max_tokens=20)
    engine, runner = make_engine(num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    whole = hear(engine, Submit("r", prompt, params)).token_ids
    engine.close()
    for tier in ("disk", "device"):
        if tier == "disk":
            engine, runner = make_engine(
                num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path)
            )
        before, num_batches = engine.stats(), len(runner.batches)
        rest = hear(engine, Submit("r", prompt, params, output_token_ids=whole[:done]))
        assert rest.token_ids == whole[done:]
        found = (10 + done - 1) // 4 * 4
        assert runner.batches[num_batches] == [("r", found, 10 + done - found)]
        assert rest.num_reused_tokens == found
        assert rest.num_disk_tokens == (found if tier == "disk" else 0)
        after = engine.stats()
        assert after.prompt_tokens - before.prompt_tokens == 10 + done - found
        assert after.reused_tokens - before.reused_tokens == found
    engine.close()


# ------------------------------------------------------------------------------ over a real one


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """Two engines over one tiny model, one of them with a pool for one long sequence."""
    if shutil.which("g++") is None:
        pytest.skip("the kernels need a compiler; torch's sums are not the same in every batch")
    folder = make_tiny("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)
    ample, info = load(folder, ops="native")
    assert info.reproducible
    tight, _ = load(folder, ops="native", kv_tokens=128, chunk=48)  # bf16: twice as many
    return ample, tight


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 24))
    stops = draw(st.lists(st.integers(3, 511), max_size=3, unique=True))
    bias = draw(st.dictionaries(st.integers(0, 511), st.floats(-8, 8, width=16), max_size=4))
    # Stops that are likely, or no example would meet one.
    likely = draw(st.sampled_from([0.0, 6.0, 10.0]))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 5, 40])),
        top_p=draw(st.sampled_from([0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([0.8, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([-1.0, 0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([-0.5, 0.0, 1.0])),
        logit_bias={**bias, **dict.fromkeys([*stops, 2], likely)},
        min_tokens=draw(st.integers(0, max_tokens)),
        max_tokens=max_tokens,
        stop_token_ids=tuple(stops),
        ignore_eos=draw(st.booleans()),
        top_logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
        choice_index=draw(st.integers(0, 2)),
    )


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 70),
    params=sampling_params(),
    done=st.integers(0, 24),
    others=st.integers(0, 3),
)
def test_real(
    engines: tuple[Engine, Engine], length: int, params: SamplingParams, done: int, others: int
) -> None:
    ample, tight = engines
    prompt = make_tokens(length, seed=length)
    whole = hear(ample, Submit("r", prompt, params))
    assert whole.finish_reason == "stop" or len(whole.token_ids) == params.max_tokens
    done = min(done, len(whole.token_ids))
    for i in range(others):
        pressure = SamplingParams(max_tokens=60, ignore_eos=True, seed=i)
        tight.submit(Submit(f"{PRESSURE}{i}", make_tokens(40, seed=1000 + i), pressure))
    rest = hear(tight, Submit("r", prompt, params, output_token_ids=whole.token_ids[:done]))
    assert whole.token_ids[:done] + rest.token_ids == whole.token_ids
    assert rest.finish_reason == whole.finish_reason
    assert rest.logprobs == whole.logprobs[done:]
    if rest.token_ids:  # what is over already has no step, and nothing to say of its prompt
        assert rest.prompt_logprobs == whole.prompt_logprobs
        assert len(rest.prompt_logprobs) == (length - 1 if params.prompt_logprobs else 0)


def test_the_real_one_is_preempted_too(engines: tuple[Engine, Engine]) -> None:
    _, tight = engines
    before = tight.stats().preemptions
    for i in range(3):
        pressure = SamplingParams(max_tokens=60, ignore_eos=True, seed=i)
        tight.submit(Submit(f"{PRESSURE}{i}", make_tokens(40, seed=1000 + i), pressure))
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    hear(tight, Submit("r", make_tokens(60), params, output_token_ids=[5, 6]))
    assert tight.stats().preemptions > before


@pytest.mark.parametrize("done", [0, 5, 11])
def test_limits_count_from_the_boundary(engines: tuple[Engine, Engine], done: int) -> None:
    """The tokens that it has count, wherever the prompt ends: 12 in all, and no end before 10."""
    ample, _ = engines
    earlier = make_tokens(done, seed=3)
    params = SamplingParams(
        max_tokens=12, min_tokens=10, stop_token_ids=(7,), logit_bias={7: 100.0}, temperature=0.0
    )
    rest = hear(ample, Submit("r", make_tokens(30), params, output_token_ids=earlier))
    assert rest.finish_reason == "stop" and rest.token_ids[-1] == 7
    assert len(rest.token_ids) == max(11 - done, 1)
    unending = SamplingParams(max_tokens=12, ignore_eos=True)
    rest = hear(ample, Submit("r", make_tokens(30), unending, output_token_ids=earlier))
    assert (len(rest.token_ids), rest.finish_reason) == (12 - done, "length")
