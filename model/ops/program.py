"""Program: what `native.cpp` runs in one call, recorded from the decoder.

The decoder is written over ops. `Recorder` is a set of ops that computes nothing: each call leaves
an instruction, with buffers instead of tensors, and fuses what the kernels do in one pass: a norm
or a silu into the matrix behind it, a residual add into the matrix before it. A program depends
on the model only; it is recorded once and run with any batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch

from model.ops.base import Weight

STRIP = 16


class Kind(IntEnum):
    """How a matrix is packed; mirrored in linear.hpp."""

    Q4 = 0
    Q8 = 1
    BF16 = 2
    F32 = 3


class Op(IntEnum):
    EMBED = 0
    LINEAR = 1
    ROPE_KV = 2
    ATTEND = 3
    NORM = 4


class Transform(IntEnum):
    PLAIN = 0
    NORMED = 1
    SILU = 2


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class CInstruction(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int32),
        ("transform", ctypes.c_int32),
        ("input", ctypes.c_int32),
        ("output", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("parts", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("matrix", CMatrix),
        ("norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
    )


class CModel(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("rotary", ctypes.c_int32),
        ("num_instructions", ctypes.c_int32),
        ("instructions", ctypes.c_void_p),
    )


class CStep(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("num_buffers", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("layer_stride", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
    )


class Packed(Weight):
    """A matrix in strips of 16 outputs. `data` [strips, bytes] uint8; `bias` padded to strips."""

    __slots__ = ("bias", "cols", "data", "kind", "rows")

    def __init__(
        self, kind: Kind, rows: int, cols: int, data: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.kind, self.rows, self.cols, self.data, self.bias = kind, rows, cols, data, bias

    def c(self) -> CMatrix:
        bias = None if self.bias is None else self.bias.data_ptr()
        return CMatrix(self.kind, self.rows, self.cols, 0, self.data.data_ptr(), bias)


class Vector(Weight):
    """The weight of a norm, fp32."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


# ------------------------------------------------------------- what stands for tensors in a record


@dataclass(frozen=True)
class Value:
    """[T, width] in a buffer. A `residual` outlives its use; all others are used once."""

    buffer: int
    width: int
    residual: bool = False
    producer: int | None = None  # the linear that wrote it


@dataclass(frozen=True)
class Normed:
    """A norm that the next matrix will do."""

    value: Value
    weight: Vector
    eps: float


@dataclass(frozen=True)
class Gated:
    """silu(gate) * up, that the next matrix will do."""

    value: Value


@dataclass(frozen=True)
class HeadsView:
    """q, k or v in the buffer of all three, perhaps with a norm that rope will do."""

    value: Value
    width: int
    norm: Vector | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class LayerRef:
    """Stands for the KV cache of a layer."""

    index: int


class KVRef:
    """Stands for the KV cache."""

    def layer(self, index: int) -> LayerRef:
        return LayerRef(index)


@dataclass
class Instruction:
    op: Op
    input: int = 0
    output: int = 0
    transform: Transform = Transform.PLAIN
    add: bool = False
    layer: int = 0
    window: int = 0
    eps: float = 0.0
    parts: int = 1
    matrix: Packed | None = None
    norm: Vector | None = None
    q_norm: Vector | None = None
    k_norm: Vector | None = None

    def c(self) -> CInstruction:
        def pointer(vector: Vector | None) -> int | None:
            return None if vector is None else vector.tensor.data_ptr()

        return CInstruction(
            self.op,
            self.transform,
            self.input,
            self.output,
            self.add,
            self.layer,
            self.window,
            self.eps,
            self.parts,
            0,
            CMatrix() if self.matrix is None else self.matrix.c(),
            pointer(self.norm),
            pointer(self.q_norm),
            pointer(self.k_norm),
        )


@dataclass
class Program:
    """Instructions over buffers of `widths` floats a row. `result` is the buffer to return."""

    instructions: list[Instruction]
    widths: list[int]
    result: int
    c_instructions: Any = field(init=False)

    def __post_init__(self) -> None:
        array = CInstruction * len(self.instructions)
        self.c_instructions = array(*(instruction.c() for instruction in self.instructions))


