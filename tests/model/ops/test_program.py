"""The recorder: a program computes what was recorded, whatever buffers it shares among values.

Programs are run here on terms instead of numbers: a buffer holds the name of what was computed
into it, so that a buffer reused too early shows as a wrong name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops import kernels
from model.ops.native import NativeOps
from model.ops.program import (
    STRIP,
    CInstruction,
    CStep,
    Gated,
    Kind,
    KVRef,
    Normed,
    Op,
    Packed,
    Program,
    Recorder,
    Transform,
    Value,
    Vector,
)
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import load_decoder

HEADS, KV_HEADS, DIM = 4, 2, 16
QKV = (HEADS + 2 * KV_HEADS) * DIM
HIDDEN = 32
EPS = 1e-5


def matrix(rows: int, cols: int) -> Packed:
    strips = -(-rows // STRIP)
    data = torch.zeros((strips, cols * STRIP * 4), dtype=torch.uint8)
    return Packed(Kind.F32, rows, cols, data, None)


def vector(width: int) -> Vector:
    return Vector(torch.ones(width))


def summary(program: Program) -> list[tuple[Op, Transform, bool]]:
    return [(i.op, i.transform, i.add) for i in program.instructions]


# ------------------------------------------------------------------------- programs over terms


@dataclass
class Terms:
    """Names for expressions: the same number for the same expression, a new one for a new one."""

    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def of(self, *expression: Any) -> int:
        return self._numbers.setdefault(expression, len(self._numbers))


def execute(program: Program, terms: Terms, given: dict[int, int]) -> int:
    """The term in the result's buffer. Also checks that each instruction fits its buffers."""
    buffers = {i: terms.of("not written", i) for i in range(len(program.widths))} | given
    widths = program.widths
    for i in program.instructions:
        source = buffers[i.input]
        if i.op is Op.EMBED:
            assert i.matrix is not None and widths[i.output] == i.matrix.cols
            buffers[i.output] = terms.of("embed", id(i.matrix))
        elif i.op is Op.LINEAR:
            assert i.matrix is not None and i.input != i.output, "reads what it writes"
            wanted = i.matrix.cols * (2 if i.transform is Transform.SILU else 1)
            assert (widths[i.input], widths[i.output]) == (wanted, i.matrix.rows)
            if i.transform is Transform.NORMED:
                source = terms.of("norm", source, id(i.norm), i.eps)
            elif i.transform is Transform.SILU:
                source = terms.of("silu", source)
            product = terms.of("linear", source, id(i.matrix))
            buffers[i.output] = terms.of("add", buffers[i.output], product) if i.add else product
        elif i.op is Op.ROPE_KV:
            norms = (id(i.q_norm), id(i.k_norm), i.eps)
            buffers[i.input] = terms.of("rope", source, i.layer, *norms)
        elif i.op is Op.ATTEND:
            assert i.input != i.output, "reads what it writes"
            buffers[i.output] = terms.of("attend", source, i.layer, i.window)
        else:
            assert i.op is Op.NORM
            buffers[i.output] = terms.of("norm", source, id(i.norm), i.eps)
    return buffers[program.result]


Recorded = tuple[Value, int]  # a value of the recorder, and the term that it stands for


