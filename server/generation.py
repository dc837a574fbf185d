"""Generation: one run of the model, its log, and those who read it.

The log is the output's tokens, each with the text that it completes. So the text after N tokens is
a function of those N tokens, a place in a stream is a number of tokens, and every reader has an
offset of its own: a slow one holds nobody up, and one that left goes on where it was. All wires are
functions of this log. Where the tokens come from, one engine process or three, does not show in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from model.engine.messages import TokenLogprob, TokenOutput
from model.engine.request import SamplingParams
from server.errors import ServerError, from_engine
from server.events import Delta, Done, Failed, Progress
from server.owners import Owner
from server.store.records import GenerationKind, TurnRecord
from server.text.answer_text import PLAIN, Markup
from server.text.detokenizer import Detokenizer, shown_text
from server.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Timings:
    """Monotonic clock, in seconds; 0 is 'not yet'."""

    submitted: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class Durable:
    """What makes a generation's log outlive the process: what it is for, and how far it is stored.
    `turn` is the answer that it writes, in a session."""

    kind: GenerationKind
    session: str | None = None
    turn: TurnRecord | None = None
    num_logged: int = 0  # tokens that are on their way to the store
    num_stored: int = 0
    waits: asyncio.Event | None = None
    """Where tokens are shown only once they are stored: it is set when there are new ones."""


@dataclass(eq=False)
class Generation:
    """One choice of an answer. `feed` is the engine client's sink.

    `resumed_token_ids` are output tokens that an earlier generation of the same answer drew: they
    count for limits and penalties, and are no part of this log."""

    id: str
    owner: Owner
    prompt_token_ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    tokenizer: Tokenizer
    on_end: Callable[[Generation, Done | Failed], None]
    resumed_token_ids: list[int] = field(default_factory=list)
    durable: Durable | None = None
    markup: Markup = PLAIN
    """How the text is read by wires that tell tool calls and reasoning from it."""
    created_at: float = field(default_factory=time.time)
    request_id: str = ""
    """Its name in the engine, another one each time that it is submitted: what is still on its way
    from the time before is then nobody's."""
    crashes: int = 0
    """Deaths of the engine while this was in it, without a step forward in between."""
    timings: Timings = field(default_factory=Timings)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_reused_tokens: int = 0
    num_disk_tokens: int = 0
    num_corrupt_blocks: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    drawn_token_ids: list[int] = field(default_factory=list)
    """All that came from the engine, in the log or not yet."""
    token_ids: list[int] = field(default_factory=list)
    """The log: tokens whose text is shown whole."""
    pieces: list[str] = field(default_factory=list)
    """The text that each token of the log completes."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end_token_ids: list[int] = field(default_factory=list)
    """The token that ended it, if one did; it has no text."""
    stored_counts: dict[str, Any] | None = None
    """`counts` of one that ended in the past."""
    pauses: int = 0
    progress: Progress | None = None
    left_engine: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the engine's last word on it, when `block_keys` is known."""
    _drawn_logprobs: list[TokenLogprob] = field(default_factory=list)
    _num_replayed: int = 0
    _held_text: str = ""
    _closing: Done | Failed | None = None
    _end: Done | Failed | None = None
    _listeners: set[asyncio.Event] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(
            self.tokenizer.token_bytes,
            self.prompt_token_ids,
            list(self.stop),
            min_tokens=self.params.min_tokens,
        )
        for token_id in self.resumed_token_ids:
            self._detokenizer.feed(token_id)
        self._num_owed = self._detokenizer.num_held_tokens
        self._num_released = len(self._detokenizer.released_ends)
        self._held_start = self._detokenizer.num_shown
        # What was held back for a stop string was shown when the generation before this one ended.
        self._num_shown_before = self._detokenizer.num_held

    @property
    def admitted(self) -> bool:
        if self.stored_counts is not None:
            return bool(self.stored_counts["completion_tokens"])
        return self.timings.admitted > 0

    @property
    def closing(self) -> bool:
        """Whether nothing more will be computed; the end may still wait to be stored."""
        return self._closing is not None

    @property
    def cancelled(self) -> bool:
        """Whether it was ended from outside."""
        return isinstance(self._closing, Done) and self._closing.finish_reason == "abort"

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(self.pieces)

    @property
    def end(self) -> Done:
        """How it ended. Raises the error it failed with."""
        if isinstance(self._end, Failed):
            raise self._end.error
        assert self._end is not None
        return self._end

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return self._detokenizer.stopped

    @property
    def outcome(self) -> Done | Failed | None:
        """How it ended; None while it runs."""
        return self._end

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that come before this log: the prompt, and what is gone on with."""
        return len(self.prompt_token_ids) + len(self.resumed_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were drawn, those that a stop string cut off among them."""
        return len(self.drawn_token_ids)

    @property
    def num_drawn_here(self) -> int:
        """Of these, those that `timings` are about: they were drawn since this server started."""
        return self.num_output_tokens - self._num_replayed

    @property
    def output_token_ids(self) -> list[int]:
        """The log's tokens, and the one that ended it."""
        return self.token_ids + self.end_token_ids

    def whole_text(self) -> str:
        """The text of the answer that this is the end of: the resumed tokens' and its own."""
        before = shown_text(
            self.tokenizer.token_bytes, self.resumed_token_ids, self.prompt_token_ids
        )
        if self.stop_string is not None:  # it may have begun before this generation did
            before = before[: len(before) - self._num_shown_before]
        return before + self.text

    def whole_token_ids(self) -> list[int]:
        """The tokens of that answer. Where a stop string began in those gone on with, they end with
        the last one wholly before it, and the visible part of the next is tokenised again."""
        if self.stop_string is None or self._num_owed == 0:
            return self.resumed_token_ids + self.output_token_ids
        kept = self.resumed_token_ids[: len(self.resumed_token_ids) - self._num_owed]
        shown = shown_text(self.tokenizer.token_bytes, kept, self.prompt_token_ids)
        rest = self.whole_text()[len(shown) :]
        return kept + (self.tokenizer.encode(rest, special=False, continues=True) if rest else [])

    def counts(self) -> dict[str, Any]:
        """What the events at both ends tell, in plain values: tokens, and times."""
        if self.stored_counts is not None:
            return self.stored_counts
        timings = self.timings
        prefill = timings.first_token - timings.submitted if timings.first_token else 0.0
        decode = timings.last_token - timings.first_token
        num_decoded = self.num_drawn_here - 1
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "cached_tokens": {
                "device": self.num_reused_tokens - self.num_disk_tokens,
                "host": 0,
                "disk": self.num_disk_tokens,
            },
            "num_end_tokens": len(self.end_token_ids),
            "timings": {
                "queue_ms": round(1000 * max(timings.admitted - timings.submitted, 0.0), 1),
                "ttft_ms": round(1000 * prefill, 1),
                "decode_tokens_per_s": round(num_decoded / decode, 1) if decode > 0 else 0.0,
            },
        }

    # ------------------------------------------------------------------------------- the log

    def feed(self, output: TokenOutput) -> None:
        """Append what a step made, and wake the readers."""
        if output.finish_reason is not None:
            self.block_keys = output.block_keys
            self.left_engine.set()
        if self.closing:
            return
        self._note(output)
        if output.error is not None:
            self.close(Failed(from_engine(output.error)))
            return
        if output.token_ids and self._append(output):
            return
        match output.finish_reason:
            case None:
                if self.durable is not None and self.durable.waits is not None:
                    self.durable.waits.set()
                self.wake()
            case "stop" | "length":
                self._flush(output.finish_reason)
            case _:
                self.close(Failed(ServerError("the engine ended the request unasked")))

    def cancel(self) -> None:
        """End it here. What was drawn so far stays; of half a character, nothing is shown."""
        if self.closing:
            return
        self._hold(self._detokenizer.finish(half=False).text)
        self._release_all()
        self.close(Done("abort"))

    def close(self, event: Done | Failed) -> None:
        """Nothing more comes from the engine. `publish` is the end of it."""
        if not self.closing:
            self._closing = event
            self.on_end(self, event)

    def publish(self, event: Done | Failed) -> None:
        """Show the end to the readers."""
        self._closing = self._end = event
        self.wake()

    def pause(self) -> None:
        """The engine is gone, and another one will go on with this."""
        self.pauses += 1
        self.prompt_logprobs = []  # they come again
        self.wake()

    def replay(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Take over what an earlier process logged of this generation."""
        if token_ids:
            self._append(TokenOutput(self.id, token_ids=list(token_ids), logprobs=list(logprobs)))
        self.timings = Timings()
        self._num_replayed = len(token_ids)

    def restore(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], *, half: bool
    ) -> None:
        """Take over the whole log of one that ended. It must have no stop strings: what they cut
        off is no part of its log. `half`: show U+FFFD for half a character at the end."""
        self.replay(token_ids, logprobs)
        self._hold(self._detokenizer.finish(half=half).text)
        self._release_all()

    def _note(self, output: TokenOutput) -> None:
        if output.num_reused_tokens >= 0 and not self.admitted:
            self.timings.admitted = time.monotonic()
            # Tokens that this log got from an earlier process are found too, and are no prompt.
            self.num_reused_tokens = min(output.num_reused_tokens, self.num_prompt_tokens)
            self.num_disk_tokens = min(output.num_disk_tokens, self.num_reused_tokens)
            self.num_corrupt_blocks = output.num_corrupt_blocks
        self.prompt_logprobs += output.prompt_logprobs
        if output.queue_position >= 0 or output.prefill is not None:
            self.progress = Progress(output.queue_position, output.prefill)

    def _append(self, output: TokenOutput) -> bool:
        """Log what the new tokens let be shown. True when a stop string among it was the end."""
        now = time.monotonic()
        if self.timings.first_token == 0.0:
            self.timings.first_token = now
        self.timings.last_token = now
        # The token that ends the request (an end token, a stop token) is counted, not shown.
        num_shown = len(output.token_ids) - (output.finish_reason == "stop")
        self.drawn_token_ids += output.token_ids
        self._drawn_logprobs += output.logprobs
        for token_id in output.token_ids[:num_shown]:
            self._hold(self._detokenizer.feed(token_id).text)
            self._release()
            if self._detokenizer.stopped is not None:
                self._spell_out()
                self.close(Done("stop"))
                return True
        return False

    def _hold(self, text: str) -> None:
        """Text that the detokenizer lets be shown, and no reader of an answer has seen."""
        seen = min(self._num_shown_before, len(text))
        self._num_shown_before -= seen
        self._held_start += seen
        self._held_text += text[seen:]

    def _release(self) -> None:
        """Move the drawn tokens that are wholly shown into the log, each with the text up to its
        end, so that what is shown after a token does not depend on what came after it."""
        ends = self._detokenizer.released_ends[self._num_released :]
        self._num_released += len(ends)
        for end in ends:
            num_characters = max(end - self._held_start, 0)
            text = self._held_text[:num_characters]
            self._held_text = self._held_text[num_characters:]
            self._held_start += num_characters
            if self._num_owed:  # a token of the generation before this one, which showed its text
                self._num_owed -= 1
            else:
                self._log(text)

    def _release_all(self, num_ends: int = 0) -> None:
        """Move all drawn tokens but the last `num_ends` into the log, and all text."""
        self._release()
        while len(self.token_ids) < len(self.drawn_token_ids) - num_ends:
            self._log("")
        if self.pieces:
            self.pieces[-1] += self._held_text

    def _log(self, piece: str) -> None:
        at = len(self.token_ids)
        self.token_ids.append(self.drawn_token_ids[at])
        self.logprobs += self._drawn_logprobs[at : at + 1]
        self.pieces.append(piece)

    def _spell_out(self) -> None:
        """Text is left that no whole token shows: the part of one before a stop string."""
        if self._held_text:
            ids = self.tokenizer.encode(self._held_text, special=False, continues=True)
            shown = Detokenizer(self.tokenizer.token_bytes)
            pieces = [shown.feed(token_id).text for token_id in ids]
            if "".join(pieces) != self._held_text:
                pieces = [""] * (len(ids) - 1) + [self._held_text]
            self.token_ids += ids
            self.pieces += pieces
            self._held_text = ""

    def _flush(self, reason: Literal["stop", "length"]) -> None:
        self._hold(self._detokenizer.finish().text)
        if self._detokenizer.stopped is not None:  # the last character completed a stop string
            self._release()
            self._spell_out()
            self.close(Done("stop"))
            return
        num_ends = int(reason == "stop")
        self._release_all(num_ends)
        self.end_token_ids = self.drawn_token_ids[-1:] if num_ends else []
        self.close(Done(reason))

    # --------------------------------------------------------------------------- its readers

    @property
    def has_readers(self) -> bool:
        return bool(self._listeners)

    @property
    def num_readable(self) -> int:
        """Tokens of the log that readers may see."""
        stored = isinstance(self._end, Done)
        if self.durable is None or self.durable.waits is None or stored:
            return len(self.token_ids)
        return min(len(self.token_ids), self.durable.num_stored)

    def delta(self, start: int, most: int | None = None) -> Delta | None:
        """The log from `start` tokens on, `most` tokens of it; None where nothing is new."""
        end = self.num_readable
        if start >= end:
            return None
        if most is not None:
            end = min(end, start + most)
        text = "".join(self.pieces[start:end])
        return Delta(text, self.token_ids[start:end], self.logprobs[start:end], end)

    def listen(self, listener: asyncio.Event) -> None:
        """Set `listener` whenever there is news, and now."""
        self._listeners.add(listener)
        listener.set()

    def unlisten(self, listener: asyncio.Event) -> None:
        self._listeners.discard(listener)

    def wake(self) -> None:
        """Let the readers look for news."""
        for listener in self._listeners:
            listener.set()
