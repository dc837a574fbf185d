"""The scheduler over a simulated model: order, budgets, sharing, preemption, aborts."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from model.engine.messages import RequestError, Submit
from model.engine.prefill_clock import PrefillClock
from model.engine.prefix import PrefixIndex
from model.engine.request import Request, SamplingParams
from model.engine.scheduler import Scheduler
from tests.model.engine.simulation import (
    END,
    VOCAB,
    disk_tier,
    make_engine,
    oracle,
    run_to_end,
    submit,
)


def prompt_without_end(length: int, tokens_wanted: int, seed: int = 0) -> list[int]:
    """A prompt after which the simulated model says `tokens_wanted` tokens without ending."""
    chooser = random.Random(seed)
    while True:
        prompt = [chooser.randrange(VOCAB) for _ in range(length)]
        answer = oracle(prompt, tokens_wanted, 10_000)
        if len(answer) == tokens_wanted and END not in answer:
            return prompt


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("budget", [4, 7, 64])
def test_answers_do_not_depend_on_blocks_or_chunks(block_size: int, budget: int) -> None:
    engine, _ = make_engine(
        num_blocks=96 // block_size, block_size=block_size, max_num_batched_tokens=budget
    )
    chooser = random.Random(budget)
    prompts = {
        f"r{i}": [chooser.randrange(VOCAB) for _ in range(chooser.randrange(1, 30))]
        for i in range(12)
    }
    for request_id, prompt in prompts.items():
        submit(engine, request_id, prompt, max_tokens=9)
    tokens = run_to_end(engine)
    assert tokens == {i: oracle(p, 9, 96 // block_size * block_size) for i, p in prompts.items()}


def test_a_prompt_lies_in_ascending_blocks_where_evicted_ones_take_it() -> None:
    """A sequence is evicted last block first; attention reads the next one's from the first on."""
    engine, _ = make_engine(num_blocks=8, block_size=4, max_num_batched_tokens=32)
    submit(engine, "old", prompt_without_end(28, 1), max_tokens=1)
    run_to_end(engine)
    submit(engine, "new", prompt_without_end(28, 4, seed=1), max_tokens=4)
    (sequence,) = engine.scheduler.schedule().sequences
    assert engine.stats().evicted_blocks == 7  # for its next token too
    assert sequence.request.block_table == sorted(sequence.request.block_table)


def test_a_prompt_lies_in_long_pieces_where_evicted_ones_take_it() -> None:
    engine, _ = make_engine(num_blocks=64, block_size=4, max_num_batched_tokens=16)
    for i in range(4):  # side by side, in chunks of four blocks
        submit(engine, f"old {i}", prompt_without_end(57, 2, seed=i), max_tokens=2)
    run_to_end(engine)
    assert engine.stats().blocks_cached == 56
    submit(engine, "new", prompt_without_end(100, 4, seed=9), max_tokens=4)
    engine.step()
    assert engine.stats().evicted_blocks == 18
    (request,) = engine.scheduler._running
    while request.num_uncomputed_tokens > 1:
        engine.step()
    table = request.block_table
    assert sum(b != a + 1 for a, b in itertools.pairwise(table)) <= 3, table


def test_no_more_is_evicted_at_once_than_the_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_tier(tmp_path)
    engine, _ = make_engine(num_blocks=16, block_size=4, max_num_batched_tokens=16, disk=disk)
    submit(engine, "old", prompt_without_end(60, 1), max_tokens=1)
    run_to_end(engine)
    free = engine.stats().blocks_free
    monkeypatch.setattr(type(disk), "room", 0)
    submit(engine, "new", prompt_without_end(60, 1, seed=1), max_tokens=1)
    engine.step()  # four blocks
    assert engine.stats().evicted_blocks == 4 - free
    run_to_end(engine)
    assert engine.stats().evicted_blocks == 15 - free
    disk.close()


def test_preempted_requests_give_the_same_answers() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, max_num_seqs=4)
    prompts = {f"r{i}": prompt_without_end(4, 16, seed=i) for i in range(4)}
    for request_id, prompt in prompts.items():
        submit(engine, request_id, prompt, max_tokens=16)
    assert run_to_end(engine) == {i: oracle(p, 16, 32) for i, p in prompts.items()}
    assert engine.stats().preemptions > 0
    assert engine.stats().blocks_free + engine.stats().blocks_cached == 8


