"""Generation's log without an engine: what is shown after N tokens is a function of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.messages import (
    EngineStats,
    RequestError,
    StepOutputs,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from model.engine.request import SamplingParams
from server.engine_client import EngineClient
from server.errors import InvalidRequest, ServerError
from server.events import Delta, Done, Event, Failed, Paused, Progress, Started
from server.generation import Generation
from server.owners import Owner
from server.reader import read
from server.text.detokenizer import shown_text
from server.text.tokenizer import Tokenizer
from tests.fixtures.tiny_tokenizer import write_tokenizer

END = 2  # <|im_end|>
PIECES = ["a", "b", "ab", "ba", " ", "é", "日", "😀", "the", "\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def make(
    tokenizer: Tokenizer,
    *,
    stop: tuple[str, ...] = (),
    prompt: list[int] | None = None,
    resumed: list[int] | None = None,
    min_tokens: int = 0,
) -> Generation:
    return Generation(
        id="gen_0",
        owner=Owner("ann", b""),
        prompt_token_ids=[5] if prompt is None else prompt,
        params=SamplingParams(max_tokens=1000, min_tokens=min_tokens),
        stop=stop,
        tokenizer=tokenizer,
        on_end=lambda generation, event: generation.publish(event),
        resumed_token_ids=resumed or [],
    )


def output(*token_ids: int, **fields: object) -> TokenOutput:
    return TokenOutput("gen_0", token_ids=list(token_ids), **fields)  # type: ignore[arg-type]


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text spelled byte by byte, so that its characters are in halves."""
    ids = {data: id_ for id_, data in enumerate(tokenizer.token_bytes) if len(data) == 1}
    return [ids[bytes([byte])] for byte in text.encode()]


def ended(generation: Generation, token_ids: list[int], reason: str = "length") -> Generation:
    """The generation, fed token by token to its end."""
    for token_id in token_ids[:-1]:
        generation.feed(output(token_id))
    generation.feed(output(*token_ids[-1:], finish_reason=reason))
    return generation


def events(generation: Generation, after: int | None = None) -> list[Event]:
    """All that a reader gets of one that has ended."""

    async def collect() -> list[Event]:
        return [event async for batch in read([generation], after) for _, event in batch]

    return asyncio.run(collect())


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, tuple[str, ...], list[bool]]:
    """A text, stop strings that are often in it, and where to cut: tokens are its bytes or not."""
    parts = draw(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), min_size=1))
    stop = draw(st.lists(st.text("ab é日", min_size=1, max_size=3), max_size=3))
    return "".join(p for p, _ in parts), tuple(stop), [whole for _, whole in parts]


def tokens(tokenizer: Tokenizer, text: str, whole: list[bool]) -> list[int]:
    """Ids that spell the text, some in whole pieces and some byte by byte; the last may be cut."""
    ids: list[int] = []
    for i, character in enumerate(text):
        if whole[i % len(whole)]:
            ids += tokenizer.encode(character, special=False, continues=True)
        else:
            ids += bytes_of(tokenizer, character)
    return ids


# ------------------------------------------------------------------------------ properties


@settings(deadline=None, max_examples=150)
@given(answer=answers(), data=st.data())
def test_any_split_into_steps_gives_the_same_log(
    tokenizer: Tokenizer, answer: tuple[str, tuple[str, ...], list[bool]], data: st.DataObject
) -> None:
    text, stop, whole = answer
    ids = tokens(tokenizer, text, whole)
    ids = ids[: data.draw(st.integers(1, len(ids)), label="cut")]
    alone = ended(make(tokenizer, stop=stop), ids)
    other = make(tokenizer, stop=stop)
    rest = ids
    while rest:
        size = data.draw(st.integers(1, len(rest)), label="step")
        step, rest = rest[:size], rest[size:]
        other.feed(output(*step, finish_reason=None if rest else "length"))
    assert other.ended
    assert (other.token_ids, other.pieces) == (alone.token_ids, alone.pieces)
    assert other.outcome == alone.outcome
    assert not any(s in alone.text for s in stop)
    if alone.end.finish_reason == "length":
        assert alone.text == tokenizer_text(tokenizer, ids)


def tokenizer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes[id_] for id_ in ids).decode(errors="replace")


