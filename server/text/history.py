"""A session's path of turns to prompt token ids, where only what is new is tokenised.

Tokens that are stored are the truth: they are kept as they were sampled, even where they spell a
text that the template would write otherwise. What the template adds is found by rendering the
path with and without the new messages, and only the difference is encoded. A template that writes
the past anew once something follows it (some drop the thoughts of earlier answers) is noticed by
the same comparison; then the whole is rendered and encoded again, and the rewrite is reported.

No I/O and no state: everything here is safe in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.store.records import TurnRecord
from server.text.appended_text import AppendedText, message_of
from server.text.chat_template import ChatTemplate, Message
from server.text.tokenizer import Tokenizer

_EXCERPT = 40

Reason = Literal["template", "model", "instructions", "dropped"]


@dataclass(slots=True, frozen=True)
class Rewrite:
    """Why the tokens of the path do not count any more, and from where on.

    `token` is the index of the first token that differs from the stored path's, `before` and
    `after` are the text from there on, 40 characters at most. For "model" it is 0, and `before` is
    what was said, as this tokenizer cannot read the other one's ids.
    """

    reason: Reason
    token: int
    before: str
    after: str


@dataclass(slots=True, frozen=True)
class Extension:
    """What appending messages to a path adds to its tokens.

    turns:             (prompt_token_ids, token_ids) of each message. A message without tokens of
                       its own has them in the next one that has some.
    generation_prompt: the answer's prompt_token_ids. Without messages it is the first thing new,
                       and holds what closes the path, or with `replaces_history` the whole prompt.
    replaces_history:  the first new turn's prompt_token_ids is the entire prompt up to that turn.
    history:           the tokens of the path as they count now, its last answer closed. Empty
                       after a rewrite in which the first message's own cannot be told apart.
    prompt_token_ids:  all of it: what the engine gets.
    rewrite:           set when tokens of the path are no longer what they were.
    dropped:           how many turns from the root are not in the prompt. With `replaces_history`,
                       keep it as `notes["dropped"]` of the first new turn.
    """

    turns: list[tuple[list[int], list[int]]]
    generation_prompt: list[int]
    replaces_history: bool
    history: list[int]
    prompt_token_ids: list[int]
    rewrite: Rewrite | None
    dropped: int


def last_replacement(path: Sequence[TurnRecord]) -> int:
    """The index of the last turn that replaces what is before it; 0 if there is none."""
    return max((index for index, turn in enumerate(path) if turn.replaces_history), default=0)


def path_token_ids(path: Sequence[TurnRecord]) -> list[int]:
    """All tokens of a path, root first."""
    ids: list[int] = []
    for turn in path[last_replacement(path) :]:
        ids += turn.prompt_token_ids
        ids += turn.token_ids
    return ids


def dropped_turns(path: Sequence[TurnRecord]) -> int:
    """How many turns from the root the path's tokens no longer hold."""
    return int(path[last_replacement(path)].notes.get("dropped", 0)) if path else 0


