"""Perplexity, KL divergence and top-1 agreement of logits against a reference's."""

from __future__ import annotations

import math
from typing import Any

import torch


class Divergence:
    """Sums over rows. A row is one position: the logits after a token, and the token that came."""

    def __init__(self) -> None:
        self.count = 0
        self._nll = 0.0
        self._agreed = 0
        self._kl: list[torch.Tensor] = []

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """`reference`: log-probabilities [rows, vocab] fp32; `logits`: [rows, vocab]; `targets`:
        [rows] int64."""
        ours = logits.float().log_softmax(-1)
        self._nll -= float(ours.gather(1, targets[:, None]).double().sum())
        self._agreed += int((ours.argmax(-1) == reference.argmax(-1)).sum())
        kl = (reference.exp() * (reference - ours)).sum(-1, dtype=torch.float64)
        self._kl.append(kl)
        self.count += len(targets)

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p(token)."""
        return math.exp(self._nll / self.count)

    @property
    def mean_kl(self) -> float:
        """The mean of sum over the vocabulary of p_reference * log(p_reference / p), in nats."""
        return float(torch.cat(self._kl).mean())

    @property
    def agreement(self) -> float:
        """The share of rows whose most probable token is the reference's."""
        return self._agreed / self.count

    def as_document(self, reference: Divergence) -> dict[str, Any]:
        """The numbers, and the perplexity as a multiple of the reference's."""
        kl = torch.cat(self._kl)
        return {
            "perplexity": round(self.perplexity, 4),
            "perplexity_ratio": round(self.perplexity / reference.perplexity, 5),
            "mean_kl": round(self.mean_kl, 6),
            "mean_kl_error": round(float(kl.std()) / math.sqrt(len(kl)), 6) if len(kl) > 1 else 0.0,
            "kl_p99": round(float(kl.quantile(0.99)), 5),
            "top1_agreement": round(self.agreement, 5),
        }
