"""Whole generations through the real engine, on random models of every family.

transformers' `generate` says which tokens are right; batches, chunks, block sizes, preemptions and
prefix hits may not change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from model.engine.engine import Engine
from model.engine.loader import load_engine
from model.engine.messages import ModelInfo, Start, Submit, TokenLogprob
from model.engine.request import SamplingParams
from model.kv import KVCache
from model.ops.reference import ReferenceOps
from tests.fixtures.tiny import FAMILIES, make_tiny
from tests.model.decoding import make_tokens, read_config

NUM_TOKENS = 64
PROMPTS = [make_tokens(n, seed=n) for n in (1, 5, 16, 17, 33, 47, 64, 90)]
WHOLE = 4096  # a budget that no prompt needs to be cut for
AMPLE, TIGHT = 8 * 256, 320  # tokens of KV cache: for all prompts at once; for two or three
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass
class Answer:
    """All that the engine gave for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_reused_tokens: int = -1
    num_disk_tokens: int = 0
    finish_reason: str | None = None
    prefill: list[int] = field(default_factory=list)  # how far the prompt was after each chunk


def load(
    folder: Path,
    *,
    block_size: int = 16,
    chunk: int = WHOLE,
    kv_tokens: int = AMPLE,
    max_num_seqs: int = 8,
    eos_token_ids: tuple[int, ...] | None = None,
    ops: str = "reference",
    disk: Path | None = None,
    tokenizer: Path | None = None,
) -> tuple[Engine, ModelInfo]:
    """An engine as the engine process makes it, with a pool of so many tokens."""
    config = read_config(folder)
    if eos_token_ids is not None:
        config = replace(config, eos_token_ids=eos_token_ids)
    block_bytes = KVCache.measure_block(config, block_size, ReferenceOps())
    return load_engine(
        Start(
            epoch=1,
            name=folder.name,
            config=config,
            weights=tuple(str(path) for path in sorted(folder.glob("*.safetensors"))),
            fingerprint=folder.name,
            tokenizer=None if tokenizer is None else str(tokenizer),
            device="cpu",
            ops=ops,
            threads=1,
            max_num_seqs=min(max_num_seqs, chunk),
            max_num_batched_tokens=chunk,
            block_size=block_size,
            kv_memory=kv_tokens // block_size * block_bytes,
            disk_folder=None if disk is None else str(disk),
            disk_bytes=1 << 30,
            check_accounting=True,
        )
    )


def run(engine: Engine, requests: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Answer]:
    """Submit all at once and step until nothing is left to do."""
    answers: dict[str, Answer] = {}
    for prompt, params in requests:
        request_id = f"request-{len(answers)}"
        answers[request_id] = Answer()
        engine.submit(Submit(request_id, list(prompt), params))
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            answer = answers[output.request_id]
            assert answer.finish_reason is None, "an output after the end"
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.prompt_logprobs += output.prompt_logprobs
            answer.finish_reason = output.finish_reason
            if output.num_reused_tokens >= 0:
                answer.num_reused_tokens = output.num_reused_tokens
                answer.num_disk_tokens = output.num_disk_tokens
            if output.prefill is not None:
                answer.prefill.append(output.prefill[0])
    return list(answers.values())


def run_one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Answer:
    return run(engine, [(prompt, params)])[0]


@dataclass
class Expected:
    """A model, and what transformers makes of PROMPTS."""

    folder: Path
    model: Any
    answers: list[list[int]]

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Row i predicts the token after token i: [len(token_ids), vocab]."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(token_ids)])).logits[0]
        return torch.log_softmax(logits.float(), -1)


