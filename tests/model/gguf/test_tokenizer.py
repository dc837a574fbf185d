"""The tokenizer documents: what each kind of GGUF metadata becomes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import tokenizers

from model.gguf import tokenizer as gguf_tokenizer
from model.gguf.tokenizer import tokenizer_config, tokenizer_json


def alphabet() -> list[str]:
    """One token for each byte, in the library's spelling and in its order."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre: str, merges: list[str] | None = None, **more: Any) -> dict[str, Any]:
    merges = merges or []
    joined = [merge.replace(" ", "", 1) for merge in merges]
    tokens = ["<|end|>", "<tool>", *alphabet(), *joined]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        **more,
    }


def sentencepiece(words: list[str], **more: Any) -> dict[str, Any]:
    letters = sorted(set("".join(words)) | {"▁"})
    words = [word for word in words if word not in letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    tokens += words + letters
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def library(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))


def words(pre: str, text: str) -> list[str]:
    """The pieces that the pre-tokenizer makes, as text."""
    tokenizer = library(byte_level(pre))
    assert tokenizer.pre_tokenizer is not None
    return [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


class TestPreTokenizers:
    """Each family's own way with digits, contractions, spaces, case and marks. The expected pieces
    follow from the patterns in the models' own tokenizer.json; the whole of it was compared with
    llama.cpp once, for every name."""

    CASES = (
        ("smollm", "in 2024\n7 days", ["in", " ", "2", "0", "2", "4", "\n", "7", " days"]),
        ("starcoder", "x12 I'M", ["x", "1", "2", " I", "'", "M"]),
        ("gpt-2", "in 2024  days I'm", ["in", " 2024", " ", " days", " I", "'m"]),
        ("phi-2", "a\n\n b", ["a", "\n\n", " b"]),
        ("llama-bpe", "In 12345 I'M ok!!\n\n x", "In| |123|45| I|'M| ok|!!\n\n| x".split("|")),
        ("llama3", "a  b\tc", ["a", " ", " b", "\tc"]),
        ("qwen2", "In 123 I'LL\r\n", ["In", " ", "1", "2", "3", " I", "'LL", "\r\n"]),
        ("qwen2", "cafe\u0301s", ["cafe", "\u0301s"]),
        ("qwen35", "cafe\u0301s", ["cafe\u0301s"]),
        ("tekken", "camelCase HTTPServer 12/", "camel|Case| HTTPServer| |1|2|/".split("|")),
        ("gpt-4o", "camelCase's 1234/\n", ["camel", "Case's", " ", "123", "4", "/\n"]),
        ("default", "a 12345!", ["a", " ", "123", "45", "!"]),
        ("falcon", "a, 12345", ["a", ",", " ", "123", "45"]),
        ("deepseek-coder", "x 12中文", ["x", " ", "1", "2", "中文"]),
        ("deepseek-v3", "x1234中文ok", ["x", "123", "4", "中文", "ok"]),
        ("poro-chat", "a b, c", ["a", " b", ",", " c"]),
        ("viking", "a12", ["a", "1", "2"]),
    )

    @pytest.mark.parametrize(("pre", "text", "expected"), CASES)
    def test_pieces(self, pre: str, text: str, expected: list[str]) -> None:
        assert words(pre, text) == expected

    @pytest.mark.parametrize("pre", sorted(gguf_tokenizer._PRE_TOKENIZERS))
    def test_every_name_keeps_every_byte(self, pre: str) -> None:
        text = "Ab 12\u00a0é\u0301 中文かな 👩‍🔬\r\n\t'LL don't  <a_b/>;\u2028...\n\n  x"
        tokenizer = library(byte_level(pre))
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())

    def test_missing_name_is_the_default(self) -> None:
        metadata = byte_level("default")
        named = tokenizer_json(metadata)
        del metadata["tokenizer.ggml.pre"]
        assert tokenizer_json(metadata) == named

    def test_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'martian'.*known are .*smollm"):
            tokenizer_json(byte_level("martian"))


