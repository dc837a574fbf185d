"""The native kernels: each op against its exact meaning, and all of it bit for bit against itself.

Everything runs with the best instruction set of this machine, with AVX2 where there is more, and
with plain C++: one source, the same tests.
"""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from model.ops import kernels
from model.ops.native import NativeOps
from model.ops.program import Kind
from model.ops.reference import ReferenceOps
from model.weights.raw_tensor import RawTensor, from_numpy
from tests.fixtures.tiny import FAMILIES, make_tiny
from tests.model.decoding import Pool, expected_logits, load_decoder, make_tokens

SETS = ["best", "avx2", "portable"]
ROWS = [1, 2, 3, 4, 5, 8, 17, 64, 65, 130]
REFERENCE = ReferenceOps("cpu", torch.float32)


@pytest.fixture(scope="module", params=SETS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(2, request.param)


def raw(kind: str, rows: int, cols: int, seed: int = 0) -> RawTensor:
    """A random matrix, packed as a GGUF file would have it."""
    values = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        data = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
    else:
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return from_numpy("w", kind, (rows, cols), data)


def vector(count: int, seed: int = 0) -> RawTensor:
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return from_numpy("v", "F32", (count,), values.view(np.uint8).reshape(count, 4))


def quantized(x: torch.Tensor) -> torch.Tensor:
    """The activations as the kernels keep them: int8 per group of 32, to nearest even."""
    groups = x.reshape(len(x), -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    # not 127 / largest: torch makes that 127 * (1 / largest), rounded twice
    inverse = torch.full_like(largest, 127.0).div(largest)
    q = torch.round(groups * torch.where(largest > 0, inverse, 0))
    return (q * (largest / 127)).reshape(x.shape)


def expected_linear(x: torch.Tensor, weight: RawTensor) -> torch.Tensor:
    exact = weight.to_torch(torch.float32, torch.device("cpu")).double()
    if weight.type in ("F32", "F16", "BF16"):
        return (x.double() @ exact.T).float()
    return (quantized(x).double() @ exact.T).float()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16", "F32"])
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (48, 96), (33, 64), (1, 160), (200, 576)])
def test_linear_is_exact_up_to_float_rounding(
    ops: NativeOps, kind: str, rows: int, cols: int
) -> None:
    weight = raw(kind, rows, cols)
    prepared = ops.prepare_linear([weight])
    x = torch.randn((130, cols), generator=torch.Generator().manual_seed(1))
    expected = expected_linear(x, weight)
    for count in ROWS:
        got = ops.evaluate(lambda o, a: o.linear(a, prepared), x[:count])
        torch.testing.assert_close(got, expected[:count], rtol=1e-4, atol=2e-4 * cols**0.5)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16", "F32"])
def test_a_row_has_the_same_bits_in_any_batch(ops: NativeOps, kind: str) -> None:
    prepared = ops.prepare_linear([raw(kind, 200, 576)])
    x = torch.randn((130, 576), generator=torch.Generator().manual_seed(1))
    whole = ops.evaluate(lambda o, a: o.linear(a, prepared), x)
    for first, last in [(0, 1), (5, 6), (129, 130), (3, 5), (0, 3), (7, 11), (20, 97)]:
        part = ops.evaluate(lambda o, a: o.linear(a, prepared), x[first:last])
        assert torch.equal(part, whole[first:last])