class Recorder:
    """The ops of the decoder, for recording. Widths are in floats."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._widths: list[int] = []
        self._free: list[int] = []

    def input(self, width: int) -> Value:
        """A buffer that the caller fills before the program runs."""
        return Value(self._buffer(width), width, residual=True)

    def program(self, result: Value | Normed) -> Program:
        """What was recorded; `result` is what it returns."""
        if isinstance(result, Normed):
            out = self._buffer(result.value.width)
            self._emit(
                Op.NORM, input=result.value.buffer, output=out, norm=result.weight, eps=result.eps
            )
            result = Value(out, result.value.width)
        return Program(self._instructions, self._widths, result.buffer)

    # ------------------------------------------------------------------------------- the ops

    def embed(self, token_ids: object, table: Packed) -> Value:  # noqa: ARG002
        out = self._buffer(table.cols)
        self._emit(Op.EMBED, output=out, matrix=table)
        return Value(out, table.cols, residual=True)

    def rms_norm(self, x: Value | HeadsView, weight: Vector, eps: float) -> Normed | HeadsView:
        if isinstance(x, HeadsView):
            return replace(x, norm=weight, eps=eps)
        return Normed(x, weight, eps)

    def linear(self, x: Value | Normed | Gated, weight: Packed, parts: int = 1) -> Value:
        """`parts`: how often a row is quantised for a packed matrix, the second time what the first
        one lost. With 2 next to nothing is lost, for twice the arithmetic and the same memory."""
        value = x if isinstance(x, Value) else x.value
        expected = 2 * weight.cols if isinstance(x, Gated) else weight.cols
        if value.width != expected:
            raise ValueError(f"the matrix takes {expected} values a row, got {value.width}")
        out = self._buffer(weight.rows)
        instruction = self._emit(
            Op.LINEAR, input=value.buffer, output=out, matrix=weight, parts=parts
        )
        if isinstance(x, Normed):
            instruction.transform = Transform.NORMED
            instruction.norm, instruction.eps = x.weight, x.eps
        elif isinstance(x, Gated):
            instruction.transform = Transform.SILU
        self._used(value)
        return Value(out, weight.rows, producer=len(self._instructions) - 1)

    def split_heads(
        self, qkv: Value, counts: Sequence[int], head_dim: int
    ) -> tuple[HeadsView, ...]:
        return tuple(HeadsView(qkv, count * head_dim) for count in counts)

    def rope_and_write_kv(
        self,
        q: HeadsView,
        k: HeadsView,
        v: HeadsView,
        rope: object,  # noqa: ARG002
        kv_layer: LayerRef,
        meta: object,  # noqa: ARG002
    ) -> HeadsView:
        if not q.value == k.value == v.value or (q.norm is None) != (k.norm is None):
            raise ValueError(
                "q, k and v must come from one split, with a norm on both q and k or none"
            )
        self._emit(
            Op.ROPE_KV,
            input=q.value.buffer,
            layer=kv_layer.index,
            eps=q.eps,
            q_norm=q.norm,
            k_norm=k.norm,
        )
        return q

    def paged_attention(
        self,
        q: HeadsView,
        kv_layer: LayerRef,
        meta: object,  # noqa: ARG002
        sliding_window: int | None,
    ) -> Value:
        out = self._buffer(q.width)
        self._emit(
            Op.ATTEND,
            input=q.value.buffer,
            output=out,
            layer=kv_layer.index,
            window=sliding_window or 0,
        )
        self._used(q.value)
        return Value(out, q.width)

    def silu_and_mul(self, gate_up: Value) -> Gated:
        return Gated(gate_up)

    def add(self, x: Value, y: Value) -> Value:
        """x + y into x: the matrix that made y adds its results there instead."""
        if y.producer != len(self._instructions) - 1 or not x.residual:
            raise ValueError("only the result of the last matrix can be added to the residual")
        instruction = self._instructions[-1]
        if x.width != y.width:
            raise ValueError(f"cannot add {y.width} values a row to {x.width}")
        if instruction.input == x.buffer:
            raise ValueError("a matrix cannot add to the rows that it reads")
        self._free.append(instruction.output)
        instruction.output, instruction.add = x.buffer, True
        return x

    # ------------------------------------------------------------------------------- details

    def _emit(self, op: Op, **fields: Any) -> Instruction:
        instruction = Instruction(op, **fields)
        self._instructions.append(instruction)
        return instruction

    def _buffer(self, width: int) -> int:
        for buffer in self._free:
            if self._widths[buffer] == width:
                self._free.remove(buffer)
                return buffer
        self._widths.append(width)
        return len(self._widths) - 1

    def _used(self, value: Value) -> None:
        if value.buffer in self._free:
            raise ValueError("a value that is not the residual can be used once")
        if not value.residual:
            self._free.append(value.buffer)