@settings(deadline=None, max_examples=150)
@given(answer=answers(), data=st.data())
def test_the_text_after_n_tokens_is_a_function_of_them(
    tokenizer: Tokenizer, answer: tuple[str, tuple[str, ...], list[bool]], data: st.DataObject
) -> None:
    text, stop, whole = answer
    ids = tokens(tokenizer, text, whole)
    whole_run = ended(make(tokenizer, stop=stop), ids)
    running = make(tokenizer, stop=stop)
    shown: list[tuple[int, str]] = [(0, "")]
    for token_id in ids:
        running.feed(output(token_id))
        if running.ended:
            break
        shown.append((len(running.token_ids), running.text))
    for count in range(len(running.token_ids)):  # whatever came after them
        if running.token_ids[: count + 1] == ids[: count + 1]:
            said = shown_text(tokenizer.token_bytes, ids[:count])
            assert "".join(whole_run.pieces[:count]) == said
    for count, said in shown:  # never taken back, never different
        assert whole_run.token_ids[:count] == ids[:count]
        assert "".join(whole_run.pieces[:count]) == said
    # What a crash leaves of the log, and the same tokens drawn after it.
    count, said = data.draw(st.sampled_from(shown), label="crash")
    after = make(tokenizer, stop=stop)
    after.replay(ids[:count], [])
    # What was held until a later token told that it is no stop string is held again.
    assert after.drawn_token_ids == ids[:count]
    assert after.token_ids == ids[: len(after.token_ids)]
    assert said.startswith(after.text)
    if count < len(ids):
        ended(after, ids[count:])
        assert (after.token_ids, after.pieces) == (whole_run.token_ids, whole_run.pieces)
        assert after.outcome == whole_run.outcome


@settings(deadline=None, max_examples=150)
@given(answer=answers(), data=st.data())
def test_cancelled_and_continued_is_the_same_answer(
    tokenizer: Tokenizer, answer: tuple[str, tuple[str, ...], list[bool]], data: st.DataObject
) -> None:
    text, stop, whole = answer
    ids = tokens(tokenizer, text, whole)
    uncut = ended(make(tokenizer, stop=stop), ids)
    first = make(tokenizer, stop=stop)
    for token_id in ids[: data.draw(st.integers(0, len(ids) - 1), label="cancelled after")]:
        first.feed(output(token_id))
    if first.ended:
        return
    first.cancel()
    assert first.end == Done("abort")
    assert first.token_ids == first.drawn_token_ids
    assert "�" not in first.text
    rest = ids[len(first.token_ids) :]
    second = ended(make(tokenizer, stop=stop, resumed=first.token_ids), rest)
    assert second.whole_text() == uncut.text
    assert second.whole_token_ids() == uncut.token_ids
    # Nothing is said twice, and the stream is the same when it is read from the store later.
    assert len(first.text) + len(second.text) == max(len(first.text), len(uncut.text))
    stored = make(tokenizer, resumed=first.token_ids)
    stored.restore(second.token_ids, [], half=True)
    assert stored.text == second.text


@settings(deadline=None, max_examples=100)
@given(answer=answers())
def test_a_reader_may_start_anywhere(
    tokenizer: Tokenizer, answer: tuple[str, tuple[str, ...], list[bool]]
) -> None:
    text, stop, whole = answer
    generation = ended(make(tokenizer, stop=stop), tokens(tokenizer, text, whole))
    for start in range(len(generation.token_ids) + 1):
        *deltas, last = events(generation, start)
        said = "".join(event.text for event in deltas if isinstance(event, Delta))
        assert said == "".join(generation.pieces[start:])
        assert last == generation.outcome
    stored = make(tokenizer)
    stored.restore(generation.token_ids, [], half=True)
    assert (stored.token_ids, stored.text) == (generation.token_ids, generation.text)