def test_fused_parts_and_biases(ops: NativeOps) -> None:
    parts = [raw("Q4_1", rows, 64, seed=rows) for rows in (48, 16, 20)]
    biases = [vector(rows, seed=rows) for rows in (48, 16, 20)]
    prepared = ops.prepare_linear(parts, biases)
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
    got = ops.evaluate(lambda o, a: o.linear(a, prepared), x)
    plain = torch.cat([b.to_torch(torch.float32, torch.device("cpu")) for b in biases])
    expected = torch.cat([expected_linear(x, part) for part in parts], dim=1) + plain
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_quantized_extremes(ops: NativeOps) -> None:
    """Weights and activations at their largest: the sums that must not overflow 16 bits."""
    for kind, block in (
        ("Q4_1", np.array([0, 60, 0, 0] + [255] * 16, np.uint8)),  # scale 1, minimum 0, all 15
        ("Q8_0", np.array([0, 60] + [129] * 32, np.uint8)),  # all -127
    ):
        weight = from_numpy("w", kind, (32, 64), np.tile(block, (32, 2)))
        prepared = ops.prepare_linear([weight])
        for sign in (1.0, -1.0):
            x = torch.full((4, 64), 127.0 * sign)
            got = ops.evaluate(lambda o, a, w=prepared: o.linear(a, w), x)
            each = (15 if kind == "Q4_1" else -127) * 127.0 * 64 * sign
            assert torch.equal(got, torch.full_like(got, each))
    zeros = ops.evaluate(lambda o, a: o.linear(a, prepared), torch.zeros((2, 64)))
    assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_the_head_loses_next_to_nothing_of_its_rows(ops: NativeOps, kind: str) -> None:
    """Its rows are quantised in two parts; one part alone is a hundred times further away."""
    weight = raw(kind, 200, 576)
    head = ops.prepare_linear([weight])
    x = torch.randn((33, 576), generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.to_torch(torch.float32, torch.device("cpu")).double().T
    once = (expected_linear(x, weight) - exact).norm()
    for count in (1, 5, 33):
        twice = ops.logits(x[:count], head)
        assert (twice - exact[:count]).norm() < once / 100 * (count / 33) ** 0.5 * 2
        assert torch.equal(twice, ops.logits(x, head)[:count])


def test_norm_into_matrix(ops: NativeOps) -> None:
    weight, norm = raw("F32", 32, 96), vector(96)
    prepared, g = ops.prepare_linear([weight]), ops.prepare_vector(norm)
    x = 3 * torch.randn((9, 96), generator=torch.Generator().manual_seed(1))
    got = ops.evaluate(lambda o, a: o.linear(o.rms_norm(a, g, 1e-5), prepared), x)
    normed = REFERENCE.rms_norm(x, REFERENCE.prepare_vector(norm), 1e-5)
    torch.testing.assert_close(got, expected_linear(normed, weight), rtol=1e-4, atol=1e-4)


def test_silu_into_matrix(ops: NativeOps) -> None:
    weight = raw("F32", 32, 96)
    prepared = ops.prepare_linear([weight])
    x = 30 * torch.randn((9, 192), generator=torch.Generator().manual_seed(1))
    x[0, :3] = torch.tensor([-1000.0, 1000.0, 0.0])
    got = ops.evaluate(lambda o, a: o.linear(o.silu_and_mul(a), prepared), x)
    expected = expected_linear(REFERENCE.silu_and_mul(x), weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F32"])
def test_embedding_is_the_row(ops: NativeOps, kind: str) -> None:
    table = raw(kind, 50, 64)
    prepared = ops.prepare_embedding(table, tied=True)
    ids = torch.tensor([0, 49, 17, 16, 15, 3])
    got = ops.evaluate(lambda o: o.embed(None, prepared), token_ids=ids)
    exact = table.to_torch(torch.float32, torch.device("cpu"))[ids]
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------ whole decoders

# bf16 keys and values, and our own exp: what is left of fp32 after two layers.
TOLERANCE = 0.06


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert error < TOLERANCE / 10, f"relative error {error:.4f}"
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


def test_every_family_is_close_to_transformers(model: Path, ops: NativeOps) -> None:
    tokens = make_tokens(45)
    pool = Pool(load_decoder(model, ops), [tokens])
    assert_close(pool.run(0, [20, 1, 24]), expected_logits(model, tokens))


@pytest.mark.parametrize("window", [7, 30, 70])
def test_sliding_windows(tmp_path: Path, ops: NativeOps, window: int) -> None:
    make_tiny("mistral", tmp_path, sliding_window=window)
    tokens = make_tokens(150)
    pool = Pool(load_decoder(tmp_path, ops), [tokens])
    assert_close(pool.run(0, [100, 1, 49]), expected_logits(tmp_path, tokens))


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        "llama",
        tmp_path_factory.mktemp("long"),
        max_position_embeddings=2048,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
    )


def test_several_spans_are_close_to_transformers(long_llama: Path, ops: NativeOps) -> None:
    tokens = make_tokens(1200)
    pool = Pool(load_decoder(long_llama, ops), [tokens], num_blocks=128)
    ours = pool.run(0, [1100, 1, 1, 98])
    assert_close(ours, expected_logits(long_llama, tokens))


def test_logits_have_the_same_bits_however_they_are_computed(long_llama: Path) -> None:
    """Chunks of 1, 7, 17, 64 and 512, batches, block tables, block sizes, 1 and 2 threads."""
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 300, 511, 512, 513, 900]
    sequences = [make_tokens(length, seed=length) for length in lengths]
    alone: list[torch.Tensor] = []
    decoder = load_decoder(long_llama, NativeOps(2))
    for index, tokens in enumerate(sequences):
        pool = Pool(decoder, sequences, num_blocks=256)
        alone.append(pool.run(index, [len(tokens)]))
    chooser = random.Random(5)
    for trial in range(6):
        num_threads, block_size = chooser.choice([1, 2]), chooser.choice([16, 32, 64])
        decoder = load_decoder(long_llama, NativeOps(num_threads))
        pool = Pool(decoder, sequences, block_size, num_blocks=4096 // block_size)
        got: list[list[torch.Tensor]] = [[] for _ in sequences]
        left = list(lengths)
        while any(left):
            waiting = [i for i, count in enumerate(left) if count]
            chosen = chooser.sample(waiting, chooser.randint(1, len(waiting)))
            plan = [(i, min(left[i], chooser.choice([1, 7, 17, 64, 512]))) for i in chosen]
            for (index, count), logits in zip(plan, pool.step(plan), strict=True):
                got[index].append(logits)
                left[index] -= count
        for expected, parts in zip(alone, got, strict=True):
            assert torch.equal(torch.cat(parts), expected), f"trial {trial}"


def test_quantizing_at_load(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    tokens = make_tokens(40)
    exact = Pool(load_decoder(tmp_path, NativeOps(1)), [tokens]).run(0, [40])
    errors = {}
    for how in ("q8", "q4"):
        ops = NativeOps(1, quantize=how)
        decoder = load_decoder(tmp_path, ops)
        kinds = {layer.qkv.kind for layer in decoder._weights.layers}  # type: ignore[attr-defined]
        assert kinds == {Kind.Q8 if how == "q8" else Kind.Q4}
        logits = Pool(decoder, [tokens]).run(0, [40])
        errors[how] = float((logits - exact).norm() / exact.norm())
    assert errors["q8"] < 0.05 < errors["q4"] < 0.5


def test_shapes_that_the_kernels_do_not_take_are_refused(tmp_path: Path) -> None:
    ops = NativeOps(1)
    with pytest.raises(ValueError, match="multiple"):
        ops.prepare_vector(vector(40))
    make_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="block size"):
        Pool(load_decoder(tmp_path, ops), [[1]], block_size=4)


def test_no_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(kernels.NoKernels, match=r"install g\+\+"):
        kernels.find_compiler()
