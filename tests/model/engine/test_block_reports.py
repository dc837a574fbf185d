"""What an engine tells of a request's blocks, and how it forgets them; over a simulated model."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.engine.engine import Engine
from model.engine.messages import BlockState, CacheQuery, RequestError, Submit, TokenOutput
from model.engine.prefix import block_key, root_key
from model.engine.request import SamplingParams
from tests.model.engine.simulation import ROOT, disk_tier, make_engine, oracle, run_to_end, submit
from tests.model.engine.test_scheduler import prompt_without_end

PROMPT = prompt_without_end(18, 10)
ANSWER = oracle(PROMPT, 10, 1000)


def keys_of(token_ids: list[int], salt: bytes = b"", size: int = 4) -> list[bytes]:
    """Worked out from what a key is."""
    keys, parent = [], root_key(ROOT, salt)
    for start in range(0, len(token_ids) - size + 1, size):
        parent = block_key(parent, token_ids[start : start + size])
        keys.append(parent)
    return keys


def submit_reported(
    engine: Engine, request_id: str = "r", prompt: list[int] = PROMPT, max_tokens: int = 10
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    engine.submit(Submit(request_id, prompt, params, report_blocks=True))


def all_outputs(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    return outputs


def states(engine: Engine, token_ids: list[int], salt: bytes = b"") -> list[tuple[bool, bool]]:
    report = engine.cache_report(CacheQuery(7, token_ids, salt))
    assert report.query_id == 7
    assert [block.key for block in report.blocks] == keys_of(token_ids, salt)
    return [(block.device, block.disk) for block in report.blocks]


# ------------------------------------------------------------------------------- block_keys


def test_the_last_output_names_all_full_blocks() -> None:
    engine, _ = make_engine(num_blocks=32)
    submit_reported(engine)
    outputs = all_outputs(engine)
    assert outputs[-1].finish_reason == "length"
    # The last token was drawn and never computed.
    assert outputs[-1].block_keys == keys_of(PROMPT + ANSWER[:-1])
    assert not any(output.block_keys for output in outputs[:-1])
    submit(engine, "other", PROMPT)
    assert not any(output.block_keys for output in all_outputs(engine))


def test_a_failed_draw_names_them_too() -> None:
    engine, runner = make_engine(num_blocks=32)
    submit_reported(engine)
    runner.fail["r"] = RequestError("server_error", "internal", "injected")
    last = all_outputs(engine)[-1]
    assert (last.finish_reason, last.block_keys) == ("error", keys_of(PROMPT))


@pytest.mark.parametrize("within_a_step", [False, True])
def test_an_aborted_request_says_goodbye_where_that_was_asked_for(within_a_step: bool) -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=64)
    submit_reported(engine)
    submit(engine, "silent", [1, 2, 3])
    engine.step()
    if within_a_step:
        outputs = engine.step(lambda: engine.abort(["r", "silent"])).outputs
    else:
        engine.abort(["r", "silent", "unknown"])
        assert engine.has_work  # something is left to say
        outputs = engine.step().outputs
    goodbye = TokenOutput("r", finish_reason="abort", block_keys=keys_of(PROMPT))
    assert outputs == [goodbye]
    assert not engine.has_work and engine.idle_report().outputs == []


def test_the_idle_report_says_goodbye_as_well() -> None:
    engine, _ = make_engine()
    submit_reported(engine, prompt=[1, 2, 3])
    engine.abort(["r"])
    assert engine.idle_report().outputs == [TokenOutput("r", finish_reason="abort")]
    assert not engine.has_work


def test_blocks_from_before_a_preemption_are_named() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, max_num_seqs=2)
    submit(engine, "old", prompt_without_end(9, 18), max_tokens=18)
    young = prompt_without_end(9, 18, seed=5)
    submit_reported(engine, "young", young, max_tokens=18)
    said: list[int] = []
    while engine.stats().preemptions == 0:
        said += [t for o in engine.step().outputs if o.request_id == "young" for t in o.token_ids]
    assert engine.stats().num_waiting == 1
    engine.abort(["young"])
    named = engine.step().outputs[0].block_keys
    assert len(named) >= 3 and named == keys_of(young + said)[: len(named)]


def test_what_is_over_when_it_is_resumed_ends_with_its_reason_and_blocks() -> None:
    engine, _ = make_engine(num_blocks=32)
    params = SamplingParams(max_tokens=10)
    engine.submit(Submit("r", PROMPT, params, output_token_ids=ANSWER, report_blocks=True))
    keys = keys_of(PROMPT + ANSWER[:-1])
    assert engine.step().outputs == [TokenOutput("r", finish_reason="length", block_keys=keys)]
    stops = SamplingParams(max_tokens=30, stop_token_ids=(ANSWER[-1],))
    engine.submit(Submit("r", PROMPT, stops, output_token_ids=ANSWER))
    assert engine.step().outputs == [TokenOutput("r", finish_reason="stop")]
    engine.submit(Submit("r", PROMPT, SamplingParams(max_tokens=999), ANSWER * 20))
    assert engine.step().outputs == [TokenOutput("r", finish_reason="length")]  # the context's end
    assert not engine.has_work


# ----------------------------------------------------------------------------- CacheQuery


def test_a_query_tells_each_full_block(tmp_path: Path) -> None:
    engine, _ = make_engine(num_blocks=32, disk=disk_tier(tmp_path))
    assert states(engine, PROMPT) == [(False, False)] * 4
    submit(engine, "r", PROMPT, max_tokens=1)
    run_to_end(engine)
    while engine.write_behind() is not None:
        pass
    assert states(engine, PROMPT) == [(True, True)] * 4
    other = PROMPT[:9] + [(t + 1) % 5 for t in PROMPT[9:]]
    assert states(engine, other) == [(True, True)] * 2 + [(False, False)] * 2
    assert states(engine, PROMPT, b"somebody else") == [(False, False)] * 4
    assert states(engine, PROMPT[:3]) == states(engine, []) == []
    engine.close()
    engine, _ = make_engine(num_blocks=32, disk=disk_tier(tmp_path))
    assert states(engine, PROMPT) == [(False, True)] * 4
    engine.close()


def test_a_query_is_answered_while_something_runs() -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=8)
    submit(engine, "r", PROMPT, max_tokens=10)
    engine.step()
    assert states(engine, PROMPT) == [(True, False)] * 2 + [(False, False)] * 2
    seen: list[list[tuple[bool, bool]]] = []
    engine.step(lambda: seen.append(states(engine, PROMPT)))  # and in the midst of a step
    assert seen == [[(True, False)] * 2 + [(False, False)] * 2]
    assert run_to_end(engine)["r"] == ANSWER


@pytest.mark.parametrize("token_id", [-1, 7, 1 << 40])
def test_tokens_that_do_not_exist_have_no_blocks(token_id: int) -> None:
    engine, _ = make_engine()
    assert engine.cache_report(CacheQuery(1, [*PROMPT, token_id])).blocks == []


def test_a_block_that_has_other_tokens_under_the_key_does_not_count() -> None:
    engine, _ = make_engine(num_blocks=32)
    submit(engine, "r", PROMPT, max_tokens=1)
    run_to_end(engine)
    key = keys_of(PROMPT)[2]
    parent = keys_of(PROMPT)[1]
    block = engine.scheduler.index.forget(key)
    assert block is not None
    engine.scheduler.index.insert(key, parent, [1, 1, 1, 1], block)  # as if two had one hash
    report = engine.cache_report(CacheQuery(1, PROMPT)).blocks
    assert report[2] == BlockState(key, device=False, disk=False)
    assert report[3].device


# --------------------------------------------------------------------------------- Forget


def test_what_is_forgotten_is_computed_again(tmp_path: Path) -> None:
    engine, runner = make_engine(num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    long = PROMPT * 2
    submit(engine, "r", long, max_tokens=1)
    run_to_end(engine)
    keys = keys_of(long)
    assert engine.stats().blocks_cached == 9
    # Four blocks are on disk by now, and five are noted.
    assert [disk for _, disk in states(engine, long)] == [True] * 4 + [False] * 5
    gone = [keys[1], keys[7], bytes(32)]
    assert engine.forget(gone).keys == gone
    assert engine.stats().blocks_cached == 7
    engine.scheduler.check()
    while engine.write_behind() is not None:
        pass
    left = [(i not in (1, 7),) * 2 for i in range(9)]
    assert states(engine, long) == left
    submit(engine, "again", long, max_tokens=1)
    assert run_to_end(engine)["again"] == oracle(long, 1, 1000)
    assert runner.batches[-1] == [("again", 4, 32)]
    assert [device for device, _ in states(engine, long)] == [True] * 9
    engine.close()


def test_a_block_in_use_is_freed_with_its_request_and_never_written(tmp_path: Path) -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "done", PROMPT, max_tokens=1)  # its blocks are noted to be written
    run_to_end(engine)
    submit(engine, "r", PROMPT, max_tokens=10)
    engine.step()
    keys = keys_of(PROMPT + ANSWER[:-1])
    assert engine.forget(keys).keys == keys
    before = engine.stats()
    assert before.blocks_free + before.blocks_cached == 32 - 5
    tokens = run_to_end(engine)["r"]
    assert tokens == ANSWER[-len(tokens) :]
    # Blocks that filled up later are new ones; of those from before nothing is left.
    assert engine.stats().blocks_free == 32 - engine.stats().blocks_cached
    assert [device for device, _ in states(engine, PROMPT)] == [False] * 4
    engine.close()
    written = {path.stem for path in tmp_path.glob("??/*.kv")}
    assert written <= {key.hex() for key in keys[4:]} and written


def test_a_shared_block_in_use_is_freed_with_the_last_request_that_has_it() -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=64)
    for request_id in ("a", "b"):
        submit(engine, request_id, PROMPT, max_tokens=10)
        engine.step()
    engine.forget(keys_of(PROMPT))
    submit(engine, "c", PROMPT, max_tokens=10)  # finds nothing, and files blocks of its own
    engine.step()
    assert [device for device, _ in states(engine, PROMPT)] == [True] * 4
    engine.abort(["a"])
    engine.scheduler.check()
    assert run_to_end(engine)["c"] == ANSWER[1:]
    assert [device for device, _ in states(engine, PROMPT)] == [True] * 4
    assert engine.stats().blocks_cached == len(keys_of(PROMPT + ANSWER[:-1]))


# ------------------------------------------------------------------------ the first output


def test_a_spoilt_file_is_told_to_the_request_that_met_it(tmp_path: Path) -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "r", PROMPT, max_tokens=1)
    run_to_end(engine)
    engine.close()
    name = keys_of(PROMPT)[2].hex()
    (tmp_path / name[:2] / f"{name}.kv").write_bytes(b"spoilt")
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=64, disk=disk_tier(tmp_path))
    submit(engine, "again", PROMPT, max_tokens=2)
    first, second = all_outputs(engine)
    assert (first.num_reused_tokens, first.num_disk_tokens, first.num_corrupt_blocks) == (8, 8, 1)
    assert second.num_corrupt_blocks == 0
    submit(engine, "third", PROMPT, max_tokens=1)
    assert all_outputs(engine)[0].num_corrupt_blocks == 0
    engine.close()


def test_who_waits_is_told_where_he_stands() -> None:
    now = [100.0]
    engine, _ = make_engine(num_blocks=64, max_num_seqs=1, clock=lambda: now[0])

    def positions(seconds: float) -> dict[str, int]:
        now[0] += seconds
        outputs = engine.step().outputs
        told = {o.request_id: o.queue_position for o in outputs if o.queue_position >= 0}
        assert not any(o.token_ids for o in outputs if o.request_id in told)
        return told

    for i in range(4):
        submit(engine, f"r{i}", prompt_without_end(3, 30, seed=i), max_tokens=30)
    assert positions(0) == {"r1": 0, "r2": 1, "r3": 2}
    assert positions(0.2) == {}
    engine.abort(["r1"])
    assert positions(0.04) == {}  # it has changed, but others were told a moment ago
    assert positions(0.02) == {"r2": 0, "r3": 1}
    assert positions(1.0) == {}
    engine.abort(["r0"])
    assert positions(1.0) == {"r3": 0}
    submit(engine, "r4", [1], max_tokens=1)
    assert positions(0.1) == {}
    assert positions(0.2) == {"r4": 1}


def test_a_prompt_of_several_steps_reports_its_progress() -> None:
    engine, _ = make_engine(num_blocks=32, max_num_batched_tokens=8)
    submit(engine, "r", PROMPT, max_tokens=1)
    outputs = all_outputs(engine)
    assert [o.prefill for o in outputs] == [(8, 18), (16, 18), None]
    assert [o.num_reused_tokens for o in outputs] == [0, -1, -1]
