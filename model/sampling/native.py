"""NativeSampler: the sampler of the native ops, one call of our own kernel for all rows.

It gives what `Sampler` gives, by the same rules; sums and exponentials may differ in their last
bits, so a draw that falls exactly on a border may fall to the other side. Its own results are
bitwise independent of the other rows and of the threads.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from model.engine.messages import RequestError, TokenLogprob
from model.ops.native import NativeOps
from model.sampling.penalties import Addresses
from model.sampling.sampler import (
    SampledToken,
    Sampler,
    SamplingRow,
    bounded,
    no_token,
    not_finite,
)

# SampleRow and SampleResult in sampling.hpp, field for field.
ROW = struct.Struct("=4d6Q3f6i4x")
RESULT = struct.Struct("=qd2f2i")
_DRAWN, _NO_TOKEN = 0, 1
_NO_TOPS = (torch.empty((0, 0), dtype=torch.int32), torch.empty((0, 0)))
_NO_EDITS: tuple[Addresses, tuple[int, int, int]] = (0, 0, 0, 0, 0), (0, 0, 0)


class NativeSampler(Sampler):
    """A `Sampler` by the kernels of `ops`. Its buffers hold nothing from call to call."""

    def __init__(self, vocab_size: int, ops: NativeOps) -> None:
        super().__init__(vocab_size, ops.device)
        self._ops = ops
        self._rows = ctypes.create_string_buffer(ROW.size)
        self._results = ctypes.create_string_buffer(RESULT.size)

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | RequestError]:
        self._check(logits, len(rows))
        if len(self._rows) < ROW.size * len(rows):
            self._rows = ctypes.create_string_buffer(ROW.size * len(rows))
            self._results = ctypes.create_string_buffer(RESULT.size * len(rows))
        errors: dict[int, RequestError] = {}
        drawn: list[SamplingRow] = []
        most = 0
        for i, row in enumerate(rows):
            try:
                ROW.pack_into(self._rows, ROW.size * len(drawn), *self._fields(i, row))
            except (ValueError, OverflowError) as error:
                errors[i] = RequestError("invalid_request_error", "invalid_value", str(error))
                continue
            drawn.append(row)
            most = max(most, row.params.top_logprobs or 0)
        tops = _NO_TOPS
        if most:
            shape = (len(drawn), min(most, self.vocab_size))
            tops = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        self._ops.sample(logits.contiguous(), len(drawn), self._rows, self._results, tops)
        results = iter(self._tokens(drawn, tops))
        return [errors[i] if i in errors else next(results) for i in range(len(rows))]

    def _fields(self, index: int, row: SamplingRow) -> tuple[float, ...]:
        """The fields of ROW. Raises ValueError or OverflowError for what cannot be applied."""
        p = row.params
        pointers, sizes = _NO_EDITS
        edits = row.prepared(self.vocab_size)
        if edits is not None:
            pointers, sizes = edits.packed(row.output_token_ids, must_end=row.must_end)
        drawing = p.temperature > 0
        return (
            row.draw() if drawing else 0.0,
            p.top_p,
            p.min_p,
            p.presence_penalty,
            *pointers,
            0 if row.allowed is None else row.allowed.address,
            bounded(p.temperature) if drawing else 0.0,
            p.repetition_penalty,
            p.frequency_penalty,
            index,
            p.top_k if 0 < p.top_k < self.vocab_size else self.vocab_size,
            *sizes,
            -1 if p.top_logprobs is None else min(p.top_logprobs, self.vocab_size),
        )

    def _tokens(
        self, rows: list[SamplingRow], tops: tuple[Tensor, Tensor]
    ) -> list[SampledToken | RequestError]:
        """What the kernel left in the buffers."""
        ids, values = (t.tolist() for t in tops)
        tokens: list[SampledToken | RequestError] = []
        for i, row in enumerate(rows):
            rank, total, highest, chosen, token, state = RESULT.unpack_from(
                self._results, RESULT.size * i
            )
            top_n = row.params.top_logprobs
            if state != _DRAWN:
                tokens.append(no_token() if state == _NO_TOKEN else not_finite())
            elif top_n is None:
                tokens.append(SampledToken(token, None))
            else:
                norm = highest + math.log(total)
                top: list[tuple[int, float]] = []
                if top_n:
                    pairs = zip(ids[i][:top_n], values[i][:top_n], strict=True)
                    top = [(t, value - norm) for t, value in pairs]
                tokens.append(SampledToken(token, TokenLogprob(token, chosen - norm, rank, top)))
        return tokens
