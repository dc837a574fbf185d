"""The inspector against transformers, against the decoder itself, and on both kinds of ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.engine.messages import (
    AttentionInspection,
    CacheInspection,
    ForwardInspection,
    Inspect,
    Inspection,
)
from model.inspect import CHUNK, ROWS, Inspector
from model.ops.base import Ops
from model.ops.native import NativeOps
from model.ops.reference import ReferenceOps
from model.ops.tap import Tap
from tests.fixtures.tiny import FAMILIES, make_tiny
from tests.model.decoding import Pool, expected_logits, load_decoder, make_tokens
from tests.model.inspecting import attention_rows, check_rows, found, layer_views, square

LENGTH = 70  # more than a chunk
TOKENS = make_tokens(LENGTH)
LAYERS, HEADS = 2, 4  # of the tiny models


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else NativeOps(2)


def theirs(folder: Path, token_ids: list[int]) -> Any:
    """What transformers gives for them, with attentions and hidden states."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), output_attentions=True, output_hidden_states=True)


# -------------------------------------------------------------------------------- attention


def test_attention_equals_transformers(model: Path) -> None:
    decoder = load_decoder(model)
    expected = theirs(model, TOKENS).attentions
    for layer in range(LAYERS):
        rows = attention_rows(decoder, TOKENS, layer)
        check_rows(rows, expected[layer][0], 1e-3)
        for one in rows:
            for scores, weights in zip(one.scores, one.weights, strict=True):
                softmax = torch.tensor(scores).softmax(-1).tolist()
                assert softmax == pytest.approx(weights, abs=1e-5)


def test_a_window_hides_what_is_behind_it(tmp_path: Path) -> None:
    make_tiny("mistral", tmp_path, sliding_window=7)
    decoder = load_decoder(tmp_path)
    for layer in range(LAYERS):
        expected = theirs(tmp_path, TOKENS).attentions[layer][0]
        for one, weights in zip(attention_rows(decoder, TOKENS, layer), expected, strict=True):
            torch.testing.assert_close(square(one.weights), weights, rtol=0, atol=1e-3)
            assert all(row[:-7] == [0.0] * max(len(row) - 7, 0) for row in one.weights)
            assert all(abs(sum(row) - 1) < 1e-5 for row in one.weights + one.values_share)


def test_it_is_what_the_layer_adds(llama: Path, ops: Ops) -> None:
    """The weights, times the values in the cache, through the output matrix: what attention really
    added to the residual stream."""
    decoder = load_decoder(llama, ops)
    pool = Pool(decoder, [TOKENS])
    seen: list[Tensor] = []
    meta: Any = []
    forward = decoder.forward

    def watched(ids: Tensor, kv: Any, given: Any) -> Tensor:
        meta.append(given)
        return forward(ids, kv, given, Tap(residual=lambda x: seen.append(x.clone())))

    decoder.forward = watched  # type: ignore[method-assign]
    pool.run(0, [LENGTH])
    decoder.forward = forward  # type: ignore[method-assign]
    for layer in range(LAYERS):
        _, values = ops.read_kv(pool.kv.layer(layer), meta[0].block_tables[0], LENGTH)
        weights = torch.stack(
            [square(one.weights) for one in attention_rows(decoder, TOKENS, layer)]
        )
        group = HEADS // values.shape[1]
        each = values.transpose(0, 1).repeat_interleave(group, 0)  # [heads, n, D]
        attended = (weights @ each).transpose(0, 1).flatten(1)
        output = decoder._weights.layers[layer].output
        added = ops.evaluate(lambda o, x, w=output: o.linear(x, w), attended)
        # Kernels that multiply bf16 round each probability on its way to the values.
        atol = 2e-3 if ops.id.startswith("native avx512-vnni-bf16") else 1e-4
        torch.testing.assert_close(
            added, seen[2 * layer + 1] - seen[2 * layer], rtol=1e-3, atol=atol
        )
        # And the share of a key is its weight times the length of its value.
        shares = weights * each.norm(dim=-1)[:, None]
        expected = shares / shares.sum(-1, keepdim=True)
        for one, head in zip(attention_rows(decoder, TOKENS, layer), expected, strict=True):
            torch.testing.assert_close(square(one.values_share), head, rtol=0, atol=1e-6)


