"""What is appended to a session's tokens, and when they have to be made anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level_metadata, from_metadata

from server.store.records import TurnRecord
from server.text.appended_text import MAX_SPLIT_MESSAGES, message_of
from server.text.chat_template import CHATML, PLAIN, ChatTemplate, TemplateError, encode_chat
from server.text.history import (
    Extension,
    drop_oldest,
    dropped_turns,
    extend,
    path_token_ids,
)
from server.text.tokenizer import Tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|head|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]"
    "{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% if m.role != 'system' and loop.previtem is defined and loop.previtem.role == m.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# As Qwen3 does: thoughts are kept only in what comes after the last question, and the last answer
# gets empty ones.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > ns.last and loop.last %}<think>\n"
    "{{ parts[0].replace('<think>', '').strip('\n') if parts | length > 1 else '' }}"
    "\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends an answer only when something follows it.
LATE_END = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = [
    *("<|begin|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|start|>", "<|head|>", "<|eot|>", "<|other_end|>", "</s>"),
]
KEEPING = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "plain": PLAIN}
KEEPING |= {"phi3": PHI3, "late": LATE_END}
END = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "mistral": "</s>", "plain": "</s>"}
END |= {"phi3": "<|end|>", "late": "<|im_end|>", "qwen3": "<|im_end|>"}


def make_tokenizer(end: str) -> Tokenizer:
    """Byte-level, with the control tokens of several families; `end` and another one end a turn.
    Phi-3 has one to end a turn and another, its eos_token, to end a text."""
    metadata = byte_level_metadata()
    old = metadata["tokenizer.ggml.tokens"]
    tokens = [*SPECIAL, *(token for token in old if token not in SPECIAL)]
    types = [3] * len(SPECIAL) + [4 if token == "<tool>" else 1 for token in tokens[len(SPECIAL) :]]
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = types
    eos, other = ("</s>", end) if end == "<|end|>" else (end, "<|other_end|>")
    metadata["tokenizer.ggml.eos_token_id"] = tokens.index(eos)
    metadata["tokenizer.ggml.eot_token_id"] = tokens.index(other)
    return from_metadata(metadata)


TOKENIZERS = {end: make_tokenizer(end) for end in set(END.values())}


class Talk:
    """A session's path that grows as the server would let it grow."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, instructions: str | None = None, model: str = "m"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate.for_tokenizer(source, tokenizer)
        self.instructions = instructions
        self.model = model
        self.path: list[TurnRecord] = []

    def extend(self, *messages: tuple[str, str], answer: bool = True, **more: Any) -> Extension:
        ready = [{"role": role, "content": content} for role, content in messages]
        before = path_token_ids(self.path)
        added = extend(
            self.tokenizer,
            self.template,
            self.path,
            ready,
            instructions=self.instructions,
            fingerprint=self.model,
            answer=answer,
            **more,
        )
        assert added.replaces_history or added.history[: len(before)] == before
        assert added.prompt_token_ids[: len(added.history)] == added.history
        assert len(added.turns) == len(messages)
        return added

    def add(self, role: str, content: str, prompt: list[int], own: list[int], **more: Any) -> None:
        parent = self.path[-1].id if self.path else None
        turn = TurnRecord(
            id=f"turn_{len(self.path)}",
            session="sess_1",
            parent=parent,
            role=role,
            content=[{"type": "text", "text": content}],
            prompt_token_ids=prompt,
            token_ids=own,
            tokenizer=self.model,
            created_at=0.0,
            **more,
        )
        self.path.append(turn)

    def post(self, *messages: tuple[str, str], answer: bool = False, **more: Any) -> Extension:
        added = self.extend(*messages, answer=answer, **more)
        for index, ((role, content), (prompt, own)) in enumerate(
            zip(messages, added.turns, strict=True)
        ):
            first = index == 0 and added.replaces_history
            notes = {"dropped": added.dropped} if first else {}
            self.add(role, content, prompt, own, replaces_history=first, notes=notes)
        if not answer:
            assert path_token_ids(self.path) == added.prompt_token_ids
        return added

    def answer(self, added: Extension, text: str, end: str | None = None, **more: Any) -> list[int]:
        """An answer sampled after `added`, in the tokenizer's own spelling; "" is no end token."""
        own = self.tokenizer.encode(text, special=False)
        if end is None:
            end = "<|end|>" if self.template.source == PHI3 else self.tokenizer.eos_token
        own += [self.tokenizer.vocab[end]] if end else []
        first = not added.turns and added.replaces_history
        said = text.removeprefix(" ") if self.leads else text
        reason = {"finish_reason": "stop" if end else "length", "generation": "gen_1", **more}
        prompt = added.generation_prompt
        self.add("assistant", said, prompt, own, replaces_history=first, **reason)
        assert path_token_ids(self.path) == added.prompt_token_ids + own
        return own

    @property
    def leads(self) -> bool:
        """Whether the template puts a space in front of an answer, which the model says itself."""
        return self.template.source in (MISTRAL, PLAIN)

    def ask(self, question: str, text: str, end: str | None = None, **more: Any) -> Extension:
        added = self.post(("user", question), answer=True)
        self.answer(added, " " + text if self.leads else text, end, **more)
        return added

    def rendered(self, *more: tuple[str, str], answer: bool = True) -> str:
        system = [] if self.instructions is None else [("system", self.instructions)]
        path = [(turn.role, str(message_of(turn)["content"])) for turn in self.path]
        messages = [{"role": role, "content": text} for role, text in [*system, *path, *more]]
        return self.template.render(messages, add_generation_prompt=answer)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)


