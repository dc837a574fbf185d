"""Logits to tokens, for the whole batch at once.

In this order: logit bias, penalties, end tokens held back (`penalties`); what a grammar does not
allow is taken out (`allowed`); then temperature, top-k,
top-p over what top-k left, min-p relative to the most probable token; then one counter-based draw
(`draws`) by inverse CDF. Log-probabilities are of the raw distribution (`logprobs`).

A row's token is a function of the row alone. Sums are taken in one order whatever the batch and
the threads, and which way a row goes is decided by its own values: on a CPU the same bits come out
for one row and for sixteen. The vocabulary is never sorted: most filtered distributions lie within
the 64 highest logits, and those that reach further are cut by a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.engine.messages import RequestError, TokenLogprob
from model.engine.request import SamplingParams
from model.sampling.allowed import AllowedTokens
from model.sampling.draws import uniform
from model.sampling.logprobs import BLOCK, block_sums, in_blocks, raw_logprobs
from model.sampling.penalties import EditBatch, RowEdits, needs_edits
from model.sampling.ranking import ranked_top, shortest_prefix

_TOP = 64
# Lower weights are none: floats without their full precision, that not every machine computes.
_LEAST_WEIGHT = torch.finfo(torch.float32).tiny


@dataclass(slots=True)
class SamplingRow:
    """What the sampler knows of one request. Keep the object from step to step, with
    `output_token_ids` growing and `position` moved on: `edits` is filled by the sampler and costs
    time only for what is new.

    `end_token_ids` are all ids that would end the request (the model's own unless ignored, and the
    stop ids). `position` is that of the token to be drawn: len(prompt) + len(output). `allowed`
    are the tokens that may be drawn, where not all of them may.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    end_token_ids: tuple[int, ...]
    position: int
    edits: RowEdits | None = field(default=None, repr=False, compare=False)
    allowed: AllowedTokens | None = field(default=None, repr=False, compare=False)

    @property
    def must_end(self) -> bool:
        """Whether only an end token may be drawn, however few tokens there are."""
        return self.allowed is not None and self.allowed.must_end

    def prepared(self, vocab_size: int) -> RowEdits | None:
        """The edits, prepared on the first call; None where there are none. Raises ValueError or
        OverflowError for parameters that cannot be applied."""
        if self.edits is None and needs_edits(self.params):
            self.edits = RowEdits(
                self.params, self.prompt_token_ids, self.end_token_ids, vocab_size
            )
        return self.edits

    def draw(self) -> float:
        """The random number of the token to be drawn, in [0, 1)."""
        p = self.params
        return uniform(p.seed, p.prompt_index, p.choice_index, self.position)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, and its raw log-probability where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Draws one token for each row of logits. It keeps no state of its own."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}, but it must be at least 1")
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | RequestError]:
        """One result for each row of `logits` [rows, vocab] fp32, which is left as it is.

        Whatever is wrong with one row (NaN or +inf among its logits, no token left to draw, a
        parameter that cannot be applied) is a RequestError in its place, and the others are
        unharmed. Raises ValueError when the shape or the type of `logits` does not fit."""
        self._check(logits, len(rows))
        if not rows:
            return []
        with torch.inference_mode():
            blocks, errors = self._edited(logits, rows)
            drawn, highest = self._draw(blocks, rows, errors)
            results: list[SampledToken | RequestError] = []
            for i, high in enumerate(highest):
                error = errors.get(i) or _unusable(high)
                results.append(error or SampledToken(drawn[i], None))
            self._add_logprobs(logits, rows, results)
        return results

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, top_n: int) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's own tokens: `logits` [n, vocab] fp32, and `targets` [n]
        the token that follows each. Raises ValueError when a target is outside the vocabulary or a
        row has no log-probabilities (NaN or +inf in it)."""
        with torch.inference_mode():
            entries = raw_logprobs(logits, targets.tolist(), [top_n] * logits.shape[0])
        for i, entry in enumerate(entries):
            if math.isnan(entry.logprob):
                raise ValueError(f"the logits of prompt position {i} are not finite")
        return entries

    def _check(self, logits: Tensor, num_rows: int) -> None:
        expected = (num_rows, self.vocab_size)
        if logits.shape != expected or logits.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, "
                f"but float32 {list(expected)} was expected"
            )

    def _edited(
        self, logits: Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[Tensor, dict[int, RequestError]]:
        """The logits after bias, penalties and bans as [rows, blocks, BLOCK]; failed rows."""
        errors: dict[int, RequestError] = {}
        blocks = in_blocks(logits.contiguous(), float("-inf"))
        batch = EditBatch(blocks.shape[1] * BLOCK)
        for i, row in enumerate(rows):
            try:
                edits = row.prepared(self.vocab_size)
                if edits is not None:
                    batch.add(i, edits, row.output_token_ids, must_end=row.must_end)
            except (ValueError, OverflowError) as error:
                errors[i] = RequestError("invalid_request_error", "invalid_value", str(error))
        restricted = [(i, r.allowed) for i, r in enumerate(rows) if r.allowed is not None]
        if not batch.empty or restricted:
            if blocks.data_ptr() == logits.data_ptr():
                blocks = blocks.clone()
            batch.apply(blocks)
        for i, allowed in restricted:
            forbidden = torch.from_numpy(~allowed.as_booleans(self.vocab_size)).to(blocks.device)
            blocks[i].view(-1)[: self.vocab_size].masked_fill_(forbidden, float("-inf"))
        return blocks, errors

    def _draw(
        self, blocks: Tensor, rows: Sequence[SamplingRow], errors: dict[int, RequestError]
    ) -> tuple[list[int], list[float]]:
        """A token for each row, and each row's highest logit (not finite: the token is void)."""
        # amax passes a NaN on, so the highest logit also tells whether the row can be used.
        maxima = blocks.amax(-1)
        highest = maxima.amax(-1)
        block = maxima.argmax(-1, keepdim=True)
        inner = torch.take_along_dim(blocks, block[..., None], 1)[:, 0].argmax(-1)
        tokens = block[:, 0] * BLOCK + inner  # argmax takes the first of equals: the lowest id

        drawing = [i for i, r in enumerate(rows) if r.params.temperature > 0 and i not in errors]
        filtered = [i for i in drawing if self._is_filtered(rows[i].params)]
        plain = [i for i in drawing if not self._is_filtered(rows[i].params)]
        if filtered:
            batch = _Drawing(blocks, highest, rows, filtered)
            tokens[batch.index] = self._draw_filtered(batch)
        if plain:
            batch = _Drawing(blocks, highest, rows, plain)
            tokens[batch.index] = _draw_in_order(batch.weights(), batch.draws)
        both = torch.stack([tokens.double(), highest.double()]).tolist()
        return [int(token) for token in both[0]], both[1]

    def _is_filtered(self, params: SamplingParams) -> bool:
        return params.top_p < 1.0 or params.min_p > 0.0 or 0 < params.top_k < self.vocab_size

    def _draw_filtered(self, batch: _Drawing) -> Tensor:
        """Tokens [r] of the rows with top-k, top-p or min-p, from their 64 highest logits where
        these decide it."""
        values, ids = ranked_top(batch.x, _TOP)
        weights = ((values - batch.highest) / batch.temperature).exp().double()
        sums = weights.cumsum(-1)
        place = torch.arange(_TOP, device=values.device)

        top_k, top_p, min_p = batch.filters(self.vocab_size)
        whole = sums.gather(-1, (top_k - 1).clamp(max=_TOP - 1))  # what top-p is relative to
        open_ended = [
            i for i, p in enumerate(batch.params) if p.top_p < 1.0 and not 0 < p.top_k <= _TOP
        ]
        if open_ended:
            whole[open_ended] = block_sums(batch.weights(open_ended))[:, -1:]
        # A token is in while the mass before it is short of top-p; the first always is.
        kept = (sums - weights < top_p * whole) | (top_p >= 1.0) | (place == 0)
        kept &= (place < top_k) & (weights >= min_p) & (weights >= _LEAST_WEIGHT)
        count = kept.count_nonzero(-1)[:, None].clamp(min=1)
        target = batch.draws * sums.gather(-1, count - 1)
        chosen = torch.minimum((sums <= target).count_nonzero(-1)[:, None], count - 1)
        tokens = ids.gather(-1, chosen)[:, 0]

        # The 64 decide when the last one kept is above the last one seen: then no token that is
        # in, nor an equal of one, was left out. A top-p within a larger top-k is relative to more.
        decided = values.gather(-1, count - 1) > values[:, -1:]
        decided &= (top_k <= _TOP) | (top_k == self.vocab_size) | (top_p >= 1.0)
        decided |= ~batch.highest.isfinite()
        beyond = [i for i, done in enumerate(decided[:, 0].tolist()) if not done]
        if beyond:
            tokens[beyond] = _draw_in_order(self._cut(batch, beyond), batch.draws[beyond])
        return tokens

    def _cut(self, batch: _Drawing, places: list[int]) -> Tensor:
        """The weights [r, blocks, BLOCK] of the given rows of the batch, 0 for what the filters
        take out: exact however far they reach."""
        weights = batch.weights(places)
        for row, place in zip(weights.view(len(places), -1), places, strict=True):
            params, x = batch.params[place], batch.x[place]
            if 0 < params.top_k < self.vocab_size:
                keep = shortest_prefix(x, torch.ones_like(x, dtype=torch.float64), params.top_k)
                row.mul_(keep)
            if params.top_p < 1.0:
                whole = float(block_sums(row.view(1, -1, BLOCK))[0, -1])
                keep = shortest_prefix(x, row.double(), params.top_p * whole)
                row.mul_(keep)
            if params.min_p > 0.0:
                row.mul_(row.double() >= params.min_p)
        return weights

    def _add_logprobs(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        results: list[SampledToken | RequestError],
    ) -> None:
        """Put the raw log-probabilities into the results of the rows that ask for them."""
        places, targets, top_ns = [], [], []
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            if row.params.top_logprobs is not None and isinstance(result, SampledToken):
                places.append(i)
                targets.append(result.token_id)
                top_ns.append(row.params.top_logprobs)
        if not places:
            return
        picked = logits if len(places) == len(rows) else logits[places]
        for i, entry in zip(places, raw_logprobs(picked, targets, top_ns), strict=True):
            if math.isnan(entry.logprob):
                results[i] = not_finite()
            else:
                results[i] = SampledToken(entry.token_id, entry)


