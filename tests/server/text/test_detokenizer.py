"""The detokenizer against slow definitions of what it must say, over many random streams."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from server.text.detokenizer import Delta, Detokenizer, _half_character
from server.text.tokenizer import Tokenizer

PIECES = [
    *(bytes([byte]) for byte in range(256)),
    b"",  # 256: a special token
    *(
        piece.encode()
        for piece in ("a", "ab", "STOP", "ST", "OP", " the", "\n\n", "é", "中文", "😀")
    ),
    *("😀".encode()[:2], "😀".encode()[2:], "中".encode()[:2], "x中".encode()[:2], b"\xff\xfe"),
    *(b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", "\ufffd".encode(), "e\u0301".encode()),
]
SPECIAL = 256


def run(
    detokenizer: Detokenizer, ids: Sequence[int], *, finish: bool = True
) -> tuple[list[Delta], str]:
    deltas = [detokenizer.feed(id_) for id_ in ids]
    if finish:
        deltas.append(detokenizer.finish())
    return deltas, "".join(delta.text for delta in deltas)


def random_ids(draw: random.Random, length: int) -> list[int]:
    kind = draw.randrange(3)
    if kind == 0:  # well-formed text in bytes, cut anywhere
        text = "".join(draw.choices("aé中😀\u0301\n🏽\u200d\ufffd", k=length)).encode()
        return list(text[draw.randrange(4) : len(text) - draw.randrange(4)])
    if kind == 1:
        return draw.choices(range(len(PIECES)), k=length)
    return draw.choices(
        [*range(SPECIAL, len(PIECES)), 0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xB8], k=length
    )


def reference(prompt: bytes, output: bytes) -> str:
    """What the output adds to the prompt, decoding both whole. Half a character at the prompt's end
    belongs to the output exactly if the output goes on with it."""
    half = _half_character(prompt)
    if half and output:
        goes_on = True
        try:
            (half + output[:1]).decode()
        except UnicodeDecodeError as error:
            goes_on = error.reason == "unexpected end of data"
        if goes_on:
            return (half + output).decode("utf-8", "replace")
    return output.decode("utf-8", "replace")


def test_fuzz_bytes() -> None:
    """20,000 streams: the deltas are the reference, nothing is early, no prompt text leaks."""
    draw = random.Random(18)
    completed_halves = 0
    for case in range(20_000):
        ids = random_ids(draw, draw.randint(1, 16))
        prompt = random_ids(draw, draw.randint(0, 4)) if draw.random() < 0.6 else []
        prompt = prompt[: prompt.index(SPECIAL)] if SPECIAL in prompt else prompt
        output = b"".join(PIECES[id_] for id_ in ids)
        prompt_bytes = b"".join(PIECES[id_] for id_ in prompt)
        tail: bytes | list[int] = prompt if draw.random() < 0.5 else prompt_bytes
        deltas, text = run(Detokenizer(PIECES, tail), ids)
        expected = reference(prompt_bytes, output)
        assert text == expected, case
        assert not any("\ud800" <= character <= "\udfff" for character in text), case
        assert sum(delta.num_tokens for delta in deltas) == len(ids), case
        completed_halves += expected != output.decode("utf-8", "replace")
        # Each prefix of the stream shows a prefix of the text, and U+FFFD only where it stays.
        shown = ""
        for delta in deltas:
            shown += delta.text
            assert expected.startswith(shown), case
    assert completed_halves > 100


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(PIECES)
    deltas, _ = run(detokenizer, list("a😀".encode()), finish=False)
    assert deltas == [("a", 1), ("", 0), ("", 0), ("", 0), ("😀", 4)]
    assert detokenizer.finish() == ("", 0)


def test_invalid_bytes_show_at_once_and_halves_at_the_end() -> None:
    detokenizer = Detokenizer(PIECES)
    assert detokenizer.feed(0xFF) == ("\ufffd", 1)
    assert detokenizer.feed(0xF0) == ("", 0)
    assert detokenizer.feed(0x9F) == ("", 0)
    assert detokenizer.feed(ord("a")) == ("\ufffda", 3)
    assert detokenizer.feed(0xE4) == ("", 0)
    assert detokenizer.finish() == ("\ufffd", 1)
    assert detokenizer.finish() == ("", 0) and detokenizer.feed(ord("a")) == ("", 0)


class TestPromptTail:
    def test_the_output_completes_it(self) -> None:
        for tail in ("secret 中".encode()[:-1], list("secret 中".encode()[:-1])):
            detokenizer = Detokenizer(PIECES, tail)
            assert detokenizer.feed("中".encode()[-1]) == ("中", 1)
            assert detokenizer.feed(ord("a")) == ("a", 1)

    def test_the_output_does_not_go_on_with_it(self) -> None:
        detokenizer = Detokenizer(PIECES, "secret 中".encode()[:-1])
        assert run(detokenizer, list(b"ab"))[1] == "ab"

    def test_nothing_comes(self) -> None:
        assert run(Detokenizer(PIECES, "secret 中".encode()[:-1]), [SPECIAL])[1] == ""

    def test_the_output_goes_on_but_never_ends_it(self) -> None:
        detokenizer = Detokenizer(PIECES, "😀".encode()[:2])
        assert run(detokenizer, ["😀".encode()[2]])[1] == "\ufffd"

    def test_a_special_token_ends_the_prompts_text(self) -> None:
        ids = [*"中".encode()[:2], SPECIAL]
        assert run(Detokenizer(PIECES, ids), list("é".encode()))[1] == "é"

    @pytest.mark.parametrize("whole", [b"", b"abc", "中文".encode(), b"\xff", b"a\x80\x80\x80\x80"])
    def test_a_whole_prompt_leaves_nothing(self, whole: bytes) -> None:
        assert run(Detokenizer(PIECES, whole), list("é".encode()))[1] == "é"


def first_match(text: str, ends: Sequence[int], stops: Sequence[str], minimum: int) -> int | None:
    """The plain definition: the first character with which a stop string is complete, fed by a
    token that is not before `minimum`. `ends[n]` are the characters that n tokens give."""
    for end in range(1, len(text) + 1):
        num_fed = next(count for count, size in enumerate(ends) if size >= end)
        if num_fed >= minimum and any(text[:end].endswith(stop) for stop in stops):
            return end
    return None


def test_fuzz_stop_strings() -> None:
    """10,000 streams x their chunkings: the text ends just before the stop string, no character of
    it was ever shown, nothing was held longer than needed, and all comes out at the end."""
    draw = random.Random(19)
    matched = 0
    for case in range(10_000):
        letters = draw.choice(["ab", "abc", "a😀", "aé\n"])
        text = "".join(draw.choices(letters, k=draw.randint(1, 24)))
        stops = [
            "".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4))
        ]
        data = text.encode()
        cuts = (
            sorted(draw.sample(range(1, len(data)), draw.randrange(len(data)))) if data[1:] else []
        )
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        minimum = draw.choice([0, 0, 0, 1, draw.randint(0, len(pieces) + 1)])
        # The characters that are complete after each token, decoding every prefix afresh.
        prefixes = [b"".join(pieces[:count]) for count in range(len(pieces) + 1)]
        ends = [len(prefix.decode("utf-8", "ignore")) for prefix in prefixes]
        end = first_match(text, ends, stops, minimum)
        detokenizer = Detokenizer(pieces, stop=stops, min_tokens=minimum)
        deltas, shown = run(detokenizer, range(len(pieces)))
        if end is None:
            assert detokenizer.stopped is None and shown == text, case
            visible, wholly = len(text), len(pieces)
        else:
            matched += 1
            found = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
            assert detokenizer.stopped == found, case
            visible = end - len(found)
            assert shown == text[:visible], case
            wholly = _num_whole(prefixes, visible)
        assert sum(delta.num_tokens for delta in deltas) == wholly, case
        _check_held(deltas, ends, text, stops, end, case)
        _check_released(deltas, prefixes, case)
    assert 2000 < matched < 9500


def _num_whole(prefixes: list[bytes], shown: int) -> int:
    """How many tokens are wholly within so many characters. One that ends in half a character is
    as long as the one that ends it."""
    needed = [len(prefix.decode("utf-8", "replace")) for prefix in prefixes]
    for i in range(len(prefixes) - 2, 0, -1):
        if needed[i] > len(prefixes[i].decode("utf-8", "ignore")):
            needed[i] = max(needed[i], needed[i + 1])
    return sum(size <= shown for size in needed) - 1


def _check_held(
    deltas: list[Delta],
    ends: list[int],
    text: str,
    stops: list[str],
    end: int | None,
    case: int,
) -> None:
    """Until the match, exactly the longest tail that may begin a stop string is held."""
    shown = 0
    for delta, size in zip(deltas, ends[1:], strict=False):
        shown += len(delta.text)
        if end is not None and size >= end:
            return
        seen = text[:size]
        held = max(
            (
                n
                for stop in stops
                for n in range(min(len(stop), size + 1))
                if seen.endswith(stop[:n])
            ),
            default=0,
        )
        assert size - shown == held, case


def _check_released(deltas: list[Delta], prefixes: list[bytes], case: int) -> None:
    """A token counts with exactly the delta that shows all of it."""
    shown = released = 0
    for index, delta in enumerate(deltas, 1):
        shown += len(delta.text)
        released += delta.num_tokens
        fed = prefixes[: index + 1]
        assert released == _num_whole(fed, shown), case


class TestStopStrings:
    def test_streaming(self) -> None:
        detokenizer = Detokenizer([b"a", b"S", b"T", b"OP rest"], stop=["STOP"])
        deltas, _ = run(detokenizer, [0, 1, 2, 3])
        assert deltas == [("a", 1), ("", 0), ("", 0), ("", 0), ("", 0)]
        assert detokenizer.stopped == "STOP"

    def test_false_alarm_is_shown_with_its_tokens(self) -> None:
        detokenizer = Detokenizer([b"a", b"S", b"T", b"x"], stop=["STOP"])
        assert run(detokenizer, [0, 1, 2, 3], finish=False)[0][-1] == ("STx", 3)

    def test_held_tail_is_flushed(self) -> None:
        detokenizer = Detokenizer([b"a", b"STO"], stop=["STOP"])
        assert run(detokenizer, [0, 1]) == ([("a", 1), ("", 0), ("STO", 1)], "aSTO")
        assert detokenizer.stopped is None

    @pytest.mark.parametrize("rest", ["😀".encode()[2:], b""])
    def test_half_a_character_counts_with_the_token_that_ends_it(self, rest: bytes) -> None:
        detokenizer = Detokenizer(
            [b"a", b" " + "😀".encode()[:2], rest + b"xS", b"TOP"], stop=["STOP"]
        )
        deltas, text = run(detokenizer, [0, 1, 2, 3])
        assert text == ("a 😀x" if rest else "a \ufffdx")
        assert [delta.num_tokens for delta in deltas] == [1, 0, 0, 0, 0]
        assert detokenizer.released_ends == [1]

    def test_visible_part_of_a_token(self) -> None:
        detokenizer = Detokenizer([b"one ", b"two STOP three"], stop=["STOP"])
        assert run(detokenizer, [0, 1]) == ([("one ", 1), ("two ", 0), ("", 0)], "one two ")

    def test_min_tokens(self) -> None:
        tokens = [b"STOP", b" a ", b"ST", b"OP"]
        detokenizer = Detokenizer(tokens, stop=["STOP"], min_tokens=2)
        assert run(detokenizer, [0, 1, 2, 3])[1] == "STOP a "
        late = Detokenizer(tokens, stop=["STOP"], min_tokens=5)
        assert run(late, [0, 1, 2, 3])[1] == "STOP a STOP" and late.stopped is None

    def test_a_stop_string_completed_by_the_flush(self) -> None:
        detokenizer = Detokenizer([b"a\xf0\x9f"], stop=["\ufffd"])
        assert run(detokenizer, [0]) == ([("a", 0), ("", 0)], "a")
        assert detokenizer.stopped == "\ufffd"

    def test_special_tokens_are_counted(self) -> None:
        detokenizer = Detokenizer([b"a", b"", b"S"], stop=["STOP"])
        assert run(detokenizer, [0, 1, 2, 1])[0] == [("a", 1), ("", 1), ("", 0), ("", 0), ("S", 2)]

    def test_empty_stop_string(self) -> None:
        with pytest.raises(ValueError, match="at least one character"):
            Detokenizer([], stop=["a", ""])

    def test_ids_without_a_token(self) -> None:
        assert run(Detokenizer([b"a"]), [0, 7, 0])[1] == "aa"


def test_cost_is_linear() -> None:
    """The worst case for holding back: a long near-match. Time grows with the text alone."""

    def seconds(count: int) -> float:
        detokenizer = Detokenizer([b"a" * 4], stop=["a" * 127 + "b", "a" * 64 + "c"])
        start = time.process_time()
        for _ in range(count):
            detokenizer.feed(0)
        return time.process_time() - start

    small, large = (min(seconds(count) for _ in range(3)) for count in (5000, 20_000))
    assert large < 8 * small


def test_default_model(smollm2: Tokenizer) -> None:
    text = "Zoë 👩‍👩‍👧 said 你好!\n\n" * 3
    ids = smollm2.encode(text)
    deltas, shown = run(Detokenizer(smollm2.token_bytes), ids)
    assert shown == text == smollm2.decode(ids)
    assert not any("\ufffd" in delta.text for delta in deltas)