class Author:
    """Records random, valid calls and keeps the term of every value that is still needed."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw, self.terms, self.recorder = draw, Terms(), Recorder()
        self.pending: list[Recorded] = []  # each is used once
        self.given: dict[int, int] = {}
        table = matrix(50, HIDDEN)
        self.residuals: list[Recorded] = [
            (self.recorder.embed(None, table), self.terms.of("embed", id(table)))
        ]
        for _ in range(draw(st.integers(0, 2))):
            x = self.recorder.input(HIDDEN)
            self.given[x.buffer] = self.terms.of("input", x.buffer)
            self.residuals.append((x, self.given[x.buffer]))
        self.keep: list[object] = [table]  # names are addresses

    def choose(self, values: list[Recorded]) -> int:
        return int(self.draw(st.integers(0, len(values) - 1)))

    def linear(self, source: Recorded, rows: int) -> Recorded:
        """A matrix behind nothing, a norm, or a silu; the result is the newest value."""
        value, term = source
        how = self.draw(st.sampled_from(["plain", "norm", "silu"]))
        x: Value | Normed | Gated = value
        cols = value.width
        if how == "norm":
            weight = vector(cols)
            self.keep.append(weight)
            normed = self.recorder.rms_norm(value, weight, EPS)
            assert isinstance(normed, Normed)
            x, term = normed, self.terms.of("norm", term, id(weight), EPS)
        elif how == "silu":
            x, term, cols = (
                self.recorder.silu_and_mul(value),
                self.terms.of("silu", term),
                cols // 2,
            )
        weights = matrix(rows, cols)
        self.keep.append(weights)
        return self.recorder.linear(x, weights), self.terms.of("linear", term, id(weights))

    def project(self) -> None:
        """A residual or a pending value into a new pending one, of some width."""
        width = self.draw(st.sampled_from([HIDDEN, 2 * HIDDEN, QKV]))
        everything = self.residuals + self.pending
        index = self.choose(everything)
        result = self.linear(everything[index], width)
        if index >= len(self.residuals):
            self.pending.pop(index - len(self.residuals))
        self.pending.append(result)

    def add_back(self) -> None:
        """A pending value through a matrix, added to a residual."""
        if not self.pending:
            return
        value, term = self.linear(self.pending.pop(self.choose(self.pending)), HIDDEN)
        index = self.choose(self.residuals)
        x, before = self.residuals[index]
        self.residuals[index] = (self.recorder.add(x, value), self.terms.of("add", before, term))

    def attend(self) -> None:
        """q, k and v out of a residual, turned, written and attended to."""
        qkv, term = self.linear(self.residuals[self.choose(self.residuals)], QKV)
        layer = KVRef().layer(self.draw(st.integers(0, 3)))
        q, k, v = self.recorder.split_heads(qkv, [HEADS, KV_HEADS, KV_HEADS], DIM)
        norms: tuple[int, int, float] = (id(None), id(None), 0.0)
        if self.draw(st.booleans()):
            q_norm, k_norm = vector(DIM), vector(DIM)
            self.keep += [q_norm, k_norm]
            q = self.recorder.rms_norm(q, q_norm, EPS)  # type: ignore[assignment]
            k = self.recorder.rms_norm(k, k_norm, EPS)  # type: ignore[assignment]
            norms = (id(q_norm), id(k_norm), EPS)
        q = self.recorder.rope_and_write_kv(q, k, v, None, layer, None)
        window = self.draw(st.sampled_from([None, 7]))
        attended = self.recorder.paged_attention(q, layer, None, window)
        term = self.terms.of("rope", term, layer.index, *norms)
        term = self.terms.of("attend", term, layer.index, window or 0)
        self.pending.append((attended, term))

    def finish(self) -> tuple[Program, int]:
        """A value that is left, perhaps with a norm: the program, and the term it must return."""
        left = self.residuals + self.pending
        value, term = left[self.choose(left)]
        if not self.draw(st.booleans()):
            return self.recorder.program(value), term
        weight = vector(value.width)
        self.keep.append(weight)
        normed = self.recorder.rms_norm(value, weight, EPS)
        assert isinstance(normed, Normed)
        return self.recorder.program(normed), self.terms.of("norm", term, id(weight), EPS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_buffer_is_reused_while_its_value_is_needed(data: st.DataObject) -> None:
    author = Author(data.draw)
    for step in data.draw(
        st.lists(st.sampled_from([Author.project, Author.add_back, Author.attend]), max_size=25)
    ):
        step(author)
    program, expected = author.finish()
    assert execute(program, author.terms, author.given) == expected


# ------------------------------------------------------------------------------------- fusing


def test_a_norm_goes_into_the_matrix_behind_it() -> None:
    recorder, norm = Recorder(), vector(HIDDEN)
    x = recorder.input(HIDDEN)
    normed = recorder.rms_norm(x, norm, EPS)
    assert isinstance(normed, Normed)
    program = recorder.program(recorder.linear(normed, matrix(48, HIDDEN)))
    assert summary(program) == [(Op.LINEAR, Transform.NORMED, False)]
    assert program.instructions[0].norm is norm
    assert program.instructions[0].eps == EPS
    assert program.widths == [HIDDEN, 48]


def test_a_norm_with_nothing_behind_it_is_an_instruction() -> None:
    recorder, norm = Recorder(), vector(HIDDEN)
    normed = recorder.rms_norm(recorder.input(HIDDEN), norm, EPS)
    assert isinstance(normed, Normed)
    program = recorder.program(normed)
    assert summary(program) == [(Op.NORM, Transform.PLAIN, False)]
    assert program.result != program.instructions[0].input, "the input is left as it is"


def test_one_norm_into_two_matrices() -> None:
    recorder = Recorder()
    normed = recorder.rms_norm(recorder.input(HIDDEN), vector(HIDDEN), EPS)
    assert isinstance(normed, Normed)
    first = recorder.linear(normed, matrix(32, HIDDEN))
    second = recorder.linear(normed, matrix(32, HIDDEN))
    assert first.buffer != second.buffer
    assert summary(recorder.program(second)) == 2 * [(Op.LINEAR, Transform.NORMED, False)]


def test_a_sum_goes_into_the_matrix_before_it_and_frees_its_buffer() -> None:
    recorder = Recorder()
    x = recorder.embed(None, matrix(50, HIDDEN))
    hidden = recorder.linear(x, matrix(96, HIDDEN))
    y = recorder.linear(recorder.silu_and_mul(hidden), matrix(HIDDEN, 48))
    assert recorder.add(x, y) is x
    after = recorder.linear(x, matrix(HIDDEN, HIDDEN))
    assert after.buffer == y.buffer
    program = recorder.program(after)
    assert summary(program)[1:] == [
        (Op.LINEAR, Transform.PLAIN, False),
        (Op.LINEAR, Transform.SILU, True),
        (Op.LINEAR, Transform.PLAIN, False),
    ]
    assert program.instructions[2].output == x.buffer


def test_norms_of_heads_go_into_rope() -> None:
    recorder, q_norm, k_norm = Recorder(), vector(DIM), vector(DIM)
    qkv = recorder.linear(recorder.input(HIDDEN), matrix(QKV, HIDDEN))
    q, k, v = recorder.split_heads(qkv, [HEADS, KV_HEADS, KV_HEADS], DIM)
    assert [view.width for view in (q, k, v)] == [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    q = recorder.rms_norm(q, q_norm, EPS)  # type: ignore[assignment]
    k = recorder.rms_norm(k, k_norm, EPS)  # type: ignore[assignment]
    layer = KVRef().layer(2)
    q = recorder.rope_and_write_kv(q, k, v, None, layer, None)
    program = recorder.program(recorder.paged_attention(q, layer, None, 100))
    _, rope, attend = program.instructions
    assert (rope.op, rope.q_norm, rope.k_norm, rope.eps) == (Op.ROPE_KV, q_norm, k_norm, EPS)
    assert (attend.op, attend.window) == (Op.ATTEND, 100)
    assert rope.layer == attend.layer == 2
    assert program.widths[attend.output] == HEADS * DIM


# ---------------------------------------------------------------------- sums that cannot be fused


def another_between(recorder: Recorder, x: Value) -> tuple[Value, Value]:
    y = recorder.linear(x, matrix(HIDDEN, HIDDEN))
    recorder.linear(x, matrix(HIDDEN, HIDDEN))
    return x, y


def onto_a_result(recorder: Recorder, x: Value) -> tuple[Value, Value]:
    first = recorder.linear(x, matrix(HIDDEN, HIDDEN))
    return first, recorder.linear(x, matrix(HIDDEN, HIDDEN))


def of_attention(recorder: Recorder, x: Value) -> tuple[Value, Value]:
    qkv = recorder.linear(x, matrix(QKV, HIDDEN))
    q, _, _ = recorder.split_heads(qkv, [HEADS, KV_HEADS, KV_HEADS], DIM)
    return x, recorder.paged_attention(q, KVRef().layer(0), None, None)


def of_two_residuals(recorder: Recorder, x: Value) -> tuple[Value, Value]:
    return x, recorder.input(HIDDEN)


def twice(recorder: Recorder, x: Value) -> tuple[Value, Value]:
    y = recorder.linear(recorder.input(HIDDEN), matrix(HIDDEN, HIDDEN))
    recorder.add(x, y)
    recorder.linear(x, matrix(HIDDEN, HIDDEN))
    return x, y


@pytest.mark.parametrize(
    "record", [another_between, onto_a_result, of_attention, of_two_residuals, twice]
)
def test_a_sum_that_cannot_be_fused_is_refused(
    record: Callable[[Recorder, Value], tuple[Value, Value]],
) -> None:
    recorder = Recorder()
    x, y = record(recorder, recorder.embed(None, matrix(50, HIDDEN)))
    before = [replace(i) for i in recorder.program(x).instructions]
    with pytest.raises(ValueError, match="last matrix"):
        recorder.add(x, y)
    assert recorder.program(x).instructions == before, "a refused sum leaves no trace"


# ------------------------------------------------------------------------------- whole decoders


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    return NativeOps(1)


def record_decoder(folder: Path, family: str, ops: NativeOps, layers: int) -> Program:
    make_tiny(family, folder, num_hidden_layers=layers)
    recorder = Recorder()
    decoder = load_decoder(folder, ops)
    return recorder.program(decoder.layers(recorder, None, KVRef(), None))


def test_a_layer_is_six_instructions(tmp_path: Path, ops: NativeOps) -> None:
    program = record_decoder(tmp_path, "llama", ops, 3)
    layer = [
        (Op.LINEAR, Transform.NORMED, False),
        (Op.ROPE_KV, Transform.PLAIN, False),
        (Op.ATTEND, Transform.PLAIN, False),
        (Op.LINEAR, Transform.PLAIN, True),
        (Op.LINEAR, Transform.NORMED, False),
        (Op.LINEAR, Transform.SILU, True),
    ]
    first, last = (Op.EMBED, Transform.PLAIN, False), (Op.NORM, Transform.PLAIN, False)
    assert summary(program) == [first, *3 * layer, last]


def test_depth_costs_no_buffers(tmp_path: Path, ops: NativeOps) -> None:
    record = partial(record_decoder, family="qwen3", ops=ops)
    assert record(tmp_path / "2", layers=2).widths == record(tmp_path / "7", layers=7).widths


def test_the_structures_are_as_long_in_python_as_in_c() -> None:
    library = kernels.load().library
    assert library.hw_sizeof_instruction() == ctypes.sizeof(CInstruction)
    assert library.hw_sizeof_step() == ctypes.sizeof(CStep)


def test_a_matrix_cannot_add_to_the_rows_that_it_reads() -> None:
    recorder = Recorder()
    x = recorder.input(32)
    weight = Packed(Kind.F32, 32, 32, torch.zeros((2, 2048), dtype=torch.uint8), None)
    with pytest.raises(ValueError, match="rows that it reads"):
        recorder.add(x, recorder.linear(x, weight))


def test_widths_must_fit() -> None:
    recorder = Recorder()
    x, y = recorder.input(32), recorder.input(64)
    weight = Packed(Kind.F32, 32, 32, torch.zeros((2, 2048), dtype=torch.uint8), None)
    with pytest.raises(ValueError, match="takes 32 values a row, got 64"):
        recorder.linear(y, weight)
    with pytest.raises(ValueError, match="cannot add 32 values a row to 64"):
        recorder.add(y, recorder.linear(x, weight))