class _Drawing:
    """The rows of a batch that are drawn in one way, r of them, and their parameters as tensors."""

    def __init__(
        self, blocks: Tensor, highest: Tensor, rows: Sequence[SamplingRow], picked: list[int]
    ) -> None:
        self.params = [rows[i].params for i in picked]
        self.index = torch.tensor(picked, device=blocks.device)
        everything = len(picked) == len(rows)
        self._blocks = blocks if everything else blocks[self.index]
        self.x = self._blocks.view(len(picked), -1)
        self.highest = highest[self.index][:, None]
        heat = [bounded(p.temperature) for p in self.params]
        self.temperature = torch.tensor(heat, dtype=torch.float32, device=blocks.device)[:, None]
        draws = [rows[i].draw() for i in picked]
        self.draws = torch.tensor(draws, dtype=torch.float64, device=blocks.device)[:, None]

    def weights(self, places: list[int] | None = None) -> Tensor:
        """exp((x - highest) / temperature) of all rows, or of those at `places`, as a new tensor
        [r, blocks, BLOCK] fp32; the most probable token has exactly 1."""
        if places is None or len(places) == len(self.params):
            blocks, highest, temperature = self._blocks, self.highest, self.temperature
        else:
            blocks = self._blocks[places]
            highest, temperature = self.highest[places], self.temperature[places]
        return (blocks - highest[..., None]).div_(temperature[..., None]).exp_()

    def filters(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """top_k (the vocabulary's size when off) int64, top_p and min_p float64, each [r, 1]."""
        device = self.index.device
        ks = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in self.params]
        pairs = [(p.top_p, p.min_p) for p in self.params]
        both = torch.tensor(pairs, dtype=torch.float64, device=device)
        return torch.tensor(ks, device=device)[:, None], both[:, :1], both[:, 1:]