class TestByteLevel:
    def test_merges_in_order(self) -> None:
        tokenizer = library(byte_level("gpt-2", ["l l", "h e", "he ll", "Ġ Ġ"]))
        assert tokenizer.encode("hello   x").tokens == ["hell", "o", "ĠĠ", "Ġ", "x"]

    def test_whole_words_only_where_the_family_takes_them(self) -> None:
        # "abc" is a token that no merge makes.
        for pre, expected in (("llama-bpe", ["abc"]), ("gpt-2", ["a", "b", "c"])):
            metadata = byte_level(pre)
            metadata["tokenizer.ggml.tokens"].append("abc")
            metadata["tokenizer.ggml.token_type"].append(1)
            assert library(metadata).encode("abc").tokens == expected

    def test_added_tokens(self) -> None:
        tokenizer = library(byte_level("gpt-2"))
        added = tokenizer.get_added_tokens_decoder()
        assert {id_: (token.content, token.special) for id_, token in added.items()} == {
            0: ("<|end|>", True),
            1: ("<tool>", False),
        }
        assert tokenizer.encode("a<|end|>b<tool>").ids[1::2] == [0, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokenizer.ggml.merges": None}, "no merges"),
            ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair"),
            ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
            ({"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice"),
            ({"tokenizer.ggml.token_type": [1]}, "an entry for each"),
            ({"tokenizer.ggml.model": "bert"}, "'bert'.*not supported"),
        ],
    )
    def test_faults(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tokenizer_json({**byte_level("gpt-2"), **change})


class TestSentencePiece:
    WORDS = ("▁the", "the", "▁t", "he", "th", "▁▁")

    def test_best_score_first(self) -> None:
        tokenizer = library(sentencepiece(list(self.WORDS)))
        # "▁the" scores best, but is reached only by "▁" + "the" or "▁t" + "he", and of the first
        # steps "▁t" scores best.
        assert tokenizer.encode("the").tokens == ["▁the"]
        assert tokenizer.encode("thhe").tokens == ["▁t", "h", "he"]

    def test_space_prefix(self) -> None:
        metadata = sentencepiece(list(self.WORDS))
        assert library(metadata).encode("h t").tokens == ["▁", "h", "▁t"]
        assert library(metadata).encode("h<s>h").tokens == ["▁", "h", "<s>", "▁", "h"]
        metadata["tokenizer.ggml.add_space_prefix"] = False
        assert library(metadata).encode("h t").tokens == ["h", "▁t"]

    def test_bytes_that_no_token_has(self) -> None:
        tokenizer = library(sentencepiece(list(self.WORDS)))
        ids = tokenizer.encode("t\n😀").ids
        assert tokenizer.decode(ids) == "t\n😀"
        assert tokenizer.encode("t\n").tokens == ["▁t", "<0x0A>"]

    def test_control_and_byte_tokens_are_never_merged_into(self) -> None:
        merges = tokenizer_json(sentencepiece([*self.WORDS, "<", "s", ">", "<s", "s>"]))["model"]
        results = {left + right for left, right in merges["merges"]}
        assert "<s" in results and "<s>" not in results

    def test_phi3_control_tokens_swallow_space(self) -> None:
        metadata = {**sentencepiece(list(self.WORDS)), "general.architecture": "phi3"}
        added = {
            token["content"]: token["rstrip"] for token in tokenizer_json(metadata)["added_tokens"]
        }
        assert added == {"<unk>": False, "<s>": False, "</s>": True}

    def test_scores_are_needed(self) -> None:
        with pytest.raises(ValueError, match="scores must have an entry"):
            tokenizer_json({**sentencepiece(["a"]), "tokenizer.ggml.scores": [0.0]})


class TestConfig:
    def test_named_tokens(self) -> None:
        metadata = byte_level("gpt-2", **{"tokenizer.chat_template": "{{ messages }}"})
        metadata["tokenizer.ggml.eos_token_id"] = 1
        metadata["tokenizer.ggml.padding_token_id"] = 10**6
        assert tokenizer_config(metadata) == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<tool>",
            "eot_token": "<|end|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{{ messages }}",
        }

    def test_bos(self) -> None:
        assert tokenizer_config(byte_level("llama-bpe"))["add_bos_token"] is True
        config = tokenizer_config(sentencepiece(["a"]))
        assert (config["bos_token"], config["add_bos_token"]) == ("<s>", True)
        assert config["chat_template"] is None
        silent = sentencepiece(["a"], **{"tokenizer.ggml.add_bos_token": False})
        assert tokenizer_config(silent)["add_bos_token"] is False


def test_imports_no_text_library() -> None:
    code = (
        "import sys, model.gguf.tokenizer;"
        "print(sorted({'tokenizers', 'torch', 'server', 'regex', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