# ------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("ends", [0, 1], ids=["at its length", "with an end token"])
def test_a_reader_beyond_the_end_is_not_sent_back(tokenizer: Tokenizer, ends: int) -> None:
    ids = [*bytes_of(tokenizer, "abc"), *[END] * ends]
    reason = "stop" if ends else "length"
    last = len(ids)  # the place of `done` is one more

    async def watch(after: int) -> list[Event]:
        """What comes to one that reads from before the first token to the end."""
        generation = make(tokenizer)
        seen: list[Event] = []
        rest = list(ids)
        generation.feed(output(prefill=(1, 2)))
        async for batch in read([generation], after):
            seen += [event for _, event in batch]
            while not generation.ended:
                token_id = rest.pop(0)
                generation.feed(output(token_id, finish_reason=None if rest else reason))
        return [event for event in seen if not isinstance(event, Progress)]

    for after in (last + 1, last + 2, 1000):
        assert asyncio.run(watch(after)) == []
        assert events(ended(make(tokenizer), ids, reason), after) == []
    assert asyncio.run(watch(last)) == [Done("stop" if ends else "length")]
    assert events(ended(make(tokenizer), ids, reason), last) == [Done("stop" if ends else "length")]
    # An error has no place, and is told to everybody.
    broken = make(tokenizer)
    broken.close(Failed(ServerError("no")))
    assert [type(event) for event in events(broken, 1000)] == [Failed]


def test_half_a_character_waits_and_belongs_to_its_last_byte(tokenizer: Tokenizer) -> None:
    generation = make(tokenizer)
    first, *middle, last = bytes_of(tokenizer, "😀")
    for token_id in (first, *middle):
        generation.feed(output(token_id))
        assert (generation.token_ids, generation.text) == ([], "")
    generation.feed(output(last))
    assert generation.pieces == ["", "", "", "😀"]
    assert generation.delta(2) == Delta("😀", [middle[1], last], [], 4)
    assert generation.delta(4) is None


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    half = bytes_of(tokenizer, "😀")[:2]
    generation = ended(make(tokenizer), half)
    assert (generation.text, generation.token_ids) == ("�", half)
    cancelled = make(tokenizer)
    cancelled.feed(output(*half))
    cancelled.cancel()
    assert (cancelled.text, cancelled.token_ids) == ("", half)


def test_a_character_begun_by_an_earlier_generation(tokenizer: Tokenizer) -> None:
    first, *rest = bytes_of(tokenizer, "日")
    generation = make(tokenizer, resumed=[first])
    for token_id in rest:
        generation.feed(output(token_id))
    assert (generation.token_ids, generation.pieces) == (rest, ["", "日"])
    assert generation.whole_text() == "日"
    assert generation.counts()["prompt_tokens"] == 2


def test_a_possible_stop_string_is_held(tokenizer: Tokenizer) -> None:
    a, b, space = bytes_of(tokenizer, "ab ")
    generation = make(tokenizer, stop=("ab ",))
    generation.feed(output(a))
    generation.feed(output(b))
    assert generation.text == ""
    generation.feed(output(b))
    assert generation.text == "abb"
    for token_id in (a, b, space):
        generation.feed(output(token_id))
    assert generation.end == Done("stop")
    assert (generation.text, generation.token_ids) == ("abb", [a, b, b])
    assert generation.num_output_tokens == 6
    generation.feed(output(a))  # what the engine had on its way counts no more
    assert generation.num_output_tokens == 6


def test_the_visible_part_of_a_token_is_spelled_anew(tokenizer: Tokenizer) -> None:
    token = next(
        id_ for id_, data in enumerate(tokenizer.token_bytes) if data.isalpha() and len(data) == 3
    )
    spelled = tokenizer.token_bytes[token].decode()
    generation = make(tokenizer, stop=(spelled[1:],))
    generation.feed(output(token))
    assert generation.end == Done("stop")
    assert generation.text == spelled[0]
    assert generation.token_ids == tokenizer.encode(spelled[0], special=False, continues=True)


def test_no_stop_string_counts_before_min_tokens(tokenizer: Tokenizer) -> None:
    a = bytes_of(tokenizer, "a")[0]
    generation = make(tokenizer, stop=("a",), min_tokens=3)
    generation.feed(output(a))
    generation.feed(output(a))
    assert not generation.ended
    generation.feed(output(a))
    assert generation.end == Done("stop")


def test_the_end_token_counts_and_does_not_show(tokenizer: Tokenizer) -> None:
    a = bytes_of(tokenizer, "a")[0]
    generation = ended(make(tokenizer), [a, END], "stop")
    assert (generation.token_ids, generation.end_token_ids) == ([a], [END])
    assert generation.output_token_ids == [a, END]
    assert generation.text == "a"
    assert generation.counts()["completion_tokens"] == 2