def test_some_queries_are_rows_of_all(llama: Path, ops: Ops) -> None:
    decoder = load_decoder(llama, ops)
    every = attention_rows(decoder, TOKENS, 1)
    some = attention_rows(decoder, TOKENS, 1, [3, 40, 65])
    for one, of in zip(some, every, strict=True):
        for name in ("scores", "weights", "values_share"):
            wanted = [getattr(of, name)[query] for query in (3, 40, 65)]
            if decoder.ops.reproducible:
                assert getattr(one, name) == wanted
            for row, expected in zip(getattr(one, name), wanted, strict=True):
                assert row == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------- forward


def test_a_tap_changes_no_bit(model: Path, ops: Ops) -> None:
    decoder = load_decoder(model, ops)
    plain = Pool(decoder, [TOKENS]).run(0, [LENGTH])
    shown: list[int] = []
    layers: list[int] = []
    tap = Tap(
        residual=lambda x: shown.append(len(x)),
        queries=lambda layer, *_: layers.append(layer),
    )
    forward = decoder.forward
    decoder.forward = lambda ids, kv, meta: forward(ids, kv, meta, tap)  # type: ignore
    assert torch.equal(Pool(decoder, [TOKENS]).run(0, [LENGTH]), plain)
    assert shown == [LENGTH] * (1 + 2 * LAYERS)
    assert layers == list(range(LAYERS))


