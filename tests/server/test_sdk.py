"""The official OpenAI SDK against a real server: sync and async, streamed and not."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.fixtures.server import Server

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "Why do rivers bend?"},
]


@pytest.fixture
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert len(models) == 1
    assert client.models.retrieve(models[0].id).id == models[0].id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert models[0].id in caught.value.message


def test_chat_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=40, seed=7, temperature=1.0
    )
    stream = client.chat.completions.create(
        model="any",
        messages=MESSAGES,
        max_tokens=40,
        seed=7,
        temperature=1.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_the_same_seed_says_the_same_and_another_does_not(client: OpenAI) -> None:
    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="any", messages=MESSAGES, max_tokens=30, seed=seed, temperature=1.0
        )
        return answer.choices[0].message.content

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_three_choices(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=20, n=3, seed=5, temperature=1.0
    )
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage is not None and whole.usage.completion_tokens <= 60
    single = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=20, seed=5, temperature=1.0
    )
    assert single.choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    ends: list[int] = []
    for chunk in client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=20, n=3, seed=5, temperature=1.0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                ends.append(choice.index)
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_stop_strings_are_not_shown_and_both_modes_agree(client: OpenAI) -> None:
    free = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=60, temperature=0, logprobs=True
    )
    text = free.choices[0].message.content or ""
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    kept = text[: text.index(stop)]
    whole = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=60, temperature=0, stop=stop
    )
    assert whole.choices[0].message.content == kept
    assert whole.choices[0].finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="any", messages=MESSAGES, max_tokens=60, temperature=0, stop=[stop], stream=True
        )
    )
    assert streamed == kept


def test_logprobs_are_of_the_raw_distribution_and_go_with_the_text(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=5
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1 + 1e-6
    spelled = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    text = whole.choices[0].message.content or ""
    assert spelled.decode(errors="replace") == text
    hot = client.chat.completions.create(
        model="any",
        messages=MESSAGES,
        max_tokens=1,
        temperature=0,
        logprobs=True,
        logit_bias={"300": 100},
    )
    assert hot.choices[0].logprobs is not None and hot.choices[0].logprobs.content is not None
    assert hot.choices[0].logprobs.content[0].logprob < -1  # the bias is not in it
    streamed = [
        entry
        for chunk in client.chat.completions.create(
            model="any",
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
            stream=True,
        )
        for entry in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert [e.token for e in streamed] == [e.token for e in logprobs.content]


def test_a_common_prefix_is_reused_and_told(client: OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "A quite unusual question about turtles: " + "why? " * 20}
    ]
    first = client.chat.completions.create(model="any", messages=messages, max_tokens=4)
    again = client.chat.completions.create(model="any", messages=messages, max_tokens=4)
    assert first.usage is not None and again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == (again.usage.prompt_tokens - 1) // 16 * 16


def test_completions(client: OpenAI) -> None:
    whole = client.completions.create(
        model="any", prompt="The river", max_tokens=16, temperature=0, logprobs=2, echo=True
    )
    choice = whole.choices[0]
    assert choice.text.startswith("The river")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    plain = client.completions.create(model="any", prompt="The river", max_tokens=16, temperature=0)
    assert "The river" + plain.choices[0].text == choice.text
    streamed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="any", prompt="The river", max_tokens=16, temperature=0, echo=True, stream=True
        )
        if chunk.choices
    )
    assert streamed == choice.text


def test_a_prompt_is_scored_without_an_answer(client: OpenAI) -> None:
    scored = client.completions.create(
        model="any", prompt="The river bends", max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].text == "The river bends"
    assert scored.usage is not None and scored.usage.completion_tokens == 0
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == scored.usage.prompt_tokens


def test_several_prompts_as_text_and_as_ids(client: OpenAI) -> None:
    texts = ["The river", "Sarah fed the cat", "def add"]
    by_text = client.completions.create(model="any", prompt=texts, max_tokens=8, temperature=0, n=2)
    assert [choice.index for choice in by_text.choices] == list(range(6))
    singles = [
        client.completions.create(model="any", prompt=text, max_tokens=8, temperature=0)
        for text in texts
    ]
    for i, single in enumerate(singles):
        assert by_text.choices[2 * i].text == single.choices[0].text
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == sum(s.usage.prompt_tokens for s in singles if s.usage)


async def _async_answers(url: str) -> tuple[list[str], list[str]]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

        async def whole(seed: int) -> str:
            answer = await client.chat.completions.create(
                model="any", messages=MESSAGES, max_tokens=24, seed=seed, temperature=1.0
            )
            return answer.choices[0].message.content or ""

        async def streamed(seed: int) -> str:
            stream = await client.chat.completions.create(
                model="any",
                messages=MESSAGES,
                max_tokens=24,
                seed=seed,
                temperature=1.0,
                stream=True,
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        seeds = range(8)
        return (
            list(await asyncio.gather(*map(whole, seeds))),
            list(await asyncio.gather(*map(streamed, seeds))),
        )


def test_async_and_concurrent(tiny_server: Server) -> None:
    whole, streamed = asyncio.run(_async_answers(tiny_server.url))
    assert whole == streamed
    assert len(set(whole)) == 8


def test_errors_are_the_sdks_own_classes(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "word " * 2000}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="any",
            messages=MESSAGES,
            functions=[{"name": "f", "parameters": {}}],
        )
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param == "functions"


def test_langchain_says_what_the_sdk_says(tiny_server: Server, client: OpenAI) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        from langchain_openai import ChatOpenAI
        from pydantic import SecretStr

        model = ChatOpenAI(
            model="any",
            base_url=f"{tiny_server.url}/v1",
            api_key=SecretStr("any"),
            temperature=1.0,
            seed=7,
            max_retries=0,
            max_completion_tokens=24,
            stream_usage=True,
        )
        asked = [("system", "You answer briefly."), ("user", "Why do rivers bend?")]
        whole = model.invoke(asked)
        chunks = list(model.stream(asked))
        both = model.batch([asked, asked])
    told = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=24, seed=7, temperature=1.0
    )
    assert told.usage is not None and whole.usage_metadata is not None
    assert whole.content == told.choices[0].message.content
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert [answer.content for answer in both] == [whole.content] * 2
    assert whole.usage_metadata["output_tokens"] == told.usage.completion_tokens
    counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [count["total_tokens"] for count in counted] == [told.usage.total_tokens]