@pytest.fixture(scope="module", params=FAMILIES)
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return _expected(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return _expected("llama", tmp_path_factory)


def _expected(family: str, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    from transformers import AutoModelForCausalLM

    # Wide weights: answers of many different tokens, and no two tokens nearly equal.
    folder = make_tiny(family, tmp_path_factory.mktemp(family), initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
            )
        answers.append(out[0, len(prompt) :].tolist())
    assert all(len(answer) == NUM_TOKENS for answer in answers)
    assert min(len(set(answer)) for answer in answers) > 10
    return Expected(folder, model, answers)


# ------------------------------------------------------------------------------- greedy tokens


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("chunk", [7, 64, WHOLE])
@pytest.mark.parametrize("kv_tokens", [AMPLE, TIGHT], ids=["ample", "tight"])
def test_a_ragged_batch_equals_transformers(
    expected: Expected, kv_tokens: int, chunk: int, block_size: int
) -> None:
    engine, _ = load(expected.folder, block_size=block_size, chunk=chunk, kv_tokens=kv_tokens)
    answers = run(engine, [(prompt, GREEDY) for prompt in PROMPTS])
    assert [answer.token_ids for answer in answers] == expected.answers
    assert {answer.finish_reason for answer in answers} == {"length"}
    stats = engine.stats()
    assert (stats.preemptions > 0) == (kv_tokens == TIGHT)
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    assert stats.generated_tokens == len(PROMPTS) * NUM_TOKENS


@pytest.mark.parametrize(("chunk", "block_size"), [(1, 4), (1, 32), (7, 16), (64, 4)])
def test_a_prompt_in_chunks_of_exactly_so_many_tokens(
    expected: Expected, chunk: int, block_size: int
) -> None:
    """One request at a time, so that nothing takes from a chunk's budget."""
    engine, _ = load(expected.folder, block_size=block_size, chunk=chunk, max_num_seqs=1)
    for prompt, tokens in list(zip(PROMPTS, expected.answers, strict=True))[-3:]:
        params = replace_params(GREEDY, max_tokens=16)
        answer = run_one(engine, prompt, params)
        assert answer.token_ids == tokens[:16]
        # The last chunk draws a token, so it reports no progress.
        assert answer.prefill == list(range(chunk, len(prompt), chunk))


def replace_params(params: SamplingParams, **changes: Any) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


# -------------------------------------------------------------------------------- prefix reuse


@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_a_prefix_hit_gives_the_same_tokens_as_cold(expected: Expected, block_size: int) -> None:
    engine, _ = load(expected.folder, block_size=block_size)
    prompt, tokens = PROMPTS[-1], expected.answers[-1]
    cold = run_one(engine, prompt, GREEDY)
    warm = run_one(engine, prompt, GREEDY)
    assert (cold.num_reused_tokens, warm.num_reused_tokens) == (
        0,
        (len(prompt) - 1) // block_size * block_size,
    )
    assert cold.token_ids == warm.token_ids == tokens
    # A second turn finds the first one and its answer, and another answer to the first diverges.
    second = prompt + tokens + make_tokens(10, seed=99)
    fork = prompt + tokens[:20] + make_tokens(10, seed=98)
    other, _ = load(expected.folder, block_size=block_size)
    params = replace_params(GREEDY, max_tokens=32)
    for longer, shared in ((second, len(prompt) + NUM_TOKENS - 1), (fork, len(prompt) + 20)):
        warm = run_one(engine, longer, params)
        assert warm.num_reused_tokens == shared // block_size * block_size
        cold = run_one(other, longer, params)
        assert warm.token_ids == cold.token_ids
        other, _ = load(expected.folder, block_size=block_size)


def test_equal_prompts_in_one_batch_share_their_blocks(llama: Expected) -> None:
    engine, _ = load(llama.folder)
    answers = run(engine, [(PROMPTS[-1], GREEDY)] * 8)
    assert [answer.token_ids for answer in answers] == [llama.answers[-1]] * 8
    assert sorted(answer.num_reused_tokens for answer in answers) == [0] + [80] * 7


def test_nothing_is_shared_across_salts(llama: Expected) -> None:
    engine, _ = load(llama.folder)
    for salt in (b"one owner", b"another"):
        engine.submit(Submit("r", PROMPTS[-1], GREEDY, salt=salt))
        outputs = []
        while engine.has_work:
            outputs += engine.step().outputs
        assert max(output.num_reused_tokens for output in outputs) == 0
        assert [i for output in outputs for i in output.token_ids] == llama.answers[-1]


@pytest.mark.parametrize("done", [1, 15, 16, 40, 63])
def test_a_resumed_generation_goes_on_with_the_very_next_token(llama: Expected, done: int) -> None:
    engine, _ = load(llama.folder)
    prompt, tokens = PROMPTS[3], llama.answers[3]
    engine.submit(Submit("r", prompt, GREEDY, output_token_ids=tokens[:done]))
    rest: list[int] = []
    while engine.has_work:
        for output in engine.step().outputs:
            rest += output.token_ids
    assert rest == tokens[done:]


# ------------------------------------------------------------------------------------- draws


def test_choices_differ_and_each_is_repeatable(llama: Expected) -> None:
    prompt = PROMPTS[4]
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=7)
    choices = [replace_params(params, choice_index=index) for index in range(4)]
    engine, _ = load(llama.folder)
    first = [answer.token_ids for answer in run(engine, [(prompt, one) for one in choices])]
    assert len({tuple(tokens) for tokens in first}) == 4
    again = [answer.token_ids for answer in run(engine, [(prompt, one) for one in choices])]
    assert again == first
    fresh, _ = load(llama.folder, block_size=4, chunk=7)
    assert [run_one(fresh, prompt, one).token_ids for one in choices] == first
    reseeded = [replace_params(one, seed=8) for one in choices]
    other = [answer.token_ids for answer in run(engine, [(prompt, one) for one in reseeded])]
    assert not {tuple(tokens) for tokens in other} & {tuple(tokens) for tokens in first}
    # Interrupted after any token, the rest is drawn as it would have been.
    engine.submit(Submit("r", prompt, choices[2], output_token_ids=first[2][:10]))
    rest: list[int] = []
    while engine.has_work:
        for output in engine.step().outputs:
            rest += output.token_ids
    assert rest == first[2][10:]


def test_preemptions_do_not_change_what_is_drawn(llama: Expected) -> None:
    requests = [
        (prompt, replace_params(GREEDY, temperature=1.0, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    ample, _ = load(llama.folder)
    tight, _ = load(llama.folder, kv_tokens=TIGHT)
    wanted = [answer.token_ids for answer in run(ample, requests)]
    assert [answer.token_ids for answer in run(tight, requests)] == wanted
    assert tight.stats().preemptions > 0 and ample.stats().preemptions == 0


# --------------------------------------------------------------------------------------- ends


def test_the_models_own_end_token(llama: Expected) -> None:
    prompt, tokens = PROMPTS[5], llama.answers[5]
    end = tokens[12]
    length = tokens.index(end) + 1
    engine, _ = load(llama.folder, eos_token_ids=(end,))
    stopped = run_one(engine, prompt, replace_params(GREEDY, ignore_eos=False))
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[:length], "stop")
    ignored = run_one(engine, prompt, GREEDY)
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")


def test_stop_token_ids(llama: Expected) -> None:
    prompt, tokens = PROMPTS[5], llama.answers[5]
    stops = (tokens[9], tokens[20])
    length = min(tokens.index(stop) for stop in stops) + 1
    engine, _ = load(llama.folder)
    answer = run_one(engine, prompt, replace_params(GREEDY, stop_token_ids=stops))
    assert (answer.token_ids, answer.finish_reason) == (tokens[:length], "stop")


@pytest.mark.parametrize("by", ["end token", "stop token"])
def test_min_tokens(llama: Expected, by: str) -> None:
    """Every token's first choice is to end, as soon as it may."""
    prompt, wanted = PROMPTS[5], 10
    end = next(i for i in range(512) if i not in llama.answers[5][:wanted])
    ends = (end,) if by == "end token" else ()
    engine, _ = load(llama.folder, eos_token_ids=ends)
    params = replace_params(
        GREEDY,
        ignore_eos=False,
        logit_bias={end: 100.0},
        min_tokens=wanted,
        stop_token_ids=() if ends else (end,),
    )
    answer = run_one(engine, prompt, params)
    assert answer.token_ids == [*llama.answers[5][:wanted], end]
    assert answer.finish_reason == "stop"
    at_once = run_one(engine, prompt, replace_params(params, min_tokens=0))
    assert (at_once.token_ids, at_once.finish_reason) == ([end], "stop")


def test_the_context_ends_an_answer(llama: Expected) -> None:
    engine, info = load(llama.folder)
    answer = run_one(engine, PROMPTS[-1], replace_params(GREEDY, max_tokens=10_000))
    assert len(PROMPTS[-1]) + len(answer.token_ids) == info.max_model_len == 256
    assert answer.finish_reason == "length"
    assert answer.token_ids[:NUM_TOKENS] == llama.answers[-1]


# --------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_equal_transformers(expected: Expected, temperature: float) -> None:
    """Of the raw distribution, whatever the temperature and the bias."""
    params = replace_params(
        GREEDY, temperature=temperature, top_logprobs=5, max_tokens=20, logit_bias={7: 3.0}
    )
    engine, _ = load(expected.folder)
    for prompt, answer in zip(PROMPTS, run(engine, [(p, params) for p in PROMPTS]), strict=True):
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        rows = expected.logprobs(prompt + answer.token_ids)[len(prompt) - 1 : -1]
        check_logprobs(answer.logprobs, rows)


@pytest.mark.parametrize("chunk", [7, 64, WHOLE])
def test_prompt_logprobs_over_chunks_equal_transformers(expected: Expected, chunk: int) -> None:
    params = replace_params(GREEDY, max_tokens=2, prompt_logprobs=True, top_logprobs=3)
    engine, _ = load(expected.folder, chunk=chunk)
    for _ in range(2):  # cached blocks have no logits: the prompt is computed again
        answers = run(engine, [(prompt, params) for prompt in PROMPTS])
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert [entry.token_id for entry in answer.prompt_logprobs] == prompt[1:]
            check_logprobs(answer.prompt_logprobs, expected.logprobs(prompt)[:-1])


def test_prompt_logprobs_come_once_despite_preemptions(llama: Expected) -> None:
    params = replace_params(GREEDY, prompt_logprobs=True)
    engine, _ = load(llama.folder, kv_tokens=TIGHT)
    answers = run(engine, [(prompt, params) for prompt in PROMPTS])
    assert engine.stats().preemptions > 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert [entry.token_id for entry in answer.prompt_logprobs] == prompt[1:]


def check_logprobs(entries: Sequence[TokenLogprob], rows: torch.Tensor) -> None:
    assert len(entries) == len(rows)
    for entry, row in zip(entries, rows, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        close = int((row > row[entry.token_id] + 1e-4).sum())
        assert close <= entry.rank <= int((row > row[entry.token_id] - 1e-4).sum())
        best = torch.topk(row, len(entry.top))
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=1e-4)
