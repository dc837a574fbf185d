"""The default model, whole: its tokens, its server, its chat template."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from benchmarks.generate import transformers_model
from model import hub
from model.engine.engine import Engine
from model.engine.loader import load_engine
from model.engine.messages import Start, Submit
from model.engine.request import SamplingParams
from server.text.chat_template import ChatTemplate, encode_chat
from server.text.tokenizer import Tokenizer
from tests.fixtures.server import Server

pytestmark = pytest.mark.e2e

NUM_TOKENS = 64
# Raw texts and questions, of 1 to about 400 tokens, in the languages and scripts people use.
TEXTS = [
    "The",
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    '{"name": "Ada", "born": 1815, "fields": [',
    "| river | length |\n|---|---|\n| Nile |",
    "La rivière traverse la ville et",
    "Der Fluss biegt sich, weil",
    "日本語の文章を",
    "😀 😃 😄",
    "Q: What is the boiling point of water at sea level?\nA:",
    "   leading spaces and\ttabs\n\n\n",
    "The river bends because the water is faster outside than inside. " * 30,
]
QUESTIONS = [
    "Why do rivers bend?",
    "Write a haiku about gardens.",
    "What is 17 * 23?",
    "Name three prime numbers, and say why they are prime.",
    "Summarise in one sentence: " + "The cat sat on the mat and looked at the rain. " * 20,
]


@pytest.fixture(scope="module")
def files() -> hub.ModelFiles:
    return hub.resolve("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(files: hub.ModelFiles) -> Tokenizer:
    return Tokenizer.load(files.folder)


@pytest.fixture(scope="module")
def template(files: hub.ModelFiles, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.for_tokenizer(files.chat_template, tokenizer)


@pytest.fixture(scope="module")
def model(files: hub.ModelFiles) -> Any:
    """transformers' model of the same file, dequantised to fp32."""
    return transformers_model(files.weights[0])


@pytest.fixture(scope="module")
def engine(files: hub.ModelFiles) -> Engine:
    engine, _ = load_engine(
        Start(
            epoch=1,
            name=files.name,
            config=files.config,
            weights=tuple(str(path) for path in files.weights),
            fingerprint=files.fingerprint,
            device="cpu",
            ops="reference",
            check_accounting=True,
        )
    )
    return engine


@pytest.mark.timeout(300)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_transformers(
    engine: Engine, model: Any, tokenizer: Tokenizer, template: ChatTemplate, every: int
) -> None:
    """Prompts in one ragged batch, against the same file dequantised to fp32."""
    prompts = twenty_prompts(tokenizer, template)[every - 1 :: every]  # the longest is among them
    ours = generate(engine, prompts)
    for index, (prompt, tokens) in enumerate(zip(prompts, ours, strict=True)):
        # Token by token, `generate` takes the highest logit after the tokens before it.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens, f"prompt {index}"


def test_the_comparison_is_with_what_generate_gives(
    engine: Engine, model: Any, tokenizer: Tokenizer
) -> None:
    """With transformers' own KV cache and loop, for one prompt."""
    prompt = tokenizer.encode(TEXTS[1])
    assert generate(engine, [prompt]) == [transformers_generate(model, prompt)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_prompts_equal_what_generate_gives(
    engine: Engine, model: Any, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    prompts = twenty_prompts(tokenizer, template)
    assert generate(engine, prompts) == [transformers_generate(model, p) for p in prompts]


def transformers_generate(model: Any, prompt: list[int]) -> list[int]:
    """NUM_TOKENS greedy tokens by transformers' own loop and KV cache."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def twenty_prompts(tokenizer: Tokenizer, template: ChatTemplate) -> list[list[int]]:
    prompts = [tokenizer.encode(text) for text in TEXTS]
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        prompts.append(encode_chat(tokenizer, template, [message]))
    return prompts


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """NUM_TOKENS greedy tokens for each prompt, all prompts in the engine at once."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        answers[str(index)] = []
        engine.submit(Submit(str(index), prompt, params))
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            answers[output.request_id] += output.token_ids
    assert all(len(tokens) == NUM_TOKENS for tokens in answers.values())
    return list(answers.values())


# ----------------------------------------------------------------------------------- its server


def data_frames(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line and not line.startswith(":"):
            assert line.startswith("data: "), line
            yield line.removeprefix("data: ")


def test_the_email_to_sarah(default_server: Server) -> None:
    body = {
        "messages": [
            {
                "role": "user",
                "content": "Write a very long email apologizing to Sarah for the tragic gardening "
                "mishap. Explain how it happened.",
            }
        ],
        "stream": True,
        "seed": 1,
        "temperature": 0.2,
        "max_tokens": 160,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    first = 0.0
    frames: list[str] = []
    with httpx.stream(
        "POST", f"{default_server.url}/v1/chat/completions", json=body, timeout=60
    ) as response:
        assert response.status_code == 200
        for frame in data_frames(response):
            frames.append(frame)
            if not first and '"content":""' not in frame.replace(" ", ""):
                first = time.monotonic() - started
    assert 0 < first < 2.0
    assert frames.pop() == "[DONE]"
    chunks = [json.loads(frame) for frame in frames]
    usage = chunks.pop()["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
    assert len(texts) > 100
    assert usage["completion_tokens"] <= 1.2 * len(texts) + 2
    assert max(map(len, texts)) < 80, "a chunk holds more than a few tokens"
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert reasons in (["stop"], ["length"])
    text = "".join(texts)
    assert re.match(r"\W*(Subject|Dear|Hi|Hello)\b", text), text
    assert "Sarah" in text[:300]
    assert "garden" in text.lower()


def test_an_answer_ends_by_itself(default_server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 200,
    }
    answer = httpx.post(f"{default_server.url}/v1/chat/completions", json=body, timeout=60).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "hello" in choice["message"]["content"].lower()
    assert "<|im_end|>" not in choice["message"]["content"]


# ------------------------------------------------------------------------------ its chat template

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one question": [{"role": "user", "content": "Why do rivers bend?"}],
    "several turns": [
        {"role": "user", "content": "Hi, I am Ada."},
        {"role": "assistant", "content": "Hello Ada! How can I help?"},
        {"role": "user", "content": "What is my name?\n\n7 days, 1815."},
    ],
    "a system prompt": [
        {"role": "system", "content": "You speak like a pirate."},
        {"role": "user", "content": "  naïve café 日本語 😀\tx = [1, 2]\n"},
    ],
    "empty": [{"role": "user", "content": ""}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_has_the_ids_of_apply_chat_template(
    files: hub.ModelFiles,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    name: str,
    add_generation_prompt: bool,
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(files.folder)
    expected = theirs.apply_chat_template(
        CONVERSATIONS[name],
        chat_template=files.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    ours = encode_chat(
        tokenizer,
        template,
        CONVERSATIONS[name],
        add_generation_prompt=add_generation_prompt,
    )
    assert ours == expected
    assert len(ours) > 20


def test_the_server_counts_the_same_ids(default_server: Server, files: hub.ModelFiles) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(files.folder)
    messages = CONVERSATIONS["several turns"]
    said = httpx.post(f"{default_server.url}/tokenize", json={"messages": messages}).json()
    assert said["tokens"] == theirs.apply_chat_template(
        messages,
        chat_template=files.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