def test_positions_equal_transformers(model: Path) -> None:
    expected = expected_logits(model, TOKENS)
    logprobs = expected.log_softmax(-1)
    parts = found(load_decoder(model), TOKENS, ForwardInspection(5))
    views = [view for part in parts for view in part.positions]
    assert len(views) == LENGTH
    for i, view in enumerate(views):
        best = expected[i].topk(5)
        assert [logit for _, logit, _ in view.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        for token, logit, logprob in view.top:
            assert logit == pytest.approx(float(expected[i, token]), abs=1e-3)
            assert logprob == pytest.approx(float(logprobs[i, token]), abs=1e-3)
        entropy = -(logprobs[i].exp() * logprobs[i]).sum()
        assert view.entropy == pytest.approx(float(entropy), abs=1e-3)
        if i + 1 < LENGTH:
            assert view.next is not None
            logprob, rank = view.next
            assert logprob == pytest.approx(float(logprobs[i, TOKENS[i + 1]]), abs=1e-3)
            higher = (expected[i] > expected[i, TOKENS[i + 1]] + 1e-4).sum()
            assert higher <= rank <= higher + 1
    assert views[-1].next is None


def test_layers_equal_transformers(model: Path) -> None:
    """The norm of the residual stream behind each layer but the last, of which transformers shows
    the final norm."""
    hidden = theirs(model, TOKENS).hidden_states
    views = layer_views(load_decoder(model), TOKENS)
    for view in views[:-1]:
        norms = hidden[view.layer + 1][0].norm(dim=-1).tolist()
        assert view.residual == pytest.approx(norms, rel=1e-4)
    assert all(norm > 0 for view in views for norm in view.attention + view.feed_forward)


def test_the_last_lens_is_the_models_own_word(model: Path, ops: Ops) -> None:
    decoder = load_decoder(model, ops)
    parts = found(decoder, TOKENS, ForwardInspection(1, [LAYERS - 1]))
    tops = [view.top[0] for part in parts for view in part.positions]
    lens = [one for part in parts for view in part.layers for one in view.lens]
    assert [token for token, _ in lens] == [token for token, _, _ in tops]
    probs = torch.tensor([logprob for _, _, logprob in tops]).exp().tolist()
    assert [prob for _, prob in lens] == pytest.approx(probs, rel=1e-4)


def test_the_shapes_of_a_phi3_shaped_model(tmp_path: Path) -> None:
    """D and V are its own."""
    make_tiny("phi3", tmp_path, vocab_size=1002, hidden_size=96, num_key_value_heads=4)
    (part,) = found(load_decoder(tmp_path), make_tokens(6), ForwardInspection(1))
    assert part.widths == (96, 1002)
    assert len(part.positions) == 6


# ---------------------------------------------------------------------------- with and without


def test_the_cache_changes_no_token(llama: Path, ops: Ops) -> None:
    decoder = load_decoder(llama, ops)
    prompt, count = TOKENS, 40
    comparison = found(decoder, prompt, CacheInspection(count))[-1].comparison
    assert comparison is not None and comparison.tokens_equal
    assert min(comparison.seconds_with, comparison.seconds_without) > 0
    ids = list(prompt)
    pool = Pool(decoder, [ids])
    pool.tables[0] = list(range(-(-(len(prompt) + count) // 16)))
    logits = pool.run(0, [len(prompt)])
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        logits = pool.run(0, [1])
    assert comparison.token_ids == ids[len(prompt) :]


def test_a_single_token(llama: Path, ops: Ops) -> None:
    decoder = load_decoder(llama, ops)
    (rows,) = found(decoder, [7], AttentionInspection(0, [2], [0]))[-1].rows
    assert rows.weights == rows.values_share == [[1.0]]
    comparison = found(decoder, [7], CacheInspection(1))[-1].comparison
    assert comparison is not None and len(comparison.token_ids) == 1
    view = found(decoder, [7], ForwardInspection(3, [0]))
    assert len(view[0].positions) == len(view[1].layers[0].lens) == 1


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "what",
    [
        ForwardInspection(1, [0, 1]),
        AttentionInspection(1, [0, 3], list(range(200))),
        CacheInspection(9),
    ],
)
def test_it_computes_a_chunk_at_a_time(llama: Path, ops: Ops, what: Inspection) -> None:
    """Between two yields there is one forward pass of a chunk, or as many rows of the head."""
    decoder = load_decoder(llama, ops)
    computed: list[int] = []
    asked: list[int] = []
    forward, logits = decoder.forward, decoder.logits

    def counted_forward(ids: Tensor, *others: Any) -> Tensor:
        computed.append(len(ids))
        return forward(ids, *others)

    def counted_logits(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return logits(rows)

    decoder.forward = counted_forward  # type: ignore[method-assign]
    decoder.logits = counted_logits  # type: ignore[method-assign]
    total = 0
    for _ in Inspector(decoder, 16).run(Inspect(1, make_tokens(200), what)):
        assert sum(computed) <= CHUNK and sum(asked) <= ROWS
        total += sum(computed)
        computed.clear()
        asked.clear()
    assert total >= 200


@pytest.mark.parametrize(
    ("token_ids", "what", "text"),
    [
        ([], ForwardInspection(1), "at least one"),
        ([512], ForwardInspection(1), "from 0 to 511"),
        ([-1], CacheInspection(1), "from 0 to 511"),
        ([1], ForwardInspection(1, [LAYERS]), "a layer is from 0 to 1"),
        ([1], AttentionInspection(LAYERS, [0], [0]), "a layer is from 0 to 1"),
        ([1], AttentionInspection(0, [HEADS], [0]), "a head is from 0 to 3"),
        ([1], AttentionInspection(0, [0], [1]), "a query is from 0 to 0"),
    ],
)
def test_what_the_model_has_not_is_refused(
    llama: Path, token_ids: list[int], what: Inspection, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        found(load_decoder(llama), token_ids, what)


def test_logits_that_are_no_numbers_are_refused(llama: Path) -> None:
    decoder = load_decoder(llama)
    decoder.logits = lambda rows: torch.full((len(rows), 512), torch.nan)  # type: ignore
    with pytest.raises(ValueError, match="not numbers"):
        found(decoder, [1, 2], ForwardInspection(1))