def test_decodes_come_before_prefills_and_oldest_first() -> None:
    engine, runner = make_engine(num_blocks=64, max_num_batched_tokens=8)
    submit(engine, "old", prompt_without_end(4, 8), max_tokens=8)
    engine.step()
    submit(engine, "long", [1] * 20, max_tokens=2)
    submit(engine, "young", [2] * 3, max_tokens=2)
    engine.scheduler.prefill_tokens_beside_decodes = 7
    engine.step()
    assert runner.batches[-1] == [("old", 4, 1), ("long", 0, 7)]
    run_to_end(engine)
    first_of_young = next(i for i, b in enumerate(runner.batches) if "young" in dict_of(b))
    last_of_long = max(
        i for i, b in enumerate(runner.batches) for r, start, _ in b if r == "long" and start < 20
    )
    assert first_of_young >= last_of_long


def dict_of(batch: list[tuple[str, int, int]]) -> dict[str, int]:
    return {request_id: num_tokens for request_id, _, num_tokens in batch}


def test_the_budget_holds_in_every_step() -> None:
    engine, runner = make_engine(num_blocks=64, max_num_batched_tokens=10, max_num_seqs=3)
    for i in range(8):
        submit(engine, f"r{i}", [i % VOCAB] * (3 * i + 1))
    run_to_end(engine)
    for batch in runner.batches:
        assert sum(num_tokens for _, _, num_tokens in batch) <= 10
        assert len(batch) <= 3


def test_a_prompt_is_reused_up_to_its_last_token() -> None:
    engine, runner = make_engine(num_blocks=32)
    prompt = [1, 2, 3, 4, 5, 1, 2, 3]
    submit(engine, "first", prompt, max_tokens=1)
    run_to_end(engine)
    submit(engine, "again", prompt, max_tokens=1)
    outputs = [o for o in engine.step().outputs if o.request_id == "again"]
    assert outputs[0].num_reused_tokens == 4  # the last block must leave one token to compute
    assert runner.batches[-1] == [("again", 4, 4)]
    submit(engine, "longer", [*prompt, 5], max_tokens=1)
    outputs = [o for o in engine.step().outputs if o.request_id == "longer"]
    assert outputs[0].num_reused_tokens == 8


def test_nothing_is_shared_across_salts() -> None:
    engine, _ = make_engine(num_blocks=32)
    prompt = [1] * 9
    for salt in (b"alice", b"bob"):
        submit(engine, salt.decode(), prompt, max_tokens=1, salt=salt)
        outputs = engine.step().outputs
        assert outputs[0].num_reused_tokens == 0


