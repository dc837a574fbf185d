"""AttentionMetadata: what attention needs to know about one step's ragged batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """The tensors of one step. T tokens of S sequences lie one sequence after another.

    positions: [T] int64, each token's place in its sequence.
    slot_mapping: [T] int64, the cell (block id * block_size + offset) its K/V is written to.
    block_tables: [S, max_blocks] int64, logical -> block id; what lies past a sequence is not read.
    query_start: S + 1 ints; sequence s has the tokens query_start[s] .. query_start[s + 1].
    seq_lens: S ints, the keys of each sequence after this step's tokens are written.
    derived: what the ops compute from the above once a step and use in every layer.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: list[int]
    seq_lens: list[int]
    derived: dict[str, Any] = field(default_factory=dict, repr=False)
