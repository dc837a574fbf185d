"""Running our decoder by hand, and transformers beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from model.attention import AttentionMetadata
from model.config import DecoderConfig, from_hf
from model.decoder import Decoder
from model.kv import KVCache
from model.ops.base import Ops
from model.ops.reference import ReferenceOps
from model.weights.load import load_weights


def read_config(folder: Path) -> DecoderConfig:
    return from_hf(json.loads((folder / "config.json").read_text()))


def load_decoder(folder: Path, ops: Ops | None = None, max_model_len: int | None = None) -> Decoder:
    config = read_config(folder)
    ops = ops or ReferenceOps()
    return Decoder(config, load_weights(folder, config, ops), ops, max_model_len)


def expected_logits(
    folder: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What transformers computes: [len(token_ids), vocab] fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0].float()


def make_tokens(count: int, seed: int = 0, vocab_size: int = 512) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(count)]


class Pool:
    """Sequences over one KV cache, their blocks in random order, as a long-lived pool has them."""

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[Sequence[int]],
        block_size: int = 16,
        num_blocks: int = 128,
    ) -> None:
        self.decoder = decoder
        self.sequences = sequences
        self.kv = KVCache(decoder.config, num_blocks, block_size, decoder.ops)
        # What attention must not read is poison.
        self.kv.tensor.fill_(float("nan"))
        blocks = list(range(num_blocks))
        random.Random(block_size).shuffle(blocks)
        self.tables: list[list[int]] = []
        for tokens in sequences:
            count = -(-len(tokens) // block_size)
            self.tables.append([blocks.pop() for _ in range(count)])
        self.computed = [0] * len(sequences)

    def step(self, plan: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Compute (sequence, number of tokens) pairs in one batch; all their tokens' logits."""
        size = self.kv.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths = [0], []
        for index, count in plan:
            first = self.computed[index]
            span = range(first, first + count)
            self.computed[index] += count
            ids += self.sequences[index][first : first + count]
            positions += span
            slots += [self.tables[index][p // size] * size + p % size for p in span]
            starts.append(len(ids))
            lengths.append(first + count)
        width = max(len(self.tables[index]) for index, _ in plan)
        tables = [(self.tables[index] + [0] * width)[:width] for index, _ in plan]
        device = self.decoder.ops.device
        meta = AttentionMetadata(
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            block_tables=torch.tensor(tables, device=device),
            query_start=starts,
            seq_lens=lengths,
        )
        hidden = self.decoder.forward(torch.tensor(ids, device=device), self.kv, meta)
        logits = self.decoder.logits(hidden)
        return list(logits.split([count for _, count in plan]))

    def run(self, index: int, chunks: Sequence[int]) -> torch.Tensor:
        """One sequence alone in chunks of these lengths; the logits of all tokens."""
        return torch.cat([self.step([(index, count)])[0] for count in chunks])


def assert_logits_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert theirs.std() > 10 * tolerance, "the logits are too flat to compare"
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=tolerance)
