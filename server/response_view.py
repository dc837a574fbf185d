"""A response as it is told: from its turn, and from its log while that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.engine.messages import TokenLogprob
from server.api.answers import finite
from server.errors import ServerDraining
from server.events import Done, Failed
from server.generation import Generation
from server.off_loop import CHARACTERS_PER_LOGGED_TOKEN, off_loop
from server.responses_wire import (
    Event,
    ItemStatus,
    ResponseEvents,
    echo_of,
    item_bits,
    markup_of,
    usage_of,
)
from server.store.records import GenerationRecord, TurnRecord
from server.store.schema import text_of
from server.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from server.services import Services
    from server.stored_responses import Stored

ENDS: dict[str, tuple[str, str]] = {  # of a finish reason: the event, and the status
    "stop": ("completed", "completed"),
    "length": ("incomplete", "incomplete"),
    "abort": ("incomplete", "cancelled"),
    "error": ("failed", "failed"),
}


class ResponseView:
    """`turn` and `generation` as they are found; one of them may be missing. `echo` is what the
    turn's notes hold, and must be given where there is no turn."""

    def __init__(
        self,
        services: Services,
        echo: dict[str, Any] | None,
        generation: Generation | None,
        turn: TurnRecord | None,
        record: GenerationRecord | None = None,
    ) -> None:
        self._tokenizer = services.tokenizer
        self._model = services.files.name
        self._generation = generation
        self._turn = turn
        self._record = record
        if turn is not None:
            self._echo = echo_of(turn)
            self._id = (turn.generation or "").removeprefix("gen_")
            self._bits = item_bits(turn)
        else:
            assert echo is not None and generation is not None
            self._echo = echo
            self._id = self._bits = generation.id.removeprefix("gen_")

    @classmethod
    def of(cls, services: Services, stored: Stored) -> ResponseView:
        return cls(services, None, stored.generation, stored.turn, stored.record)

    @property
    def headers(self) -> dict[str, str]:
        """Of every answer that tells of it."""
        return {"x-headwater-generation": f"gen_{self._id}"}

    @property
    def ends_again(self) -> bool:
        """Whether it was ended here because the server stops: its stored log ends after the next
        start, by itself or cancelled."""
        generation = self._generation
        if generation is None or generation.durable is None:
            return False
        end = generation.outcome
        return isinstance(end, Failed) and end.error.code == ServerDraining.default_code

    async def told(self) -> dict[str, Any]:
        """`now`; where that takes long, no stream waits for it."""
        generation, turn = self._generation, self._turn
        log = generation.token_ids if generation is not None else turn.token_ids if turn else []
        return await off_loop(CHARACTERS_PER_LOGGED_TOKEN * len(log), self.now)

    def now(self) -> dict[str, Any]:
        """The response as it is. Its log may grow meanwhile."""
        walk = self.walk()
        generation = self._generation
        if generation is None:
            assert self._turn is not None
            if self._turn.status == "running":  # it waits for the model that it was begun with
                return self._head("queued" if self._echo["background"] else "in_progress")
            for piece in self._pieces(self._turn):
                walk.feed(piece)
            return self._whole(walk, self._turn.finish_reason or "abort")
        ended, num_tokens = generation.ended, len(generation.token_ids)
        for at in range(num_tokens):
            self.fed(walk, at)
        if ended:
            return self._whole(walk, _reason(generation))
        if num_tokens:
            walk.end("in_progress")
        waiting = self._echo["background"] and not generation.admitted
        return self._head("queued" if waiting else "in_progress") | {"output": walk.output}

    def walk(self) -> ResponseEvents:
        """A walk through the log, at its beginning."""
        generation = self._generation
        markup = markup_of(self._echo) if generation is None else generation.markup
        return ResponseEvents(self._head("in_progress"), self._bits, f"gen_{self._id}", markup)

    def fed(self, walk: ResponseEvents, at: int) -> list[Event]:
        """The events of the log's token number `at`."""
        generation = self._generation
        assert generation is not None
        logprobs = generation.logprobs[at : at + 1]
        return walk.feed(generation.pieces[at], [self._logprob(entry) for entry in logprobs])

    def ended(self, walk: ResponseEvents) -> list[Event]:
        """The events of the end. One that is not the log's own (the server stops) has no number of
        its own: who comes back has missed nothing."""
        generation = self._generation
        assert generation is not None
        reason = _reason(generation)
        name, _ = ENDS[reason]
        if self.ends_again:
            last = walk.last(name, self.now())
            last["sequence_number"] -= 1
            return [last]
        closing = walk.end(_item_status(reason))
        return [*closing, walk.last(name, self._whole(walk, reason, closed=True))]

    # -------------------------------------------------------------------------------- details

    def _whole(self, walk: ResponseEvents, reason: str, *, closed: bool = False) -> dict[str, Any]:
        """The response at its end; `walk` went through all of its text."""
        if not closed:
            walk.end(_item_status(reason))
        _, status = ENDS[reason]
        response = self._head(status)
        response["output"] = walk.output
        if reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if reason == "error":
            response["error"] = self._error()
        else:
            response["completed_at"] = self._completed_at()
            response["usage"] = usage_of(self._counts(), walk.num_reasoning_tokens)
        return response

    def _completed_at(self) -> int:
        turn, generation = self._turn, self._generation
        if turn is not None and "ended_at" in turn.notes:
            return int(turn.notes["ended_at"])
        if generation is None:
            assert turn is not None
            return int(turn.created_at)
        timings = generation.timings
        return int(generation.created_at + max(timings.last_token - timings.submitted, 0.0))

    def _pieces(self, turn: TurnRecord) -> list[str]:
        """The text of the turn by its tokens, as the log had it that is gone, so that they count
        the same; in one piece where the tokens are another model's."""
        text = text_of(turn.content)
        if not turn.tokenizer.startswith(f"{self._tokenizer.fingerprint[:32]}-"):
            return [text]
        token_ids = turn.token_ids
        ends = {*self._tokenizer.eos_token_ids, *turn.notes["params"].get("stop_token_ids", ())}
        if turn.finish_reason == "stop" and token_ids and token_ids[-1] in ends:
            token_ids = token_ids[:-1]  # the token that ended it has no text
        detokenizer = Detokenizer(self._tokenizer.token_bytes)
        pieces = [detokenizer.feed(token_id).text for token_id in token_ids[:-1]]
        shown = "".join(pieces)
        return [*pieces, text[len(shown) :]] if text.startswith(shown) else [text]

    def _counts(self) -> dict[str, Any]:
        if self._generation is not None:
            return self._generation.counts()
        assert self._turn is not None
        notes = self._turn.notes
        return {
            "prompt_tokens": notes["prompt_tokens"],
            "cached_tokens": notes["cached_tokens"],
            "completion_tokens": notes["usage"]["completion_tokens"],
        }

    def _error(self) -> dict[str, Any]:
        generation = self._generation
        if generation is not None and isinstance(generation.outcome, Failed):
            error = generation.outcome.error
            return {"code": error.code, "message": error.message}
        if self._record is not None and self._record.error is not None:
            return self._record.error
        return {"code": "internal", "message": "the answer broke off"}

    def _head(self, status: str) -> dict[str, Any]:
        echo, turn, generation = self._echo, self._turn, self._generation
        created = turn.created_at if turn is not None else generation and generation.created_at
        conversation = echo["conversation"]
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(created or 0),
            "status": status,
            "background": echo["background"],
            "completed_at": None,
            "conversation": None if conversation is None else {"id": conversation},
            "error": None,
            "incomplete_details": None,
            "instructions": echo["instructions"],
            "max_output_tokens": echo["max_output_tokens"],
            "max_tool_calls": None,
            "metadata": echo["metadata"],
            "model": self._model,
            "output": [],
            "parallel_tool_calls": echo["parallel_tool_calls"],
            "previous_response_id": echo["previous_response_id"],
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": echo["store"],
            "temperature": echo["temperature"],
            "text": echo["text"],
            "tool_choice": echo["tool_choice"],
            "tools": echo["tools"],
            "top_logprobs": echo["top_logprobs"],
            "top_p": echo["top_p"],
            "truncation": echo["truncation"],
            "usage": None,
        }

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        def named(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._tokenizer.piece(token_id),
                "bytes": list(self._tokenizer.bytes_of(token_id)),
                "logprob": finite(logprob),
            }

        top = [named(*pair) for pair in entry.top[: self._echo["top_logprobs"]]]
        return {**named(entry.token_id, entry.logprob), "top_logprobs": top}


def _reason(generation: Generation) -> str:
    return generation.outcome.finish_reason if isinstance(generation.outcome, Done) else "error"


def _item_status(reason: str) -> ItemStatus:
    return "completed" if reason == "stop" else "incomplete"