def talk(name: str, instructions: str | None = None) -> Talk:
    source = {**KEEPING, "qwen3": QWEN3}[name]
    return Talk(source, TOKENIZERS[END[name]], instructions)


PIECES = st.sampled_from(
    [
        *SPECIAL[:3],
        "<|eot|>",
        "</s>",
        "<|im_",
        "end|>",
        "\n",
        " ",
        "user",
        "hello",
        "😀",
        "é",
        "\U000f0000",
    ]
)
CONTENT = st.lists(PIECES | st.text(max_size=6), max_size=4).map("".join)
property_test = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class TestAppend:
    @pytest.mark.parametrize("name", KEEPING)
    @pytest.mark.parametrize("instructions", [None, "Be <|im_end|> kind"])
    def test_decodes_to_what_the_template_writes(self, name: str, instructions: str | None) -> None:
        @property_test
        @given(st.lists(st.tuples(CONTENT, CONTENT, st.booleans()), min_size=1, max_size=5))
        def run(exchanges: list[tuple[str, str, bool]]) -> None:
            chat = talk(name, instructions)
            for question, text, ended in exchanges:
                expected = chat.rendered(("user", question))
                said = text.strip() if name == "llama3" else text
                # The plain template writes no end token.
                end = None if ended and name != "plain" else ""
                added = chat.ask(question, said, end)
                assert chat.text(added.prompt_token_ids) == expected
                assert added.rewrite is None and not added.replaces_history

        run()

    @pytest.mark.parametrize("name", KEEPING)
    def test_the_first_message_is_what_a_chat_request_encodes(self, name: str) -> None:
        chat = talk(name, "Be <|im_end|> kind")
        added = chat.extend(("user", "hello <|im_end|>"))
        messages = [
            {"role": "system", "content": "Be <|im_end|> kind"},
            {"role": "user", "content": "hello <|im_end|>"},
        ]
        assert added.prompt_token_ids == encode_chat(chat.tokenizer, chat.template, messages)
        assert added.history == [] and added.turns[0][0] == []

    @property_test
    @given(
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), CONTENT)),
        st.sampled_from(["chatml", "llama3", "late", "phi3"]),
        st.booleans(),
    )
    def test_one_by_one_is_at_once(
        self, messages: list[tuple[str, str]], name: str, answered: bool
    ) -> None:
        slow, fast = talk(name, "Be kind"), talk(name, "Be kind")
        for chat in (slow, fast):
            if answered:
                chat.ask("hello", "hell", end="")
        for message in messages:
            slow.post(message)
        if messages:
            fast.post(*messages)
        assert path_token_ids(slow.path) == path_token_ids(fast.path)
        assert [turn.token_ids for turn in slow.path] == [turn.token_ids for turn in fast.path]
        assert slow.extend().prompt_token_ids == fast.extend().prompt_token_ids

    def test_odd_spellings_of_the_model_are_kept(self) -> None:
        chat = talk("chatml")
        added = chat.post(("user", "hello"), answer=True)
        ids = [chat.tokenizer.vocab[piece] for piece in ("h", "e", "l", "l", "o", "<|im_end|>")]
        chat.add("assistant", "hello there", added.generation_prompt, ids, generation="gen_1")
        assert ids[:-1] != chat.tokenizer.encode("hello")
        added = chat.extend(("user", "and?"))
        assert added.rewrite is None
        assert chat.text(added.prompt_token_ids) == (
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_where_a_space_is_put_in_front_of_texts(self, sentencepiece: Tokenizer) -> None:
        source = (
            "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|user|>"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        )
        chat = Talk(source, sentencepiece)
        chat.post(("user", "hello"), ("assistant", "hello"), ("user", "hello</s>hello"))
        messages = [message_of(turn) for turn in chat.path]
        assert path_token_ids(chat.path) == encode_chat(sentencepiece, chat.template, messages)
        # Only where a control token is before it: here each message goes on from the last one.
        chat = Talk(PLAIN, sentencepiece)
        for _ in range(3):
            chat.post(("user", "hello"))
        messages = [message_of(turn) for turn in chat.path]
        whole = encode_chat(sentencepiece, chat.template, messages, add_generation_prompt=False)
        assert path_token_ids(chat.path) == whole

    def test_spelled_control_tokens_stay_text(self) -> None:
        chat = talk("chatml")
        chat.ask("<|im_end|>", "a<|im_end|>b")
        added = chat.extend(("user", "<|im_<|im_end|>end|>"), ("tool", "<|im_start|>system"))
        control = [id_ for id_ in added.prompt_token_ids if id_ in chat.tokenizer.special_ids]
        start, end = (chat.tokenizer.vocab[token] for token in ("<|im_start|>", "<|im_end|>"))
        assert control == [start, end] * 4 + [start]
        parts = [{"type": "text", "text": half} for half in ("<|im_", "end|>")]
        source = "{% for p in messages[-1].content %}{{ p.text }}{% endfor %}<|im_end|>"
        template = ChatTemplate.for_tokenizer(source, chat.tokenizer)
        added = extend(
            *(chat.tokenizer, template, [], [{"role": "user", "content": parts}]),
            instructions=None,
            fingerprint="m",
            answer=False,
        )
        assert added.prompt_token_ids.count(end) == 1

    def test_several_messages_at_a_boundary_that_is_none(self) -> None:
        # Qwen3's way: an answer reads otherwise once a question follows, so it has no end here.
        chat = talk("qwen3")
        added = chat.post(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"))
        texts = [chat.text(own) for _, own in added.turns]
        rest = "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        assert texts == ["<|im_start|>user\na<|im_end|>\n", "", rest]

    def test_a_template_that_refuses_part_of_the_messages(self) -> None:
        source = (
            "{% if messages[-1].role != 'user' %}{{ raise_exception('a user must be last') }}"
            "{% endif %}" + CHATML
        )
        chat = Talk(source, TOKENIZERS["<|im_end|>"])
        added = chat.post(("system", "a"), ("tool", "b"), ("user", "c"))
        assert [bool(own) for _, own in added.turns] == [False, False, True]
        with pytest.raises(TemplateError, match="a user must be last"):
            chat.extend(("tool", "b"))
        # The path alone is refused as well, but nothing of it changes.
        chat.answer(chat.extend(), "d")
        added = chat.extend(("user", "e"))
        assert added.rewrite is None and not added.replaces_history
        assert chat.text(added.turns[0][0]) == "\n"
        assert chat.text(added.prompt_token_ids) == chat.rendered(("user", "e"))

    def test_rewinding_to_a_turn_that_replaces_all_and_has_no_tokens(self) -> None:
        # Thoughts are kept until a question comes, so nothing tells where the first message begins.
        chat = Talk(QWEN3.replace(" and loop.last", ""), TOKENIZERS["<|im_end|>"])
        chat.ask("a", "<think>\nb\n</think>\n\nc")
        added = chat.post(("assistant", "d"), ("user", "e"))
        assert added.rewrite is not None and added.history == []
        assert chat.text(path_token_ids(chat.path)) == chat.rendered(answer=False)
        del chat.path[-1]
        assert chat.path[-1].replaces_history and not path_token_ids(chat.path)
        added = chat.extend(("tool", "f"))
        assert chat.text(added.prompt_token_ids) == chat.rendered(("tool", "f"))

    def test_rewinding_into_messages_without_tokens(self) -> None:
        chat = talk("qwen3")
        chat.post(("user", "a"), ("assistant", "c"), ("user", "d"))
        del chat.path[2:]
        assert path_token_ids(chat.path) == chat.path[0].token_ids and not chat.path[1].token_ids
        added = chat.extend(("user", "e"))
        assert chat.text(added.prompt_token_ids) == chat.rendered(("user", "e"))
        assert added.rewrite is None
        assert chat.text(added.turns[0][1]).endswith("c<|im_end|>\n<|im_start|>user\ne<|im_end|>\n")
        # Where the boundary is known, what was missing is in front of the new turn.
        chat = talk("chatml")
        chat.post(*(("user", str(index)) for index in range(MAX_SPLIT_MESSAGES + 1)))
        del chat.path[3:]
        added = chat.extend(("user", "e"))
        assert chat.text(added.history) == chat.rendered(answer=False)
        assert added.turns[0][0] == added.history and added.rewrite is None
        assert chat.text(added.turns[0][1]) == "<|im_start|>user\ne<|im_end|>\n"

    def test_very_many_messages_are_not_rendered_one_by_one(self) -> None:
        chat = talk("chatml")
        messages = [("user", str(index)) for index in range(MAX_SPLIT_MESSAGES + 1)]
        added = chat.post(*messages)
        assert [bool(own) for _, own in added.turns] == [False] * MAX_SPLIT_MESSAGES + [True]
        assert chat.text(added.prompt_token_ids) == chat.rendered(answer=False)

    def test_what_is_no_path_or_no_message(self) -> None:
        chat = talk("mistral")
        with pytest.raises(ValueError, match="nothing is to be appended"):
            chat.extend(answer=False)
        chat.ask("a", "b")
        with pytest.raises(TemplateError, match="roles must alternate"):
            chat.extend(("assistant", "c"))
        with pytest.raises(TemplateError, match=r"the role '<\|x\|>' is not known"):
            chat.extend(("<|x|>", "c"))
        chat.path[1].content = [{"type": "image", "url": "x"}]
        with pytest.raises(TemplateError, match="an item of type 'image'"):
            chat.extend(("user", "c"))
        del chat.path[0]
        with pytest.raises(ValueError, match="must start at the session's root"):
            chat.extend(("user", "c"))


class TestClosing:
    @pytest.mark.parametrize(
        ("name", "end", "closing"),
        [
            ("chatml", "<|im_end|>", "\n"),
            ("chatml", "<|other_end|>", "\n"),
            ("chatml", "", "<|im_end|>\n"),
            ("llama3", "<|eot|>", ""),
            ("llama3", "<|other_end|>", ""),
            ("llama3", "", "<|eot|>"),
            ("phi3", "<|end|>", "\n"),
            ("phi3", "</s>", "\n"),
            ("phi3", "", "<|end|>\n"),
            ("mistral", "</s>", ""),
            ("mistral", "", "</s>"),
            ("plain", "</s>", "\n"),
            ("plain", "", "\n"),
        ],
    )
    @pytest.mark.parametrize("text", ["hello", "", "hello\n", "  "])
    def test_the_last_answer(self, name: str, end: str, closing: str, text: str) -> None:
        chat = talk(name)
        chat.ask("hello", text, end)
        before = path_token_ids(chat.path)
        added = chat.extend(("user", "user"))
        assert chat.text(added.turns[0][0]) == closing
        assert added.history == before + added.turns[0][0]
        assert added.rewrite is None
        if name == "phi3":  # whose rendering without an answer has an end that nothing follows
            return
        own = chat.text(added.turns[0][1])
        assert (
            own == chat.rendered(("user", "user"), answer=False)[len(chat.rendered(answer=False)) :]
        )

    @pytest.mark.parametrize("end", ["<|im_end|>", "<|other_end|>", ""])
    def test_an_end_that_comes_only_when_something_follows(self, end: str) -> None:
        chat = talk("late")
        chat.ask("a", "b", end)
        added = chat.extend(("user", "c"))
        assert chat.text(added.prompt_token_ids) == (
            f"<|start|>user\na<|im_end|><|start|>assistant\nb{end or '<|im_end|>'}"
            "<|start|>user\nc<|im_end|><|start|>assistant\n"
        )

    def test_an_answer_of_nothing(self) -> None:
        chat = talk("chatml")
        chat.ask("a", "", "", status="interrupted", finish_reason=None)
        assert chat.path[-1].token_ids == []
        added = chat.extend(("user", "b"))
        assert chat.text(added.prompt_token_ids) == chat.rendered(("user", "b"))
        chat = talk("mistral")  # where even the prompt of the answer has no tokens
        added = chat.post(("user", "a"), answer=True)
        chat.add("assistant", "", added.generation_prompt, [], status="interrupted")
        added = chat.extend(("user", "b"))
        assert chat.text(added.prompt_token_ids) == chat.rendered(("user", "b"))

    def test_an_answer_that_samples_the_whole_closing(self) -> None:
        chat = talk("chatml")
        chat.ask("a", "b", "<|im_end|>")
        chat.path[-1].token_ids += chat.tokenizer.encode("\n")
        assert chat.extend(("user", "c")).turns[0][0] == []

    def test_an_appended_answer_is_whole(self) -> None:
        for name in KEEPING:
            chat = talk(name)
            chat.post(("user", "a"), ("assistant", "b\n"))
            added = chat.extend(("user", "c"))
            assert chat.text(added.prompt_token_ids) == chat.rendered(("user", "c")), name
            assert name == "late" or added.turns[0][0] == []

    def test_an_answer_after_an_answer(self) -> None:
        chat = talk("chatml")
        chat.answer(chat.extend(), "a", "")
        chat.answer(chat.extend(), "b")
        assert chat.text(path_token_ids(chat.path)) == (
            "<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
        )

    def test_another_answer_to_the_same_question(self) -> None:
        chat = talk("chatml")
        first = chat.ask("a", "b")
        del chat.path[1:]
        again = chat.extend()
        assert again.prompt_token_ids == first.prompt_token_ids
        assert again.generation_prompt == first.generation_prompt and again.turns == []


class TestRewrite:
    def test_thoughts_that_go(self) -> None:
        chat = talk("qwen3", "Be kind")
        chat.ask("hello", "<think>\nhm\n</think>\n\nyes")
        stored = path_token_ids(chat.path)
        added = chat.post(("user", "more"), answer=True)
        assert added.replaces_history and added.rewrite is not None
        assert added.rewrite.reason == "template"
        same = stored[: added.rewrite.token]
        assert added.prompt_token_ids[: added.rewrite.token] == same
        assert chat.text(same).endswith("<|im_start|>assistant\n")
        assert added.rewrite.before == "<think>\nhm\n</think>\n\nyes<|im_end|>"
        assert added.rewrite.after == "yes<|im_end|>\n<|im_start|>user\nmore<|im_end|>"[:40]
        assert chat.text(added.turns[0][0]).endswith("assistant\nyes<|im_end|>\n")
        assert added.history == added.turns[0][0]
        assert chat.text(added.turns[0][1]) == "<|im_start|>user\nmore<|im_end|>\n"
        assert chat.text(added.prompt_token_ids) == chat.rendered()
        # And again: only the newest answer changes, what was rewritten stays.
        chat.answer(added, "<think>\nho\n</think>\n\nno")
        stored = path_token_ids(chat.path)
        assert stored[: len(added.prompt_token_ids)] == added.prompt_token_ids
        again = chat.extend(("user", "why"))
        assert again.rewrite is not None
        assert again.rewrite.token == len(added.prompt_token_ids)
        assert again.rewrite.before.startswith("<think>\nho")
        assert chat.text(again.prompt_token_ids) == chat.rendered(("user", "why"))

    def test_thoughts_that_never_were(self) -> None:
        chat = talk("qwen3")
        first = chat.post(("user", "hello"), answer=True)
        # In a spelling of the model's own, which rendering anew would lose.
        ids = [chat.tokenizer.vocab[piece] for piece in ("h", "e", "l", "l", "o", "<|im_end|>")]
        chat.add("assistant", "hello", first.generation_prompt, ids, generation="gen_1")
        assert ids[:-1] != chat.tokenizer.encode("hello")
        added = chat.post(("user", "more"), answer=True)
        assert added.rewrite is None and not added.replaces_history
        assert chat.text(added.turns[0][0]) == "\n"
        assert chat.text(added.prompt_token_ids) == chat.rendered()

    @property_test
    @given(st.lists(st.tuples(CONTENT, CONTENT, CONTENT), min_size=1, max_size=4))
    def test_random_thoughts(self, exchanges: list[tuple[str, str, str]]) -> None:
        chat = talk("qwen3")
        for question, thought, text in exchanges:
            stored = path_token_ids(chat.path)
            added = chat.post(("user", question), answer=True)
            assert chat.text(added.prompt_token_ids) == chat.rendered()
            new = added.prompt_token_ids
            if added.rewrite is None:
                assert new[: len(stored)] == stored
            else:
                token = added.rewrite.token
                assert new[:token] == stored[:token] and new[token] != stored[token]
                for excerpt, ids in ((added.rewrite.before, stored), (added.rewrite.after, new)):
                    assert excerpt == chat.text(ids[token:])[:40] or "\ufffd" in excerpt
            chat.answer(added, f"<think>{thought}</think>{text}")

    def test_a_system_turn_that_is_moved(self) -> None:
        source = (
            "{% for m in messages if m.role == 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}<|im_end|>"
            "{% endfor %}"
        )
        chat = Talk(source, TOKENIZERS["<|im_end|>"], "first")
        chat.ask("a", "b")
        added = chat.post(("system", "second"))
        assert added.rewrite is not None and added.rewrite.reason == "template"
        assert chat.text(added.prompt_token_ids) == chat.rendered(answer=False)
        assert added.rewrite.before.startswith("<|user|>a")
        assert added.rewrite.after.startswith("second<|im_end|><|user|>a")
        assert added.replaces_history and chat.extend(("user", "c")).rewrite is None

    def test_another_model(self) -> None:
        chat = talk("chatml", "Be kind")
        chat.ask("hello", "hell")
        chat.model, chat.tokenizer = "other", TOKENIZERS["<|eot|>"]
        chat.template = ChatTemplate.for_tokenizer(LLAMA3, chat.tokenizer)
        added = chat.post(("user", "more"), answer=True)
        assert added.replaces_history and added.rewrite is not None
        assert (added.rewrite.reason, added.rewrite.token) == ("model", 0)
        assert added.rewrite.before == "hello\nhell"
        assert added.rewrite.after == chat.rendered()[:40]
        assert chat.text(added.prompt_token_ids) == chat.rendered()
        assert chat.text(added.turns[0][1]) == "<|start|>user<|head|>\n\nmore<|eot|>"
        chat.answer(added, "yes")
        # The old model's turns count no more.
        assert chat.extend(("user", "b")).rewrite is None
        # An answer alone replaces everything by itself.
        del chat.path[2:]
        added = chat.extend()
        assert added.generation_prompt == added.prompt_token_ids and added.replaces_history

    def test_generation_prompt_that_ends_otherwise(self) -> None:
        # Phi-3 writes its end of text only where no answer is asked for.
        chat = talk("phi3")
        chat.post(("user", "a"))
        assert chat.text(path_token_ids(chat.path)) == "<|user|>\na<|end|>\n"
        chat.answer(chat.extend(), "b")
        added = chat.post(("user", "c"), answer=True)
        assert chat.text(added.prompt_token_ids) == chat.rendered()
        assert chat.text(added.prompt_token_ids) == (
            "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"
        )
        assert added.rewrite is None


class TestDropOldest:
    def grown(self, num_exchanges: int = 10) -> Talk:
        chat = talk("chatml", "Be kind")
        for index in range(num_exchanges):
            chat.ask(f"question {index}", f"answer {index}")
        return chat

    def test_down_to_half_the_window(self) -> None:
        chat = self.grown()
        size = len(path_token_ids(chat.path))
        assert drop_oldest(chat.path, 50, size + 50) == 0
        window = size + 49
        num_dropped = drop_oldest(chat.path, 50, window)
        assert chat.path[num_dropped].role == "user"
        added = chat.post(("user", "more"), answer=True, dropped=num_dropped)
        assert len(added.history) <= window // 2 + len(chat.tokenizer.encode("system\nBe kind")) + 4
        kept = Talk(CHATML, chat.tokenizer, "Be kind")
        kept.path = [dataclasses.replace(turn) for turn in chat.path[num_dropped:]]
        assert chat.text(added.prompt_token_ids) == kept.rendered()
        assert added.replaces_history and added.dropped == num_dropped == dropped_turns(chat.path)
        assert added.rewrite is not None and added.rewrite.reason == "dropped"
        assert added.rewrite.before.startswith("0<|im_end|>")
        assert added.rewrite.after.startswith(f"{num_dropped // 2}<|im_end|>")
        # What was dropped stays so, and the beginning of the prompt stays put for a while.
        chat.answer(added, "yes")
        assert drop_oldest(chat.path, 50, window) == num_dropped
        again = chat.post(("user", "b"), answer=True)
        assert (again.rewrite, again.dropped) == (None, num_dropped)
        chat.answer(again, "no")
        chat.model = "other"
        added = chat.post(("user", "c"), answer=True)
        assert "question 0" not in chat.text(added.prompt_token_ids)
        assert dropped_turns(chat.path) == num_dropped

    @property_test
    @given(st.integers(0, 400), st.integers(1, 800), st.integers(0, 3))
    def test_what_is_kept(self, needed: int, window: int, num_users: int) -> None:
        chat = self.grown(6)
        for index in range(num_users):
            chat.post(("user", f"user {index}"))
        size = len(path_token_ids(chat.path))
        num_dropped = drop_oldest(chat.path, needed, window)
        kept = chat.path[num_dropped:]
        left = sum(len(turn.prompt_token_ids) + len(turn.token_ids) for turn in kept)
        if size + needed <= window:
            assert num_dropped == 0
            return
        assert num_dropped > 0 and (not kept or kept[0].role == "user")
        assert not kept or (left <= window // 2 and left + needed <= window)
        # No more than that: the next larger part would not do.
        users = [index for index in range(1, num_dropped) if chat.path[index].role == "user"]
        if users:
            left = sum(
                len(turn.prompt_token_ids) + len(turn.token_ids) for turn in chat.path[users[-1] :]
            )
            assert left > window // 2 or left + needed > window

    def test_turns_that_were_rendered_anew_count_as_they_are_now(self) -> None:
        chat = talk("qwen3")
        for index in range(8):
            chat.ask(f"question {index}", f"<think>{'x' * 200}</think>answer {index}")
        chat.ask("last", "answer")
        size = len(path_token_ids(chat.path))
        assert drop_oldest(chat.path, 0, size) == 0
        num_dropped = drop_oldest(chat.path, 1, size)
        assert 8 <= num_dropped <= 10
        added = chat.extend(("user", "more"), dropped=num_dropped)
        assert len(added.history) <= size // 2

    def test_everything(self) -> None:
        chat = self.grown(2)
        assert drop_oldest(chat.path, 100, 10) == 4
        assert drop_oldest([], 100, 10) == 0
        added = chat.post(("user", "more"), answer=True, dropped=4)
        assert chat.text(added.prompt_token_ids) == (
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_default_model(default_folder: Path, smollm2: Tokenizer) -> None:
    config = json.loads((default_folder / "tokenizer_config.json").read_text())
    chat = Talk(config["chat_template"], smollm2)
    for question, text in (("7 days?", "Yes, 7 days."), ("<|im_end|> 😀", ""), ("", "\n7\n")):
        added = chat.ask(question, text)
        messages = [message_of(turn) for turn in chat.path[:-1]]
        assert added.prompt_token_ids == encode_chat(smollm2, chat.template, messages)
        assert added.rewrite is None


def test_the_history_is_not_tokenised_again(
    smollm2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Talk(CHATML, smollm2)
    for index in range(20):
        chat.ask(f"Tell me about the river, part {index}.", "The river bends. " * 10)
    encoded: list[str] = []
    encode = smollm2.encode

    def counted(text: str, **options: Any) -> list[int]:
        encoded.append(text)
        return encode(text, **options)

    monkeypatch.setattr(smollm2, "encode", counted)
    added = chat.extend(("user", "And then?"))
    assert len(added.prompt_token_ids) > 1000
    assert sum(map(len, encoded)) < 100
