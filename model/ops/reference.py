"""ReferenceOps: every op in plain torch, on any device. The oracle of all other implementations.

Weights are dequantised when loaded. Attention gathers each sequence's keys out of the block pool:
all sequences with one new token together (in groups of similar length), each prefill chunk alone.
What depends only on the batch is computed once a step and kept on the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from model.attention import AttentionMetadata
from model.config import DecoderConfig
from model.ops.base import Weight
from model.ops.tap import Tap, TappedOps
from model.rope import RopeTable
from model.weights.raw_tensor import RawTensor

if TYPE_CHECKING:
    from model.decoder import Decoder
    from model.kv import KVCache

# Keys gathered at a time for decodes. On a CPU the copy should still be in the core's cache when
# attention reads it; elsewhere fewer, larger calls are better.
_CPU_GROUP_CELLS = 1024
_GROUP_CELLS = 1 << 19
_FEW_ROWS = 64


class Dense(Weight):
    """A dequantised tensor and, for some linear layers, its bias."""

    __slots__ = ("bias", "tensor")

    def __init__(self, tensor: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.tensor = tensor
        self.bias = bias


@dataclass(slots=True)
class _Group:
    """Sequences that attend together: one new token each, or one sequence with many.

    rows: [n] tokens of the batch; cells: [S * max_len] where their keys lie; positions: [n].
    plain: without a window no mask is needed (decodes of one length; a prefill from position 0,
    which is simply causal)."""

    rows: torch.Tensor | slice
    cells: torch.Tensor
    positions: torch.Tensor
    max_len: int
    num_sequences: int
    plain: bool
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """[n, max_len], what to add to the scores: 0 where the row sees the key, else minus
        infinity (torch would turn a bool mask into it in every layer). None for a plain group."""
        if window is not None and window >= self.max_len:
            window = None
        if window not in self.masks:
            if window is None and self.plain:
                self.masks[window] = None
            else:
                keys = torch.arange(self.max_len, device=self.positions.device)
                distance = self.positions[:, None] - keys
                seen = distance >= 0
                if window is not None:
                    seen &= distance < window
                bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
                self.masks[window] = bias.masked_fill_(~seen, float("-inf"))
        return self.masks[window]


def _cells(blocks: torch.Tensor, block_size: int, keys: torch.Tensor) -> torch.Tensor:
    """blocks [S, max_blocks], keys [S, n] -> the cells of those keys, [S, n]."""
    return blocks.gather(1, keys // block_size) * block_size + keys % block_size


def _groups(meta: AttentionMetadata, block_size: int) -> list[_Group]:
    device = meta.positions.device
    groups: list[_Group] = []
    decodes: list[int] = []
    for index, length in enumerate(meta.seq_lens):
        start, end = meta.query_start[index], meta.query_start[index + 1]
        if end - start == 1:
            decodes.append(index)
            continue
        keys = torch.arange(length, device=device)[None]
        groups.append(
            _Group(
                rows=slice(start, end),
                cells=_cells(meta.block_tables[index : index + 1], block_size, keys).view(-1),
                positions=meta.positions[start:end],
                max_len=length,
                num_sequences=1,
                plain=length == end - start,
            )
        )
    limit = _CPU_GROUP_CELLS if device.type == "cpu" else _GROUP_CELLS
    for sequences in _by_length(decodes, meta.seq_lens, limit):
        lengths = [meta.seq_lens[index] for index in sequences]
        longest = lengths[-1]
        rows = torch.tensor([meta.query_start[i] for i in sequences], device=device)
        tables = meta.block_tables[torch.tensor(sequences, device=device)]
        # Keys past a sequence's end repeat its last one: masked, but always finite and its own.
        last = torch.tensor(lengths, device=device)[:, None] - 1
        keys = torch.minimum(torch.arange(longest, device=device)[None], last)
        groups.append(
            _Group(
                rows=rows,
                cells=_cells(tables, block_size, keys).view(-1),
                positions=meta.positions[rows],
                max_len=longest,
                num_sequences=len(sequences),
                plain=lengths[0] == longest,
            )
        )
    return groups


def _by_length(sequences: list[int], lengths: list[int], limit: int) -> list[list[int]]:
    """Sequences of similar length together, each group with at most `limit` padded keys (or one
    sequence), shortest first."""
    groups: list[list[int]] = []
    for index in sorted(sequences, key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _dense(weight: Weight) -> Dense:
    if not isinstance(weight, Dense):
        raise TypeError(f"a weight of {type(weight).__name__} was not prepared by ReferenceOps")
    return weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], cos and sin [T, 1, rotary_dim / 2] fp32."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    turned = turned.to(x.dtype)
    return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)


class ReferenceOps:
    """`Ops` in torch. fp32 on the CPU and bf16 on CUDA unless told otherwise."""

    reproducible = False  # a row's sums change with the number of rows and threads

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        self.id = f"reference {self.device.type} {name} torch {torch.__version__}"
        self.kv_layout = f"block,head,dim {name}"

    # ------------------------------------------------------------------ loading

    def prepare_linear(self, parts: Sequence[RawTensor], biases: Sequence[RawTensor] = ()) -> Dense:
        if len(parts) == 1:
            weight = parts[0].to_torch(self.dtype, self.device)
        else:
            shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
            weight = torch.empty(shape, dtype=self.dtype, device=self.device)
            row = 0
            for part in parts:
                part.dequantize_into(weight[row : row + part.shape[0]])
                row += part.shape[0]
        bias = [b.to_torch(self.dtype, self.device) for b in biases]
        return Dense(weight, torch.cat(bias) if bias else None)

    def prepare_embedding(self, table: RawTensor, *, tied: bool) -> Dense:  # noqa: ARG002
        return Dense(table.to_torch(self.dtype, self.device))

    def prepare_vector(self, vector: RawTensor) -> Dense:
        return Dense(vector.to_torch(self.dtype, self.device))

    def allocate_kv(self, config: DecoderConfig, num_blocks: int, block_size: int) -> torch.Tensor:
        """[num_layers, 2, num_blocks, 1, block_size, num_kv_heads, head_dim]."""
        cells = (block_size, config.num_kv_heads, config.head_dim)
        shape = (config.num_layers, 2, num_blocks, 1, *cells)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # ------------------------------------------------------------------ running

    def run(
        self,
        decoder: Decoder,
        token_ids: torch.Tensor,
        kv: KVCache,
        meta: AttentionMetadata,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        ops = self if tap is None else TappedOps(self, tap)
        hidden: torch.Tensor = decoder.layers(ops, token_ids, kv, meta)
        return hidden

    def evaluate(self, body: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = body(self, *inputs)
        return result

    def read_kv(
        self, kv_layer: torch.Tensor, blocks: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = kv_layer.index_select(1, blocks).flatten(1, 3)[:, :count].float()
        return keys, values

    def split_heads(
        self, qkv: torch.Tensor, counts: Sequence[int], head_dim: int
    ) -> tuple[torch.Tensor, ...]:
        return torch.split(qkv.view(len(qkv), -1, head_dim), list(counts), dim=1)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def embed(self, token_ids: torch.Tensor, table: Weight) -> torch.Tensor:
        return F.embedding(token_ids, _dense(table).tensor)

    def rms_norm(self, x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), _dense(weight).tensor, eps)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        dense = _dense(weight)
        rows = x.shape[0]
        if self.device.type == "cpu" and rows <= _FEW_ROWS:
            # The same product the other way round: for few rows the CPU's BLAS is up to three times
            # as fast with the weight on the left. One row goes as two, for its own kernel has no
            # threads.
            columns = (torch.cat([x, x]) if rows == 1 else x).t()
            product = torch.mm(dense.tensor, columns)[:, :rows].t().contiguous()
            return product if dense.bias is None else product.add_(dense.bias)
        return F.linear(x, dense.tensor, dense.bias)

    def rope_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: RopeTable,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        if "rope" not in meta.derived:
            positions = meta.positions
            meta.derived["rope"] = (rope.cos[positions][:, None], rope.sin[positions][:, None])
        cos, sin = meta.derived["rope"]
        keys, values = kv_layer.flatten(1, 3)
        keys.index_copy_(0, meta.slot_mapping, _rotate(k, cos, sin))
        values.index_copy_(0, meta.slot_mapping, v)
        return _rotate(q, cos, sin)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
        sliding_window: int | None,
    ) -> torch.Tensor:
        if "groups" not in meta.derived:
            meta.derived["groups"] = _groups(meta, kv_layer.shape[3])
        groups: list[_Group] = meta.derived["groups"]
        keys, values = kv_layer.flatten(1, 3)
        num_kv_heads, head_dim = keys.shape[1:]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in groups:
            shape = (group.num_sequences, group.max_len, num_kv_heads, head_dim)
            k = keys.index_select(0, group.cells).view(shape).transpose(1, 2)
            v = values.index_select(0, group.cells).view(shape).transpose(1, 2)
            mask = group.mask(sliding_window, q.dtype)
            if isinstance(group.rows, slice):
                out[group.rows] = self._prefill(q[group.rows], k, v, mask)
            else:
                # The heads that share a KV head are the queries of one small attention.
                queries = q[group.rows].view(group.num_sequences, num_kv_heads, -1, head_dim)
                bias = None if mask is None else mask[:, None, None]
                attended = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
                out[group.rows] = attended.reshape(group.num_sequences, -1, head_dim)
        return out.flatten(1)

    @staticmethod
    def _prefill(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """q [n, H, D], k and v [1, K, L, D], mask [n, L] -> [n, H, D]."""
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended[0].transpose(0, 1)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, hidden: torch.Tensor, head: Weight) -> torch.Tensor:
        return self.linear(hidden, head).float()