def test_a_burst_of_equal_prompts_computes_the_prompt_once() -> None:
    engine, runner = make_engine(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    prompt = prompt_without_end(17, 4)
    for i in range(4):
        submit(engine, f"r{i}", prompt, max_tokens=4)
    tokens = run_to_end(engine)
    assert list(tokens.values()) == [oracle(prompt, 4, 256)] * 4
    assert runner.batches[0] == [("r0", 0, 17)]
    assert set(runner.batches[1]) == {("r0", 17, 1)} | {(f"r{i}", 16, 1) for i in (1, 2, 3)}


def test_a_waiter_goes_on_when_the_one_it_waits_for_is_aborted() -> None:
    engine, _ = make_engine(num_blocks=64, max_num_batched_tokens=8)
    prompt = [3] * 30
    submit(engine, "first", prompt, max_tokens=2)
    submit(engine, "second", prompt, max_tokens=2)
    engine.step()
    engine.abort(["first"])
    tokens = run_to_end(engine)
    assert tokens["second"] == oracle(prompt, 2, 256)


def test_equal_blocks_become_one_when_they_complete() -> None:
    engine, _ = make_engine(num_blocks=64, max_num_batched_tokens=64)
    submit(engine, "a", [1, 2, 3], max_tokens=9)
    submit(engine, "b", [1, 2, 3], max_tokens=9)  # no full block to wait for
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert stats.blocks_cached == (3 + len(oracle([1, 2, 3], 9, 256)) - 1) // 4


def test_an_abort_between_forward_and_update_is_the_last_word() -> None:
    engine, _ = make_engine(num_blocks=8)
    submit(engine, "a", prompt_without_end(4, 8), max_tokens=8)
    submit(engine, "b", prompt_without_end(4, 8, seed=1), max_tokens=8)
    outputs = engine.step(drain=lambda: engine.abort(["a"])).outputs
    assert [o.request_id for o in outputs] == ["b"]
    assert "a" not in engine.scheduler
    engine.scheduler.check()


def test_an_abort_in_the_last_step_is_an_abort() -> None:
    engine, _ = make_engine(num_blocks=8)
    submit(engine, "a", [1, 2], max_tokens=1)
    assert engine.step(drain=lambda: engine.abort(["a"])).outputs == []
    assert not engine.has_work
    assert engine.stats().aborted == 1
    engine.abort(["a"])  # again: nothing happens
    assert engine.stats().aborted == 1


def test_what_can_never_fit_is_refused_and_the_next_one_is_not_delayed() -> None:
    engine, _ = make_engine(num_blocks=4, block_size=4, max_model_len=1000)
    submit(engine, "huge", [1] * 16)
    submit(engine, "small", [1, 2], max_tokens=1)
    outputs = {o.request_id: o for o in engine.step().outputs}
    error = outputs["huge"].error
    assert error is not None and error.code == "context_length_exceeded"
    assert outputs["small"].token_ids == oracle([1, 2], 1, 1000)


def test_a_request_alone_in_a_full_pool_stops_by_length() -> None:
    engine, _ = make_engine(num_blocks=2, block_size=2, max_model_len=1000)
    prompt = prompt_without_end(2, 6)
    submit(engine, "a", prompt, max_tokens=6)
    reasons = []
    while engine.has_work:
        reasons += [o.finish_reason for o in engine.step().outputs]
    assert reasons[-1] == "length"
    assert engine.stats().blocks_free + engine.stats().blocks_cached == 2


def test_one_failed_draw_ends_only_its_request() -> None:
    engine, runner = make_engine(num_blocks=32)
    prompts = {"good": prompt_without_end(3, 5), "bad": prompt_without_end(5, 5, seed=2)}
    for request_id, prompt in prompts.items():
        submit(engine, request_id, prompt, max_tokens=5)
    engine.step()
    runner.fail["bad"] = RequestError("server_error", "internal", "injected")
    outputs = {o.request_id: o for o in engine.step().outputs}
    error = outputs["bad"].error
    assert error is not None and error.message == "injected"
    assert run_to_end(engine)["good"] == oracle(prompts["good"], 5, 128)[2:]


def test_a_resumed_request_goes_on_where_it_was() -> None:
    prompt = prompt_without_end(5, 10)
    answer = oracle(prompt, 10, 128)
    for cut in range(10):
        engine, _ = make_engine(num_blocks=32)
        params = SamplingParams(max_tokens=10)
        engine.submit(Submit("r", prompt, params, output_token_ids=answer[:cut]))
        assert run_to_end(engine)["r"] == answer[cut:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_token_ids": []}, "at least one"),
        ({"prompt_token_ids": [VOCAB]}, "token ids must be"),
        ({"prompt_token_ids": [-1]}, "token ids must be"),
        ({"params": SamplingParams(temperature=float("nan"))}, "finite"),
        ({"params": SamplingParams(logit_bias={VOCAB: 1.0})}, "token ids must be"),
        ({"params": SamplingParams(min_tokens=5, max_tokens=4)}, "min_tokens"),
        ({"params": SamplingParams(max_tokens=0)}, "max_tokens"),
        ({"params": SamplingParams(top_p=0.0)}, "top_p"),
        ({"params": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty"),
        ({"params": SamplingParams(stop_token_ids=(99,))}, "token ids must be"),
    ],
)
def test_the_engine_refuses_what_the_edge_should_have(
    changes: dict[str, object], words: str
) -> None:
    engine, _ = make_engine()
    fields: dict[str, object] = {"prompt_token_ids": [1], "params": SamplingParams(), **changes}
    engine.submit(Submit("r", **fields))  # type: ignore[arg-type]
    outputs = engine.step().outputs
    assert outputs[0].finish_reason == "error"
    assert outputs[0].error is not None and words in outputs[0].error.message
    assert not engine.has_work


def test_an_id_that_runs_already_is_refused_and_the_first_goes_on() -> None:
    engine, _ = make_engine()
    prompt = prompt_without_end(2, 3)
    submit(engine, "same", prompt, max_tokens=3)
    engine.step()
    submit(engine, "same", [2], max_tokens=3)
    outputs = engine.step().outputs
    assert [o.error is not None for o in outputs] == [True, False]
    assert "same" in engine.scheduler


def test_a_thousand_random_loads_over_a_small_pool_all_finish(tmp_path: Path) -> None:
    """Every tenth one with a disk tier, which has what the others of its block size left there."""
    chooser = random.Random(1)
    num_disk_tokens = 0
    for trial in range(1000):
        size = chooser.choice([1, 2, 4])
        disk = None if trial % 10 else disk_tier(tmp_path / str(size), size, budget_blocks=20)
        engine, _ = make_engine(num_blocks=8, block_size=size, disk=disk)
        limit = engine.scheduler.max_model_len
        expected = {}
        for i in range(chooser.randrange(1, 7)):
            prompt = [chooser.randrange(3) for _ in range(chooser.randrange(1, limit))]
            submit(engine, f"r{i}", prompt, max_tokens=6)
            expected[f"r{i}"] = oracle(prompt, 6, limit)
            for _ in range(chooser.randrange(3)):
                for output in engine.step().outputs:
                    _check_prefix(output.token_ids, expected[output.request_id])
        run_to_end(engine, max_steps=400)
        assert engine.scheduler.pool.num_available == 8, f"trial {trial}"
        num_disk_tokens += engine.stats().disk_tokens
        engine.close()
    assert num_disk_tokens > 100


def _check_prefix(token_ids: list[int], answer: list[int]) -> None:
    for token_id in token_ids:
        assert answer.pop(0) == token_id


def test_what_did_not_fit_is_looked_up_again_when_it_may_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookups = []
    match = PrefixIndex.match

    def counted(index: PrefixIndex, keys: list[bytes], *others: Any) -> list[int]:
        lookups.append(len(keys))
        return match(index, keys, *others)

    monkeypatch.setattr(PrefixIndex, "match", counted)
    engine, _ = make_engine(num_blocks=8, block_size=4)
    submit(engine, "old", prompt_without_end(9, 10), max_tokens=10)
    engine.step()
    submit(engine, "large", prompt_without_end(21, 1, seed=1), max_tokens=1)
    lookups.clear()
    for _ in range(8):
        engine.step()
    assert lookups == [5]
    assert engine.stats().num_waiting == 1
    engine.step()  # the last one of "old"
    assert [o.request_id for o in engine.step().outputs] == ["large"]
    assert lookups == [5, 5]


def test_what_is_not_looked_up_again_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over random loads of prompts that share prefixes with what others say, with aborts."""
    passed_over = 0
    cannot_fit_yet = Scheduler._cannot_fit_yet

    def checked(scheduler: Scheduler, request: Request) -> bool:
        nonlocal passed_over
        refused = cannot_fit_yet(scheduler, request)
        if refused:
            passed_over += 1
            limit = scheduler._match_limit(request)
            blocks = scheduler.index.match(request.block_keys, request.token_ids, limit)
            num_shared = sum(scheduler.pool.references(block) > 0 for block in blocks)
            num_needed = len(request.token_ids) // scheduler.block_size + 1
            assert num_needed > num_shared + scheduler.pool.num_available
        return refused

    monkeypatch.setattr(Scheduler, "_cannot_fit_yet", checked)
    chooser = random.Random(3)
    for _ in range(500):
        engine, _ = make_engine(
            num_blocks=chooser.choice([6, 8, 12]), block_size=chooser.choice([1, 2, 4])
        )
        limit = engine.scheduler.max_model_len
        texts: list[list[int]] = [[]]
        for i in range(15):
            start = chooser.choice(texts)
            prompt = start[: chooser.randrange(limit)]
            prompt += [chooser.randrange(3) for _ in range(chooser.randrange(1, limit))]
            params = SamplingParams(max_tokens=8, prompt_logprobs=chooser.random() < 0.2)
            engine.submit(Submit(f"r{i}", prompt[: limit - 2], params))
            for _ in range(chooser.randrange(8)):
                engine.step()
            texts = [r.token_ids for r in engine.scheduler._requests.values()] or [[]]
            if chooser.random() < 0.2:
                engine.abort([f"r{chooser.randrange(i + 1)}"])
        run_to_end(engine, max_steps=1000)
    assert passed_over > 1000


def test_the_budget_must_let_everybody_decode() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Scheduler(
            num_blocks=8,
            block_size=4,
            max_num_seqs=4,
            max_num_batched_tokens=3,
            max_model_len=32,
        )


def test_the_prefill_chunk_follows_the_clock() -> None:
    clock = PrefillClock(512, target_seconds=0.05)
    for _ in range(40):
        clock.observe(4, 0, 0.02)
        clock.observe(4, 64, 0.02 + 64 * 0.001)
    assert 25 <= clock.chunk <= 30  # (50 - 20) ms at 1 ms a token
    for _ in range(40):
        clock.observe(4, 64, 0.02 + 64 * 0.0001)
    assert 270 <= clock.chunk <= 330
    for _ in range(40):
        clock.observe(4, 64, 0.02 + 64 * 0.1)
    assert clock.chunk == 16  # never less, or a prompt would not end
