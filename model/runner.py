"""ModelRunner: the plan of a step in ints -> tensors -> decoder -> sampler -> ints."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch

from model.attention import AttentionMetadata
from model.decoder import Decoder
from model.engine.grammars import Matcher
from model.engine.messages import RequestError, TokenLogprob
from model.engine.refusal import grammar_refused
from model.engine.request import Request
from model.engine.scheduler import ScheduledBatch, ScheduledSequence
from model.grammar import GrammarError, deep_thread
from model.kv import KVCache
from model.sampling.sampler import SampledToken, Sampler, SamplingRow


@dataclass(slots=True)
class StepResult:
    """Per request id: the drawn token or its error; log-probabilities of prompt tokens."""

    drawn: dict[str, SampledToken | RequestError] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)


class ModelRunner:
    """Runs a `ScheduledBatch` over one decoder, one KV cache and one sampler."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        sampler: Sampler,
        *,
        end_token_ids: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sampler = sampler
        self._end_token_ids = end_token_ids
        self._device = device

    @cached_property
    def _matching(self) -> ThreadPoolExecutor:
        return deep_thread("matchers")

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch's tokens and draw for the sequences that reached their end."""
        matched = self._advance_matchers([s.request for s in batch.sequences if s.samples])
        token_ids, meta = self._tensors(batch.sequences)
        hidden = self._decoder.forward(token_ids, self._kv, meta)
        result = StepResult()
        self._prompt_logprobs(batch, hidden, meta.query_start, result)
        sampling = [i for i, s in enumerate(batch.sequences) if s.samples]
        if sampling:
            last = torch.tensor([meta.query_start[i + 1] - 1 for i in sampling])
            logits = self._decoder.logits(hidden[last.to(self._device)])
            requests = [batch.sequences[i].request for i in sampling]
            if matched is not None:
                result.drawn.update(matched.result())
            drawn = self._sampler.sample(logits, [self._sampling_row(r) for r in requests])
            for request, token in zip(requests, drawn, strict=True):
                result.drawn.setdefault(request.id, token)
        return result

    def _advance_matchers(
        self, requests: Sequence[Request]
    ) -> Future[dict[str, RequestError]] | None:
        """What a grammar allows is a function of the tokens so far, so it is found beside the
        forward pass. The result has those that fail; None where there are no grammars."""
        pairs = [(r, r.matcher) for r in requests if isinstance(r.matcher, Matcher)]
        return self._matching.submit(_advance, pairs) if pairs else None

    def _tensors(
        self, sequences: list[ScheduledSequence]
    ) -> tuple[torch.Tensor, AttentionMetadata]:
        size = self._kv.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start, seq_lens = [0], []
        for s in sequences:
            end = s.start + s.num_tokens
            table = s.request.block_table
            ids += s.request.token_ids[s.start : end]
            positions += range(s.start, end)
            slots += [table[p // size] * size + p % size for p in range(s.start, end)]
            query_start.append(len(ids))
            seq_lens.append(end)
        width = max(-(-length // size) for length in seq_lens)
        tables = [
            (s.request.block_table[:width] + [0] * width)[:width]  # padding is masked
            for s in sequences
        ]
        data = torch.tensor([ids, positions, slots], dtype=torch.int64).to(self._device)
        meta = AttentionMetadata(
            positions=data[1],
            slot_mapping=data[2],
            block_tables=torch.tensor(tables, dtype=torch.int64).to(self._device),
            query_start=query_start,
            seq_lens=seq_lens,
        )
        return data[0], meta

    def _sampling_row(self, request: Request) -> SamplingRow:
        row = request.sampling
        if not isinstance(row, SamplingRow):
            params = request.params
            ends = () if params.ignore_eos else self._end_token_ids
            row = SamplingRow(
                params=params,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=request.output_token_ids,
                end_token_ids=tuple(dict.fromkeys(ends + params.stop_token_ids)),
                position=0,
                allowed=request.matcher.allowed if isinstance(request.matcher, Matcher) else None,
            )
            request.sampling = row
        row.position = len(request.token_ids)
        return row

    def _prompt_logprobs(
        self,
        batch: ScheduledBatch,
        hidden: torch.Tensor,
        query_start: list[int],
        result: StepResult,
    ) -> None:
        """The tokens at start+1 .. end of a prompt are predicted by the rows start .. end-1."""
        for i, s in enumerate(batch.sequences):
            if not s.request.params.prompt_logprobs:
                continue
            # What was told before a preemption is not told again.
            first = max(s.start, s.request.num_told_logprobs)
            targets = s.request.prompt_token_ids[first + 1 : s.start + s.num_tokens + 1]
            if not targets:
                continue
            s.request.num_told_logprobs = first + len(targets)
            row = query_start[i] + first - s.start
            rows = hidden[row : row + len(targets)]
            logits = self._decoder.logits(rows)
            try:
                result.prompt_logprobs[s.request.id] = self._sampler.prompt_logprobs(
                    logits,
                    torch.tensor(targets, device=self._device),
                    s.request.params.top_logprobs or 0,
                )
            except ValueError as error:  # this request's own trouble
                failure = RequestError("server_error", "internal", str(error))
                result.drawn[s.request.id] = failure


def _advance(pairs: list[tuple[Request, Matcher]]) -> dict[str, RequestError]:
    failed: dict[str, RequestError] = {}
    for request, matcher in pairs:
        try:
            matcher.advance(request.output_token_ids)
        except GrammarError as error:
            failed[request.id] = grammar_refused(error)
        except BaseException as error:  # a panic in Rust is no Exception
            failed[request.id] = RequestError("server_error", "internal", f"grammar: {error}")
    return failed