def drop_oldest(path: Sequence[TurnRecord], num_tokens_needed: int, max_model_len: int) -> int:
    """How many turns from the root must be left out, with those that already are.

    `path` starts at the root; `num_tokens_needed` is what comes beside it: instructions, new
    messages and room for the answer. While all of it fits into `max_model_len` tokens, nothing
    more is left out. Then as many turns as leave at most half of the window, so that the prompt's
    beginning stays put for a while. What is kept begins with a user turn; where no such part is
    small enough, nothing is kept. Turns that were rendered anew count by their share of that, which
    is an estimate: the prompt that `extend` makes tells.
    """
    first, replacement = dropped_turns(path), last_replacement(path)
    if len(path_token_ids(path)) + num_tokens_needed <= max_model_len:
        return first
    sizes = [
        len(turn.token_ids) + (0 if turn.replaces_history else len(turn.prompt_token_ids))
        for turn in path
    ]
    if path and path[replacement].replaces_history:
        earlier = sizes[first:replacement]
        scale = len(path[replacement].prompt_token_ids) / max(sum(earlier), 1)
        sizes[first:replacement] = [math.ceil(size * scale) for size in earlier]
    left = sum(sizes[first:])
    limit = min(max_model_len // 2, max_model_len - num_tokens_needed)
    for index in range(first, len(path)):
        if index > first and path[index].role == "user" and left <= limit:
            return index
        left -= sizes[index]
    return len(path)


def extend(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    path: Sequence[TurnRecord],
    messages: Sequence[Message],
    *,
    instructions: str | None,
    fingerprint: str,
    answer: bool,
    dropped: int = 0,
) -> Extension:
    """The tokens for appending `messages` to `path`, and with `answer` for beginning an answer.

    `path` starts at the root, always; its first `dropped` turns are left out (see `drop_oldest`).
    `instructions` is a system message in front of everything. `fingerprint` is the one that new
    turns get; where a turn that counts has another, its ids are another model's, or where only
    what comes after the second hyphen differs, others of the same model stand before it.

    Raises TemplateError when the template refuses the messages, TokenizerError for text that is
    not Unicode, ValueError for a path without its root or when nothing is to be added.
    """
    if path and path[0].parent is not None:
        raise ValueError("the path must start at the session's root turn")
    if not messages and not answer:
        raise ValueError("nothing is to be appended: neither a message nor an answer")
    stored = path_token_ids(path)
    dropped_before = dropped_turns(path)
    dropped = max(dropped, dropped_before)
    kept = path[dropped:]
    texts = AppendedText(tokenizer, template, instructions, kept, messages, answer)
    reason: Reason | None = None
    others = {turn.tokenizer for turn in path[last_replacement(path) :]} - {fingerprint}
    if others:
        model = _model_of(fingerprint)
        reason = "instructions" if {_model_of(other) for other in others} == {model} else "model"
    elif dropped > dropped_before:
        reason = "dropped"
    elif texts.base is None:
        reason = "template"
    before = stored if reason is None else []
    if reason is None:
        history, position = texts.close(stored)
    else:
        history, position = texts.anew()
    own, generation_prompt = texts.encode(history, position)
    prompt = history + [id_ for ids in own for id_ in ids] + generation_prompt
    if reason == "template" and history[: len(stored)] == stored:
        # The template changed only what the model never said the template's way.
        reason, before = None, stored
    first = history[len(before) :]
    if own:
        turns = [(first, own[0]), *(([], ids) for ids in own[1:])]
    else:
        turns, generation_prompt = [], first + generation_prompt
    rewrite = reason and _rewrite(tokenizer, reason, path, stored, prompt)
    return Extension(
        turns, generation_prompt, reason is not None, history, prompt, rewrite, dropped
    )


def _model_of(fingerprint: str) -> tuple[str, ...]:
    return tuple(fingerprint.split("-")[:2])


def _rewrite(
    tokenizer: Tokenizer,
    reason: Reason,
    path: Sequence[TurnRecord],
    stored: list[int],
    prompt: list[int],
) -> Rewrite:
    if reason == "model":
        said = "\n".join(str(message_of(turn)["content"]) for turn in path)
        return Rewrite(reason, 0, said[:_EXCERPT], _excerpt(tokenizer, prompt))
    pairs = enumerate(zip(stored, prompt, strict=False))
    shorter = min(len(stored), len(prompt))
    token = next((index for index, (old, new) in pairs if old != new), shorter)
    before, after = (_excerpt(tokenizer, ids[token:]) for ids in (stored, prompt))
    return Rewrite(reason, token, before, after)


def _excerpt(tokenizer: Tokenizer, ids: list[int]) -> str:
    # A character takes four tokens at most.
    return tokenizer.decode(ids[: 4 * _EXCERPT], skip_special=False)[:_EXCERPT]