def _draw_in_order(weights: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF over the vocabulary in its own order: `weights` [r, blocks, BLOCK] fp32 >= 0,
    `draws` [r, 1] in [0, 1) -> ids [r]. First the block is found, then the token within it."""
    running = block_sums(weights)
    target = draws * running[:, -1:]
    block = (running <= target).count_nonzero(-1)[:, None].clamp(max=running.shape[1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = torch.take_along_dim(weights, block[..., None], 1)[:, 0]
    place = (before + inner.double().cumsum(-1) <= target).count_nonzero(-1)
    # The block's fp32 sum may round above the sum of its tokens: never go past the last real one.
    last = torch.where(inner > 0, torch.arange(BLOCK, device=weights.device), 0).amax(-1)
    return block[:, 0] * BLOCK + torch.minimum(place, last)


def bounded(temperature: float) -> float:
    """The temperature within float32, and such that 0 / t is 0 and -inf / t is -inf."""
    return min(max(temperature, 1e-30), 1e30)


def _unusable(highest: float) -> RequestError | None:
    """Why a row with this highest logit has no token, or None."""
    if math.isfinite(highest):
        return None
    return no_token() if highest == -math.inf else not_finite()


def no_token() -> RequestError:
    """The error of a row in which everything is ruled out."""
    return RequestError(
        "invalid_request_error",
        "invalid_value",
        "no token is left to draw: masks, bias and min_tokens rule out the whole vocabulary",
    )


def not_finite() -> RequestError:
    """The error of a row with NaN or infinity."""
    return RequestError(
        "server_error",
        "internal",
        "the model's logits for this request are not finite numbers (NaN or infinity); "
        "the other requests are not affected",
    )
