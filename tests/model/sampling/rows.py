"""Rows, logits and results for the tests of the sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.engine.messages import RequestError
from model.engine.request import SamplingParams
from model.sampling.sampler import SampledToken, Sampler, SamplingRow

MakeSampler = Callable[[int], Sampler]  # the fixture make_sampler: from a vocabulary's size

TOP = 64  # the sampler looks at this many of the highest logits first


def row(
    params: SamplingParams,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    ends: tuple[int, ...] = (),
    position: int | None = None,
) -> SamplingRow:
    prompt, output = prompt or [], output or []
    return SamplingRow(
        params, prompt, output, ends, len(prompt) + len(output) if position is None else position
    )


def tokens(results: list[SampledToken | RequestError]) -> list[int]:
    ids = []
    for result in results:
        assert isinstance(result, SampledToken), result
        ids.append(result.token_id)
    return ids


def random_logits(n: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3
