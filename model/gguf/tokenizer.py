"""The tokenizer of a GGUF file as a Hugging Face `tokenizer.json` document.

Plain JSON in, plain JSON out: no text library is imported. Two kinds of tokenizer are known:
`gpt2`, byte-level BPE whose pre-tokenizer is named by `tokenizer.ggml.pre`, and `llama`,
SentencePiece BPE whose merges follow from the tokens' scores. The names, and which pattern each
name means, are facts of llama.cpp (src/llama-vocab.cpp); the patterns themselves are those the
models were trained with. A name that is not known is refused, because a wrong pre-tokenizer gives
wrong ids and no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NEWLINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}|{_NEWLINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_OTHER}|{_NEWLINES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_NEWLINES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_SLASHED}|{_NEWLINES}"
_GPT4O = (
    rf"{_CASED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}|{_NEWLINES}"
)
_PORO = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_NEWLINES}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DIGITS = (r"\p{N}", _GPT2)

# tokenizer.ggml.pre -> the patterns, applied one after the other to the pieces of the one before.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"), (_GPT2,)),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de"), (_GPT2,)),
    "jina-v2-code": (_GPT2,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "falcon": _FALCON,
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), (_PORO,)),
    "viking": (_PORO, r"\p{N}"),
}
# A piece that is a token as a whole is that token, whatever its merges would give.
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"}
_ADD_BOS = _IGNORE_MERGES
# The other ways a vocabulary ends a turn; GGUF files often name only one of them.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")


def tokenizer_json(metadata: Mapping[str, Any]) -> Json:
    """The document for the `tokenizer.*` keys of a GGUF header.

    There is no post-processor: what begins a prompt is said by `tokenizer_config`. Raises
    ValueError for missing or inconsistent keys and for an unknown tokenizer or pre-tokenizer.
    """
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(metadata, tokens)
    elif kind == "llama":
        parts = _sentencepiece(metadata, tokens, types)
    else:
        raise ValueError(
            f"the tokenizer model {kind!r} of this GGUF file is not supported; expected 'gpt2' "
            "(byte-level BPE) or 'llama' (SentencePiece)"
        )
    strip_right = _strips_right(metadata)
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": strip_right and token not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": types[index] != USER_DEFINED,
        }
        for index, token in enumerate(tokens)
        if types[index] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        **parts,
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> Json:
    """What `tokenizer_config.json` needs: the spelling of each named token (a key is left out when
    the file has no such token), add_bos_token, and chat_template (None when there is none)."""
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, short in {**names, "eot": "eot", "eom": "eom"}.items():
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[f"{short}_token"] = tokens[index]
    if "eot_token" not in config:
        control = {token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL}
        end = next((token for token in _END_OF_TURN if token in control), None)
        if end is not None:
            config["eot_token"] = end
    kind = metadata.get("tokenizer.ggml.model")
    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", default))
    config["clean_up_tokenization_spaces"] = False
    template = metadata.get("tokenizer.chat_template")
    config["chat_template"] = template if isinstance(template, str) else None
    return config


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ValueError("this GGUF file has no vocabulary (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise ValueError("the vocabulary of this GGUF file has a token twice")
    return tokens


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * count)
    if not isinstance(types, list) or len(types) != count:
        raise ValueError(f"tokenizer.ggml.token_type must have an entry for each of {count} tokens")
    return types


def _split(pattern: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {pre!r} (tokenizer.ggml.pre) of this GGUF file is not known; "
            f"known are {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError("this GGUF file has no merges (tokenizer.ggml.merges)")
    # The first character may itself be a space, so the separator is looked for after it.
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        raise ValueError(f"the merge {merges[cuts.index(-1)]!r} is not a pair of tokens")
    pairs = [[merge[:cut], merge[cut + 1 :]] for merge, cut in zip(merges, cuts, strict=True)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_split, _PRE_TOKENIZERS[pre]), byte_level],
        },
        "decoder": byte_level,
        "model": _bpe(tokens, pairs, ignore_merges=pre in _IGNORE_MERGES),
    }


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Json:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores must have an entry for each of {len(tokens)} tokens"
        )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    unknown = next(
        (token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _bpe(
            tokens,
            _merges_from_scores(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    }


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """SentencePiece joins the neighbours whose union scores best, so each way to cut a token in
    two is a merge, and the best score goes first (among equals, the shorter left part)."""
    usable = {
        token: index
        for index, token in enumerate(tokens)
        if types[index] in (NORMAL, USER_DEFINED, UNUSED)
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for token, index in usable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                merges.append((-scores[index], usable[left], usable[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in merges]


def _bpe(tokens: Sequence[str], merges: list[list[str]], **options: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
        **options,
    }


def _strips_right(metadata: Mapping[str, Any]) -> bool:
    """Phi-3's control tokens swallow the white space after them; GGUF has no field for it."""
    return (
        metadata.get("general.architecture") == "phi3"
        and metadata.get("tokenizer.ggml.model") == "llama"
    )
