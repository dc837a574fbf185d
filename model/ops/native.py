"""NativeOps: the ops of the decoder by our own kernels, on the CPU.

Matrices stay packed as they are in the file (Q4_0 and Q4_1 as 4-bit strips, Q8_0 as 8-bit strips),
activations are quantised to int8 per group of 32, KV is bf16. A whole forward pass is one call.

The results are bitwise invariant: a token's hidden state and logits depend on the tokens before it
and on nothing else, not on the batch, the chunk, the block table or the number of threads.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from model.attention import AttentionMetadata
from model.config import DecoderConfig
from model.ops import kernels
from model.ops.base import Weight
from model.ops.memory import Arena, allocate
from model.ops.program import (
    STRIP,
    CInstruction,
    CModel,
    CStep,
    Kind,
    KVRef,
    Op,
    Packed,
    Program,
    Recorder,
    Vector,
)
from model.ops.tap import Tap
from model.weights.raw_tensor import RawTensor

if TYPE_CHECKING:
    from model.decoder import Decoder
    from model.kv import KVCache
    from model.rope import RopeTable

_KIND_OF = {"Q4_0": Kind.Q4, "Q4_1": Kind.Q4, "Q8_0": Kind.Q8, "BF16": Kind.BF16}
_BLOCK_TYPE = {Kind.Q4: "Q4_1", Kind.Q8: "Q8_0"}
_PLAIN_DTYPE = {Kind.BF16: torch.bfloat16, Kind.F32: torch.float32}
GROUP = 32
RUN = 32  # blocks whose tiles of one head lie together, kRun in attention.hpp


class NativeOps:
    """`Ops` by compiled kernels: `Recorder` takes down what a decoder does, `run` does it.

    `instruction_set`: best, avx512-vnni, avx2 or portable. `quantize`: none, or q4 or q8 for the
    matrices that are not packed in their file. Raises kernels.NoKernels where they cannot be
    built."""

    reproducible = True
    dtype = torch.float32
    device = torch.device("cpu")
    kv_layout = "tile16 pairs bfloat16"

    def __init__(
        self,
        num_threads: int = 1,
        instruction_set: str = "best",
        quantize: str = "none",
    ) -> None:
        self._kernels = kernels.load(instruction_set)
        self._library = self._kernels.library
        self._quantize = quantize
        self._rounds_queries = self._kernels.instruction_set.endswith("bf16")
        self._arena = Arena()
        self._engine = self._library.hw_create(num_threads)
        weakref.finalize(self, self._library.hw_destroy, self._engine)
        self._programs: weakref.WeakKeyDictionary[Decoder, Program] = weakref.WeakKeyDictionary()
        self._head: tuple[Weight, int, Program] | None = None  # of the last logits
        self.id = f"native {self._kernels.instruction_set} {self._kernels.id}"
        if quantize != "none":
            self.id += f" {quantize}"

    @staticmethod
    def fit(config: DecoderConfig, block_size: int) -> bool:
        """Whether the kernels take a model of these dimensions."""
        sizes = (config.hidden_size, config.head_dim, config.intermediate_size, block_size)
        return not any(size % STRIP for size in sizes)

    # ------------------------------------------------------------------ loading

    def prepare_linear(
        self, parts: Sequence[RawTensor], biases: Sequence[RawTensor] = ()
    ) -> Packed:
        cols = parts[0].shape[1]
        rows = sum(part.shape[0] for part in parts)
        kind = self._kind(parts)
        strips = -(-rows // STRIP)
        data = self._arena.take((strips, self._library.hw_strip_bytes(kind, cols)))
        row = 0
        for part in parts:
            source = _as_packed(part, kind)
            self._library.hw_pack(
                kind, source.data_ptr(), row, part.shape[0], cols, data.data_ptr()
            )
            row += part.shape[0]
        bias = None
        if biases:
            bias = torch.zeros(strips * STRIP, dtype=torch.float32)
            bias[:rows] = torch.cat([b.to_torch(torch.float32, self.device) for b in biases])
        return Packed(kind, rows, cols, data, bias)

    def prepare_embedding(self, table: RawTensor, *, tied: bool) -> Packed:  # noqa: ARG002
        return self.prepare_linear([table])

    def prepare_vector(self, vector: RawTensor) -> Vector:
        if vector.shape[0] % STRIP:
            raise ValueError(
                f"{vector.name} has {vector.shape[0]} values; the native kernels want a multiple "
                f"of {STRIP}"
            )
        return Vector(vector.to_torch(torch.float32, self.device).contiguous())

    def allocate_kv(self, config: DecoderConfig, num_blocks: int, block_size: int) -> torch.Tensor:
        """[num_layers, 2, runs, 32, num_kv_heads, block_size / 16, 16 * head_dim] bf16, a view: the
        heads come before the 32 blocks in memory. The tiles are as attention.hpp describes them."""
        if block_size % STRIP or config.head_dim % STRIP:
            raise ValueError(
                f"the native kernels want a block size and a head dimension that are multiples of "
                f"{STRIP}, got {block_size} and {config.head_dim}"
            )
        shape = (
            config.num_layers,
            2,
            -(-num_blocks // RUN),  # blocks that fill up the last run take no memory: nobody writes
            config.num_kv_heads,
            RUN,
            block_size // STRIP,
            STRIP * config.head_dim,
        )
        return allocate(2 * math.prod(shape)).view(torch.bfloat16).view(shape).transpose(3, 4)

    def _kind(self, parts: Sequence[RawTensor]) -> Kind:
        """One kind for all parts of a fused matrix; plain floats where they cannot agree."""
        kinds = {_KIND_OF.get(part.type) for part in parts}
        if self._quantize != "none" and not kinds & {Kind.Q4, Kind.Q8}:
            if parts[0].shape[1] % GROUP == 0:
                return Kind.Q4 if self._quantize == "q4" else Kind.Q8
        if len(kinds) == 1:
            kind = kinds.pop()
            if kind is not None:
                return kind
        exact = all(part.type in ("F32", "F16") for part in parts)
        return Kind.F32 if exact else Kind.BF16

    # ------------------------------------------------------------------ running

    def run(
        self,
        decoder: Decoder,
        token_ids: torch.Tensor,
        kv: KVCache,
        meta: AttentionMetadata,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """The decoder's forward pass: [T] int64 -> hidden [T, hidden]."""
        program = self._programs.get(decoder)
        if program is None:
            recorder = Recorder()
            program = recorder.program(decoder.layers(recorder, None, KVRef(), None))
            self._programs[decoder] = program
        return self._execute(program, decoder.config, decoder.rope, kv, meta, token_ids, {}, tap)

    def logits(self, hidden: torch.Tensor, head: Weight) -> torch.Tensor:
        """[rows, hidden] fp32 -> [rows, vocab] fp32. The rows are quantised in two parts: a quarter
        of the distance to fp32 came from these rows alone."""
        assert isinstance(head, Packed)
        if self._head is None or self._head[0] is not head:
            recorder = Recorder()
            rows = recorder.input(hidden.shape[1])
            self._head = head, rows.buffer, recorder.program(recorder.linear(rows, head, parts=2))
        _, buffer, program = self._head
        given = {buffer: hidden.contiguous()}
        return self._execute(program, None, None, None, None, None, given)

    def sample(
        self,
        logits: torch.Tensor,
        count: int,
        rows: ctypes.Array[ctypes.c_char],
        results: ctypes.Array[ctypes.c_char],
        tops: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """A token for each of `count` packed `rows` into packed `results` (their layouts are in
        model/sampling/native.py), and the ids (int32) and logits (fp32) of the highest tokens into
        `tops`, both [count, n]. `logits` are [rows, vocab] fp32, contiguous."""
        ids, values = tops
        self._library.hw_sample(
            self._engine,
            logits.data_ptr(),
            logits.shape[1],
            count,
            rows,
            results,
            ids.shape[1],
            ids.data_ptr(),
            values.data_ptr(),
        )

    def evaluate(
        self,
        body: Callable[..., Any],
        *inputs: torch.Tensor,
        config: DecoderConfig | None = None,
        rope: RopeTable | None = None,
        kv: KVCache | None = None,
        meta: AttentionMetadata | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Record `body(ops, *inputs)` and run it on tensors [T, width] fp32."""
        recorder = Recorder()
        values = [recorder.input(tensor.shape[1]) for tensor in inputs]
        program = recorder.program(body(recorder, *values))
        given = {
            value.buffer: tensor.to(torch.float32).clone(memory_format=torch.contiguous_format)
            for value, tensor in zip(values, inputs, strict=True)
        }
        return self._execute(program, config, rope, kv, meta, token_ids, given)

    def _execute(
        self,
        program: Program,
        config: DecoderConfig | None,
        rope: RopeTable | None,
        kv: KVCache | None,
        meta: AttentionMetadata | None,
        token_ids: torch.Tensor | None,
        given: dict[int, torch.Tensor],
        tap: Tap | None = None,
    ) -> torch.Tensor:
        if token_ids is not None:
            num_tokens = len(token_ids)
        else:
            num_tokens = len(next(iter(given.values())))
        buffers = [
            given[i] if i in given else torch.empty((num_tokens, width))
            for i, width in enumerate(program.widths)
        ]
        pointers = (ctypes.c_void_p * len(buffers))(*(b.data_ptr() for b in buffers))
        widths = (ctypes.c_int32 * len(buffers))(*program.widths)
        step = CStep(num_tokens=num_tokens, num_buffers=len(buffers))
        step.buffers = ctypes.addressof(pointers)
        step.widths = ctypes.addressof(widths)
        model = CModel(num_instructions=len(program.instructions))
        model.instructions = ctypes.addressof(program.c_instructions)
        if token_ids is not None:
            step.token_ids = token_ids.data_ptr()
        keep: list[Any] = [pointers, widths]
        if config is not None and rope is not None and kv is not None and meta is not None:
            model.num_heads, model.num_kv_heads = config.num_heads, config.num_kv_heads
            model.head_dim, model.block_size = config.head_dim, kv.block_size
            model.rotary = rope.rotary_dim
            keep += _fill(step, rope, kv, meta)
        if tap is None:
            self._library.hw_run(self._engine, ctypes.byref(model), ctypes.byref(step))
        else:
            self._run_watched(program, model, step, buffers, tap)
        del keep
        return buffers[program.result]

    def _run_watched(
        self, program: Program, model: CModel, step: CStep, buffers: list[torch.Tensor], tap: Tap
    ) -> None:
        """The same instructions in several calls, with a look at the buffers in between."""
        base, size = model.instructions, ctypes.sizeof(CInstruction)
        done = 0
        for count, instruction in enumerate(program.instructions, 1):
            is_residual = instruction.add or instruction.op == Op.EMBED
            shows_residual = tap.residual is not None and is_residual
            shows_queries = tap.queries is not None and instruction.op == Op.ROPE_KV
            if not (shows_residual or shows_queries or count == len(program.instructions)):
                continue
            model.num_instructions, model.instructions = count - done, base + done * size
            self._library.hw_run(self._engine, ctypes.byref(model), ctypes.byref(step))
            done = count
            if shows_residual and tap.residual is not None:
                tap.residual(buffers[instruction.output])
            elif shows_queries and tap.queries is not None:
                qkv = buffers[instruction.input]
                heads = qkv.view(len(qkv), -1, model.head_dim)[:, : model.num_heads]
                if self._rounds_queries:
                    heads = heads.bfloat16().float()
                # The kernel has them times log2(e) / sqrt(head_dim).
                tap.queries(instruction.layer, heads, math.log(2))

    def read_kv(
        self, kv_layer: torch.Tensor, blocks: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tiles of attention.hpp, laid out flat: pairs of dimensions of the keys, pairs of
        tokens of the values."""
        keys, values = kv_layer[:, blocks // RUN, blocks % RUN]  # [blocks, K, tiles, 16 * D]
        heads, dim = keys.shape[1], keys.shape[3] // STRIP
        k = keys.unflatten(3, (dim // 2, STRIP, 2)).permute(0, 2, 4, 1, 3, 5)
        v = values.unflatten(3, (STRIP // 2, dim, 2)).permute(0, 2, 3, 5, 1, 4)
        k, v = k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)
        return k[:count].float(), v[:count].float()


def _fill(step: CStep, rope: RopeTable, kv: KVCache, meta: AttentionMetadata) -> list[Any]:
    """The batch's tensors as pointers; returns what must stay alive while they are used."""
    tables = meta.block_tables.contiguous()
    starts = torch.tensor(meta.query_start, dtype=torch.int32)
    lens = torch.tensor(meta.seq_lens, dtype=torch.int32)
    step.num_sequences, step.max_blocks = tables.shape
    step.positions, step.slots = meta.positions.data_ptr(), meta.slot_mapping.data_ptr()
    step.block_tables = tables.data_ptr()
    step.query_start, step.seq_lens = starts.data_ptr(), lens.data_ptr()
    step.cos, step.sin = rope.cos.data_ptr(), rope.sin.data_ptr()
    step.kv = kv.tensor.data_ptr()
    step.num_runs = kv.tensor.shape[2]
    step.layer_stride = kv.tensor.stride(0)
    return [tables, starts, lens]


def _as_packed(part: RawTensor, kind: Kind) -> torch.Tensor:
    """The bytes that `hw_pack` wants: blocks of the kind's type, or plain values."""
    if kind in _PLAIN_DTYPE:
        return part.to_torch(_PLAIN_DTYPE[kind], torch.device("cpu")).contiguous()
    if part.type == _BLOCK_TYPE[kind]:
        return part.data.contiguous()
    if part.type == "Q4_0":
        return _q4_0_as_q4_1(part.data)
    values = part.to_torch(torch.float32, torch.device("cpu")).numpy()
    block_type = gguf.GGMLQuantizationType[_BLOCK_TYPE[kind]]
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(values, block_type)))


def _q4_0_as_q4_1(data: torch.Tensor) -> torch.Tensor:
    """Blocks with the minimum -8 * scale written out, which fp16 holds exactly."""
    blocks = data.reshape(-1, 18)
    scale = blocks[:, :2].contiguous().view(torch.float16)
    minimum = (scale.float() * -8).to(torch.float16)
    return torch.cat([blocks[:, :2], minimum.view(torch.uint8), blocks[:, 2:]], dim=1).contiguous()
