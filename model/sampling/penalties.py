"""What one request changes in its logits: bias, penalties, and end tokens held back.

The host keeps, for each request, arrays that grow with its tokens; the device sees one gather and
one scatter for the whole batch. It knows nothing of temperature, filters or draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.engine.request import SamplingParams

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Addresses = tuple[int, ...]


def _checked(token_ids: Ids, vocab_size: int, what: str) -> Ids:
    """The same ids. Raises ValueError for one outside the vocabulary: it would reach a neighbour's
    logits."""
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise ValueError(
            f"{what} has token id {wrong}, but the ids of this model are 0 to {vocab_size - 1}"
        )
    return token_ids


class TokenCounts:
    """The distinct tokens of a request and how often each is in its output.

    `update` costs time only for tokens that are new since the last call. Prompt tokens are entered
    with count 0, and only when asked for (the repetition penalty is the one that sees them).
    `addresses` are those of the ids (int64) and the counts (float32), for the native kernel.
    """

    __slots__ = ("_counts", "_ids", "_num_counted", "_places", "_vocab_size", "addresses")

    def __init__(self, vocab_size: int, prompt_token_ids: Sequence[int]) -> None:
        """Raises ValueError when a prompt token is outside the vocabulary."""
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._vocab_size = vocab_size
        self._ids = _checked(distinct, vocab_size, "the prompt")
        self._counts = np.zeros(distinct.size, dtype=np.float32)
        self._places: dict[int, int] = {token: i for i, token in enumerate(distinct.tolist())}
        self._num_counted = 0
        self._moved()

    def _moved(self) -> None:
        # Asking numpy for an address takes longer than all else that a step does here.
        self.addresses = (self._ids.ctypes.data, self._counts.ctypes.data)

    def update(self, output_token_ids: Sequence[int]) -> tuple[Ids, Floats]:
        """Count the output tokens after those counted so far, and return (ids, counts), the same
        length, ids distinct. Views: valid until the next call. Raises ValueError when a token is
        outside the vocabulary."""
        for token in output_token_ids[self._num_counted :]:
            place = self._places.get(token)
            if place is None:
                place = self._add(token)
            self._counts[place] += 1
            self._num_counted += 1
        size = len(self._places)
        return self._ids[:size], self._counts[:size]

    def _add(self, token: int) -> int:
        _checked(np.asarray([token]), self._vocab_size, "the output")
        place = len(self._places)
        if place == self._ids.size:
            spare = max(64, place)
            self._ids = np.concatenate([self._ids, np.zeros(spare, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(spare, dtype=np.float32)])
            self._moved()
        self._ids[place] = token
        self._places[token] = place
        return place


def needs_edits(params: SamplingParams) -> bool:
    """Whether a request with these parameters can change its logits at all."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.min_tokens
    )


class RowEdits:
    """The edits of one request, prepared once and kept up to date token by token."""

    __slots__ = ("_addresses", "bias_ids", "bias_values", "counts", "end_ids", "params")

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """Raises ValueError for an id outside the vocabulary, a bias that is not a finite float32
        or a repetition penalty that is not positive. End tokens outside the vocabulary are left
        out: they can never be drawn."""
        bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self.bias_ids = _checked(bias_ids, vocab_size, "logit_bias")
        biases = np.fromiter(params.logit_bias.values(), dtype=np.float64)
        if not (np.abs(biases) <= np.finfo(np.float32).max).all():
            raise ValueError("logit_bias has a value that is not a finite number; use -100 to 100")
        self.bias_values: Floats = biases.astype(np.float32)
        if not params.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty is {params.repetition_penalty}, but it must be over 0"
            )
        ends = np.asarray(end_token_ids, dtype=np.int64)
        self.end_ids: Ids = ends[(ends >= 0) & (ends < vocab_size)]
        self._addresses = tuple(
            array.ctypes.data for array in (self.bias_ids, self.bias_values, self.end_ids)
        )
        self.params = params
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0:
            self.counts = TokenCounts(vocab_size, prompt_token_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts(vocab_size, [])

    def packed(
        self, output_token_ids: Sequence[int], *, must_end: bool = False
    ) -> tuple[Addresses, tuple[int, int, int]]:
        """The edits of one step for the native kernel: the addresses of token ids, their counts,
        bias ids, bias and banned ids, valid until the next call, and the sizes of the three lists.
        With `must_end` no end token is banned. Raises ValueError when an output token is outside
        the vocabulary."""
        counted = (0, 0)
        num_counted = 0
        if self.counts is not None:
            num_counted = self.counts.update(output_token_ids)[0].size
            counted = self.counts.addresses
        bans = len(output_token_ids) < self.params.min_tokens and not must_end
        return (
            (*counted, *self._addresses),
            (num_counted, self.bias_ids.size, self.end_ids.size if bans else 0),
        )


class EditBatch:
    """Collects the edits of the rows of one step, then applies each kind with one scatter."""

    def __init__(self, stride: int) -> None:
        """`stride` is the number of cells from one row of the logits to the next."""
        self._stride = stride
        self._bias: list[tuple[Ids, Floats]] = []
        self._penalised: list[tuple[Ids, Floats, Floats]] = []
        self._banned: list[Ids] = []

    @property
    def empty(self) -> bool:
        """Whether there is nothing to apply."""
        return not (self._bias or self._penalised or self._banned)

    def add(
        self,
        row: int,
        edits: RowEdits,
        output_token_ids: Sequence[int],
        *,
        must_end: bool = False,
    ) -> None:
        """Take one row's edits; with `must_end` no end token is banned. Raises ValueError when an
        output token is outside the vocabulary; nothing of the row is taken then."""
        base = row * self._stride
        params = edits.params
        if edits.counts is not None:
            ids, counts = edits.counts.update(output_token_ids)
            lowered = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
            repetition = np.full(ids.size, params.repetition_penalty, dtype=np.float32)
            self._penalised.append((ids + base, repetition, lowered.astype(np.float32)))
        if edits.bias_ids.size:
            self._bias.append((edits.bias_ids + base, edits.bias_values))
        if edits.end_ids.size and len(output_token_ids) < params.min_tokens and not must_end:
            self._banned.append(edits.end_ids + base)

    def apply(self, logits: Tensor) -> None:
        """Edit `logits` [rows, stride] (contiguous, fp32) in place, in this order: add the bias;
        repetition penalty r: x / r when x > 0, else x * r (Keskar et al. 2019, CTRL); subtract
        presence * (count > 0) + frequency * count (as OpenAI defines them); ban end tokens."""
        flat = logits.view(-1)
        device = logits.device
        if self._bias:
            cells = torch.from_numpy(np.concatenate([b[0] for b in self._bias])).to(device)
            values = torch.from_numpy(np.concatenate([b[1] for b in self._bias])).to(device)
            flat[cells] = flat[cells] + values
        if self._penalised:
            cells = torch.from_numpy(np.concatenate([p[0] for p in self._penalised])).to(device)
            rate = torch.from_numpy(np.concatenate([p[1] for p in self._penalised])).to(device)
            lowered = torch.from_numpy(np.concatenate([p[2] for p in self._penalised])).to(device)
            x = flat[cells]
            flat[cells] = torch.where(x > 0, x / rate, x * rate) - lowered
        if self._banned:
            cells = torch.from_numpy(np.concatenate(self._banned)).to(device)
            flat[cells] = float("-inf")