def test_logprobs_stay_with_their_tokens(tokenizer: Tokenizer) -> None:
    ids = bytes_of(tokenizer, "aé")
    entries = [TokenLogprob(id_, -float(i)) for i, id_ in enumerate(ids)]
    generation = make(tokenizer)
    for id_, entry in zip(ids, entries, strict=True):
        generation.feed(output(id_, logprobs=[entry]))
        assert [entry.token_id for entry in generation.logprobs] == generation.token_ids
    assert generation.delta(1) == Delta("é", ids[1:], entries[1:], 3)


def test_the_events_of_one_reader(tokenizer: Tokenizer) -> None:
    ids = bytes_of(tokenizer, "ab")

    async def watch() -> list[Event]:
        generation = make(tokenizer)
        steps: list[Callable[[], None]] = [
            lambda: generation.feed(output(queue_position=3)),
            lambda: generation.feed(output(prefill=(8, 20), num_reused_tokens=4)),
            lambda: generation.feed(output(ids[0])),
            generation.pause,
            lambda: generation.feed(output(ids[1], finish_reason="length")),
        ]
        seen: list[Event] = []
        steps.pop(0)()
        async for batch in read([generation]):
            seen += [event for _, event in batch]
            if steps:
                steps.pop(0)()
        assert not generation.has_readers
        return seen

    assert asyncio.run(watch()) == [
        Progress(3),
        Progress(-1, (8, 20)),
        Started(),
        Delta("a", ids[:1], [], 1),
        Paused(),
        Delta("b", ids[1:], [], 2),
        Done("length"),
    ]


def test_an_error_of_the_engine_is_the_end(tokenizer: Tokenizer) -> None:
    generation = make(tokenizer)
    generation.feed(output(error=RequestError("invalid_request_error", "invalid_value", "no")))
    with pytest.raises(InvalidRequest, match="no"):
        _ = generation.end
    assert isinstance(generation.outcome, Failed)
    other = make(tokenizer)
    other.feed(output(finish_reason="abort"))
    with pytest.raises(ServerError, match="unasked"):
        _ = other.end


def test_cancelling_what_has_ended_changes_nothing(tokenizer: Tokenizer) -> None:
    generation = ended(make(tokenizer), bytes_of(tokenizer, "ab"))
    generation.cancel()
    assert generation.end == Done("length")
    generation.close(Failed(ServerError("late")))
    assert generation.end == Done("length")


def test_a_delivery_that_fails_ends_its_generation_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cannot be made of what the engine says: nobody waits for ever."""
    client = EngineClient()
    client.attach(1)
    sick, well = make(tokenizer), make(tokenizer)
    monkeypatch.setattr(sick._detokenizer, "feed", lambda _: 1 // 0)
    for name, one in (("sick", sick), ("well", well)):
        client.submit(Submit(name, one.prompt_token_ids, one.params), one.feed)
    client._receive(
        StepOutputs(
            1,
            [
                TokenOutput("sick", token_ids=[5], finish_reason="length"),
                TokenOutput("well", token_ids=[5], finish_reason="length"),
            ],
            EngineStats(),
        )
    )
    assert isinstance(sick.outcome, Failed) and sick.outcome.error.code == "internal"
    assert isinstance(well.outcome, Done)
    assert client.num_requests == 0


def test_what_was_drawn_before_the_server_started_is_not_timed(tokenizer: Tokenizer) -> None:
    generation = make(tokenizer)
    generation.replay([5] * 100, [])
    generation.feed(output(5, 5, 5, finish_reason="length"))
    assert (generation.num_output_tokens, generation.num_drawn_here) == (103, 3)


def test_a_long_log_is_read_piece_by_piece_and_others_have_their_turn(
    tokenizer: Tokenizer,
) -> None:
    generation = ended(make(tokenizer), [5] * 600)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def collect() -> list[Event]:
        beside = asyncio.create_task(other())
        found = [event async for batch in read([generation], 0) for _, event in batch]
        beside.cancel()
        return found

    *deltas, last = asyncio.run(collect())
    assert [delta.end for delta in deltas if isinstance(delta, Delta)] == [256, 512, 600]
    assert last == Done("length")
    assert turns >= 2
