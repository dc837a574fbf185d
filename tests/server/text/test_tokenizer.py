"""The tokenizer: llama.cpp's ids for the default model, exact bytes, special tokens, BOS."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from blake3 import blake3
from small_tokenizers import byte_level_metadata, from_metadata, sentencepiece_metadata

from model.gguf.tokenizer import tokenizer_config, tokenizer_json
from server.text.tokenizer import Tokenizer, TokenizerError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "smollm2_tokens.json"
ROWS = json.loads(FIXTURE.read_text())


class TestDefaultModel:
    def test_ids_are_those_of_llama_cpp(self, smollm2: Tokenizer) -> None:
        assert len(ROWS) >= 200
        wrong = [row["text"] for row in ROWS if smollm2.encode(row["text"]) != row["ids"]]
        assert wrong == []

    def test_text_comes_back(self, smollm2: Tokenizer) -> None:
        for row in ROWS:
            assert smollm2.decode(row["ids"], skip_special=False) == row["text"]

    def test_facts(self, smollm2: Tokenizer, default_folder: Path) -> None:
        assert smollm2.vocab_size == len(smollm2.token_bytes) == 49152
        assert smollm2.special_ids == set(range(17))
        assert smollm2.bos_token == "<|im_start|>" and smollm2.eos_token == "<|im_end|>"
        assert 2 in smollm2.eos_token_ids
        document = (default_folder / "tokenizer.json").read_bytes()
        assert smollm2.fingerprint == blake3(document).hexdigest()
        assert smollm2.encode_prompt("hi") == smollm2.encode("hi")

    def test_bytes_of_random_ids_are_the_librarys(
        self, smollm2: Tokenizer, default_folder: Path
    ) -> None:
        library = tokenizers.Tokenizer.from_file(str(default_folder / "tokenizer.json"))
        draw = random.Random(5)
        for _ in range(300):
            ids = draw.choices(range(smollm2.vocab_size), k=draw.randint(1, 12))
            for skip in (True, False):
                expected = library.decode(ids, skip_special_tokens=skip)
                assert smollm2.decode(ids, skip_special=skip) == expected


class TestBytes:
    def test_byte_level(self, byte_level: Tokenizer) -> None:
        single = {data for data in byte_level.token_bytes if len(data) == 1}
        assert single == {bytes([byte]) for byte in range(256)}
        assert b" w" in byte_level.token_bytes and b"<tool>" in byte_level.token_bytes
        assert all(byte_level.token_bytes[id_] == b"" for id_ in byte_level.special_ids)

    def test_sentencepiece(self, sentencepiece: Tokenizer) -> None:
        assert sentencepiece.token_bytes[4:260] == [bytes([byte]) for byte in range(256)]
        assert b" hello" in sentencepiece.token_bytes
        assert sentencepiece.token_bytes[:4] == [b"", b"", b"", b""]

    @pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
    def test_any_text_comes_back(self, kind: str, request: pytest.FixtureRequest) -> None:
        tokenizer: Tokenizer = request.getfixturevalue(kind)
        draw = random.Random(6)
        for _ in range(500):
            text = "".join(
                draw.choices("helo wus\n\té中😀\u200d\u0301<|>\x00", k=draw.randint(0, 20))
            )
            assert tokenizer.decode(tokenizer.encode(text)) == text
            continued = tokenizer.encode(text, continues=True)
            assert b"".join(tokenizer.token_bytes[id_] for id_ in continued) == text.encode()

    def test_pieces(self, byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
        assert [byte_level.piece(id_) for id_ in byte_level.encode("hello é")][:2] == ["hello", " "]
        assert byte_level.piece(2) == "<|im_end|>"
        assert byte_level.piece(byte_level.vocab["Ã"]) == "\ufffd"
        assert byte_level.piece(10**6) == byte_level.piece(-1) == ""
        assert sentencepiece.piece(4 + 0x0A) == "\n"

    def test_metaspace_and_its_one_space(self) -> None:
        metadata = sentencepiece_metadata()
        document = tokenizer_json(metadata)
        metaspace = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}
        document.update(normalizer=None, pre_tokenizer=metaspace, decoder=decoder)
        tokenizer = Tokenizer(json.dumps(document).encode())
        legacy = from_metadata(metadata)
        assert tokenizer.encode("hello w") == legacy.encode("hello w")
        library = tokenizers.Tokenizer.from_str(json.dumps(document))
        for text in ("w", " w", "hello  w", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == library.decode(
                library.encode(text).ids
            )
        assert tokenizer.token_bytes == legacy.token_bytes
        assert tokenizer.encode("hello", continues=True) == [tokenizer.vocab["hello"]]


class TestSpecialTokens:
    TEXT = "a<|im_end|>b<|user|><tool>"

    def test_on_and_off(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode(self.TEXT)
        assert [id_ for id_ in ids if id_ in byte_level.special_ids] == [2, 3]
        plain = byte_level.encode(self.TEXT, special=False)
        assert not byte_level.special_ids & set(plain)
        assert byte_level.decode(plain) == self.TEXT
        # A token that is not a control token stays a token either way.
        assert byte_level.vocab["<tool>"] in ids and byte_level.vocab["<tool>"] in plain

    def test_off_for_sentencepiece(self, sentencepiece: Tokenizer) -> None:
        plain = sentencepiece.encode("hello<s></s><|user|>", special=False)
        assert not sentencepiece.special_ids & set(plain)
        assert sentencepiece.decode(plain) == "hello<s></s><|user|>"

    def test_off_where_whole_words_are_looked_up(self) -> None:
        # "stop" is a control token and at the same time one piece of the pre-tokenizer.
        metadata = byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe"})
        metadata["tokenizer.ggml.tokens"].append("stop")
        metadata["tokenizer.ggml.token_type"].append(3)
        tokenizer = from_metadata(metadata)
        stop = tokenizer.special_tokens["stop"]
        assert stop in tokenizer.encode("a stop")
        plain = tokenizer.encode("stop", special=False)
        assert stop not in plain and tokenizer.decode(plain) == "stop"

    def test_continuing_text(self, sentencepiece: Tokenizer) -> None:
        hello, prefixed = sentencepiece.vocab["hello"], sentencepiece.vocab["▁hello"]
        assert sentencepiece.encode("hello") == [prefixed]
        assert sentencepiece.encode("hello", continues=True) == [hello]
        assert sentencepiece.encode("hello<|user|>hello", continues=True) == [hello, 3, prefixed]
        assert sentencepiece.encode("<|user|>hello", continues=True) == [3, prefixed]
        assert sentencepiece.encode("") == []

    def test_half_a_surrogate_pair(self, byte_level: Tokenizer) -> None:
        for special in (True, False):
            with pytest.raises(TokenizerError, match="surrogate"):
                byte_level.encode("a\ud800", special=special)


class TestPromptsAndEnds:
    def test_bos_from_the_config(self, byte_level: Tokenizer) -> None:
        assert byte_level.encode_prompt("hello") == byte_level.encode("hello")
        metadata = byte_level_metadata(**{"tokenizer.ggml.add_bos_token": True})
        tokenizer = from_metadata(metadata)
        assert tokenizer.encode_prompt("hello") == [0, *tokenizer.encode("hello")]
        assert tokenizer.encode_prompt("") == [0]
        assert tokenizer.encode_prompt("<|begin|>hello") == tokenizer.encode_prompt("hello")
        assert tokenizer.encode("hello")[0] != 0

    def test_bos_from_the_post_processor(self) -> None:
        metadata = byte_level_metadata()
        document = tokenizer_json(metadata)
        library = tokenizers.Tokenizer.from_str(json.dumps(document))
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A <|im_end|>",
            special_tokens=[("<|begin|>", 0), ("<|im_end|>", 2)],
        )
        config: dict[str, Any] = tokenizer_config(metadata)
        assert Tokenizer(library.to_str().encode(), config).encode_prompt("a")[0] != 0
        del config["add_bos_token"]
        tokenizer = Tokenizer(library.to_str().encode(), config)
        assert tokenizer.encode_prompt("a") == [0, *tokenizer.encode("a")]

    def test_ends(self) -> None:
        metadata = byte_level_metadata()
        document = json.dumps(tokenizer_json(metadata)).encode()
        config = {"eos_token": {"content": "<|user|>", "special": True}, "eot_token": "<|im_end|>"}
        assert Tokenizer(document, config).eos_token_ids == (2, 3)
        assert Tokenizer(document, config, {"eos_token_id": [0, 3]}).eos_token_ids == (0, 2, 3)
        assert Tokenizer(document, {}, {"eos_token_id": 3}).eos_token_ids == (3,)
        assert Tokenizer(document).eos_token_ids == ()


class TestFiles:
    def test_a_folder(self, tmp_path: Path) -> None:
        metadata = byte_level_metadata()
        document = {**tokenizer_json(metadata), "truncation": _truncation(), "padding": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(metadata)))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.bos_token_id == 0 and tokenizer.eos_token_ids == (2, 3)
        assert len(tokenizer.encode("abc" * 50)) == 150  # the file's truncation is not for us

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no tokenizer.json"),
            ({"tokenizer.json": "{"}, "cannot be read"),
            ({"tokenizer.json": "{}"}, "cannot be read"),
            (
                {"tokenizer.json": None, "tokenizer_config.json": "["},
                "tokenizer_config.json is not",
            ),
            ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "must be a JSON object"),
        ],
    )
    def test_faults(self, tmp_path: Path, files: dict[str, str | None], message: str) -> None:
        good = json.dumps(tokenizer_json(byte_level_metadata()))
        for name, content in files.items():
            (tmp_path / name).write_text(content or good)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        "decoder",
        [
            None,
            {"type": "WordPiece", "prefix": "##", "cleanup": True},
            {"type": "BPEDecoder", "suffix": "</w>"},
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
            {"type": "Replace", "pattern": {"String": "▁"}, "content": "_"},
        ],
    )
    def test_other_decoders_are_refused(self, decoder: dict[str, Any] | None) -> None:
        document = {**tokenizer_json(byte_level_metadata()), "decoder": decoder}
        with pytest.raises(TokenizerError, match=r"decoder .* is not supported"):
            Tokenizer(json.dumps(document).encode())


def _truncation() -> dict[str, Any]:
    return {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}


def test_threads() -> None:
    """Many threads at once, both ways of encoding, from the first use on."""
    tokenizer = from_metadata(sentencepiece_metadata())
    texts = [f"hello {'<s>' * (index % 3)} user{index}" for index in range(64)]
    barrier = threading.Barrier(8)

    def work(thread: int) -> list[list[int]]:
        barrier.wait(30)
        return [
            tokenizer.encode(text, special=special, continues=continues)
            for text in texts
            for special in (thread % 2 == 0, thread % 2 == 1)
            for continues in (False, True)
        ]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    alone = from_metadata(sentencepiece_metadata())
    for thread, result in enumerate(results):
        expected = [
            alone.encode(text, special=special, continues=continues)
            for text in texts
            for special in (thread % 2 == 0, thread % 2 == 1)
            for continues in (False, True)
        ]
        assert result == expected
