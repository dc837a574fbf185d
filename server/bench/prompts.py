"""Prompts of a wanted length, made from a list of words: the same seed gives the same prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Common words that are one token each, with the space before them, in the usual vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education big small large new old "
    "high long great little own good young local early hard white real best free able open clear "
    "strong whole simple common late general full green blue dark light short single ready quick "
    "north south east west summer winter river mountain forest garden street bridge window table"
)
_WORDS = tuple(dict.fromkeys(_TEXT.split()))


class Prompts:
    """Messages of about `lengths` tokens each (taken in turn by conversation), in which
    conversations share their first `shared_prefix` tokens and nothing else."""

    def __init__(self, seed: int, lengths: Sequence[int], shared_prefix: int = 0) -> None:
        self._seed = seed
        self._lengths = tuple(lengths)
        words = random.Random(f"{seed}:prefix").choices(_WORDS, k=shared_prefix)
        self._prefix = " ".join(words) + " " if words else ""

    def message(self, conversation: int, turn: int) -> str:
        """The user's message of a turn. The first words differ between conversations at once, so
        that no server finds a prompt in its cache by accident."""
        length = self._lengths[conversation % len(self._lengths)]
        draw = random.Random(f"{self._seed}:{conversation}:{turn}")
        # The conversation's number in words: two conversations differ within their first words.
        first = self._spell(conversation) if turn == 0 else []
        words = [*first, *draw.choices(_WORDS, k=max(length - len(first), 0))]
        return (self._prefix if turn == 0 else "") + " ".join(words[:length])

    def _spell(self, number: int) -> list[str]:
        # A shuffle by the seed: runs with other seeds do not share prompts either.
        order = list(_WORDS)
        random.Random(f"{self._seed}:order").shuffle(order)
        spelled = [order[number % len(order)]]
        while number := number // len(order):
            spelled.append(order[number % len(order)])
        return spelled
