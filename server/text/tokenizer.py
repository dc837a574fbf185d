"""Text to token ids and back, over the `tokenizers` library alone.

A folder's `tokenizer.json` says everything about the ids; `tokenizer_config.json` and
`generation_config.json` name the tokens that begin and end a text. The bytes of each token are
worked out once, at load, so that a stream of ids can be turned into text without asking the
library (see `detokenizer.py`). Two ways of spelling bytes are known, byte-level BPE and
SentencePiece with byte fallback; every other decoder is refused at load.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from blake3 import blake3

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The three ways in which a tokenizer can put a space in front of a text; see `_without_prefix`.
_WORD_BOUNDARY = "▁"
# Control tokens of some models that are part of what an answer says: see `answer_text.py`.
_SHOWN = frozenset(
    {"<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"}
    | {"<think>", "</think>"}
)


class TokenizerError(ValueError):
    """The tokenizer's files, or a text, cannot be used. One line for people."""


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once.

    `token_bytes[id]` are the exact bytes of a token, b"" for special ones (but for the marks of
    tool calls and of reasoning) and for ids that no token has. `special_ids` are the control
    tokens. `fingerprint` is the blake3 of tokenizer.json.
    """

    def __init__(
        self,
        document: bytes,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """From the content of the three files. Raises TokenizerError."""
        config = config or {}
        self.fingerprint = blake3(document).hexdigest()
        try:
            self._json = json.loads(document)
            self._plain = self._build(prefix=True, special=False)
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from None
        self._variants = {(True, False): self._plain}
        self._lock = threading.Lock()
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.special_tokens = {
            token.content: id_ for id_, token in added.items() if token.special and token.content
        }
        self.vocab = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values(), default=-1) + 1
        self._spellings = [""] * self.vocab_size
        for spelling, id_ in self.vocab.items():
            self._spellings[id_] = spelling
        self._strips_space, self.token_bytes = self._token_bytes(set(added))
        self._special_pattern = _alternation(self.special_tokens)
        self.bos_token, self.bos_token_id = self._named(config, "bos_token")
        self.eos_token, eos = self._named(config, "eos_token")
        self.eos_token_ids = self._end_ids(config, generation_config or {}, eos)
        self._prompt_prefix = self._find_prompt_prefix(config)
        self._most_characters = self._find_most_characters()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a model's folder. Raises TokenizerError when tokenizer.json is missing or broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{folder} has no tokenizer.json; only models with a fast tokenizer can be served"
            )
        config = _read_json(folder / "tokenizer_config.json")
        return cls(path.read_bytes(), config, _read_json(folder / "generation_config.json"))

    def prepare(self) -> None:
        """Make now what the first prompts would wait for, some tenths of a second."""
        for special in (True, False):
            self._variant(prefix=True, special=special)

    def encode(self, text: str, *, special: bool = True, continues: bool = False) -> list[int]:
        """The ids of `text`; no BOS is added.

        With `special` the spelling of a special token is that token, without it is ordinary text.
        `continues` says that the text goes on from another one: a tokenizer that puts a space in
        front of a text does not do so then. Raises TokenizerError for lone surrogates.
        """
        if not text:
            return []
        if continues and special:
            # What follows a special token is a text of its own; only the part before goes on.
            match = self._special_pattern.search(text)
            cut = match.start() if match else len(text)
            if 0 < cut < len(text):
                head = self.encode(text[:cut], special=False, continues=True)
                return head + self.encode(text[cut:])
            continues = cut > 0
        ids = self._ids(text, self._variant(prefix=not continues, special=special))
        if not special and self._leaks(ids):
            # A tokenizer that takes whole words from the vocabulary can meet a control token there.
            # Character by character it cannot.
            encoder = self._variant(prefix=False, special=False)
            ids = [id_ for character in text for id_ in self._ids(character, encoder)]
            if self._leaks(ids):
                raise TokenizerError("the text holds a control token that cannot be spelled out")
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt, begun as the tokenizer's files say (BOS), never twice."""
        ids = self.encode(text)
        prefix = self._prompt_prefix
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def least_tokens(self, num_characters: int) -> int:
        """How many tokens a text of so many characters has at least."""
        return 0 if self._most_characters is None else num_characters // self._most_characters

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, bytes that are not UTF-8 as U+FFFD. Where the tokenizer puts a space
        in front of a text, that one space is taken away again."""
        parts: list[bytes] = []
        for id_ in ids:
            if id_ in self.special_ids:
                if not skip_special:
                    parts.append(self._spellings[id_].encode())
            elif 0 <= id_ < self.vocab_size:
                parts.append(self.token_bytes[id_])
        text = b"".join(parts).decode("utf-8", "replace")
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def bytes_of(self, id_: int) -> bytes:
        """One token's bytes as they show in `piece`: also those of a special one's spelling, and
        none for ids that no token has (a model's vocabulary may be padded)."""
        if not 0 <= id_ < self.vocab_size:
            return b""
        if id_ in self.special_ids:
            return self._spellings[id_].encode()
        return self.token_bytes[id_]

    def piece(self, id_: int) -> str:
        """One token as text: a special one by its spelling, bytes that are not UTF-8 as U+FFFD."""
        if not 0 <= id_ < self.vocab_size:
            return ""
        if id_ in self.special_ids:
            return self._spellings[id_]
        return self.token_bytes[id_].decode("utf-8", "replace")

    # ------------------------------------------------------------------------------ how it is built

    def _build(self, *, prefix: bool, special: bool) -> tokenizers.Tokenizer:
        document = self._json if prefix else _without_prefix(self._json)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special
        return tokenizer

    def _variant(self, *, prefix: bool, special: bool) -> tokenizers.Tokenizer:
        """The library's settings are not per call, so each combination is an instance of its own,
        made when it is first needed."""
        prefix = prefix or not _has_prefix(self._json)
        with self._lock:
            if (prefix, special) not in self._variants:
                self._variants[prefix, special] = self._build(prefix=prefix, special=special)
            return self._variants[prefix, special]

    def _ids(self, text: str, encoder: tokenizers.Tokenizer) -> list[int]:
        try:  # of a batch, since `encode` keeps the GIL, and the event loop waiting
            return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise TokenizerError(
                "the text holds half of a surrogate pair (U+D800 to U+DFFF), which is no character"
            ) from None

    def _find_most_characters(self) -> int | None:
        """No token stands for more characters; None where one may stand for any number."""
        decoders = [step.get("type") for step in _flatten(self._json.get("decoder"), "decoders")]
        every_byte = decoders == ["ByteLevel"] or self._json["model"].get("byte_fallback")
        added = self._plain.get_added_tokens_decoder().values()
        if not every_byte or any(token.lstrip or token.rstrip for token in added):
            return None
        longest = max(map(len, [*self.token_bytes, *self._spellings]), default=1)
        # Normalising may put characters together: as far as Unicode does, four at most.
        return longest if self._json.get("normalizer") is None else 4 * longest

    def _leaks(self, ids: list[int]) -> bool:
        unknown = self.vocab.get(self._json["model"].get("unk_token") or "", -1)
        return any(id_ in self.special_ids and id_ != unknown for id_ in ids)

    def _token_bytes(self, added: set[int]) -> tuple[bool, list[bytes]]:
        """Whether decoding takes one space away from the front, and the bytes of each id."""
        steps = _flatten(self._json.get("decoder"), "decoders")
        kinds = [step.get("type") for step in steps]
        result = [b""] * self.vocab_size
        if kinds == ["ByteLevel"]:
            table = _byte_alphabet()
            for id_, spelling in enumerate(self._spellings):
                if id_ in added or any(character not in table for character in spelling):
                    result[id_] = spelling.encode()
                else:
                    result[id_] = bytes(table[character] for character in spelling)
        elif self._is_sentencepiece(steps):
            fallback = "ByteFallback" in kinds
            for id_, spelling in enumerate(self._spellings):
                match = _BYTE_TOKEN.fullmatch(spelling) if fallback else None
                if match:
                    result[id_] = bytes([int(match[1], 16)])
                elif id_ in added:
                    result[id_] = spelling.encode()
                else:
                    result[id_] = spelling.replace(_WORD_BOUNDARY, " ").encode()
        else:
            raise TokenizerError(
                f"the decoder {kinds or None} in tokenizer.json is not supported; expected "
                "ByteLevel, or SentencePiece's with ByteFallback or Metaspace"
            )
        for id_ in self.special_ids:
            if self._spellings[id_] not in _SHOWN:
                result[id_] = b""
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and _metaspace_prefix(step))
            for step in steps
        )
        return strips, result

    @staticmethod
    def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
        boundary = False
        for step in steps:
            kind = step.get("type")
            if kind == "Replace":
                if step.get("pattern") != {"String": _WORD_BOUNDARY} or step.get("content") != " ":
                    return False
                boundary = True
            elif kind == "Metaspace":
                boundary = step.get("replacement", _WORD_BOUNDARY) == _WORD_BOUNDARY
            elif kind == "Strip":
                if (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
                    return False
            elif kind not in ("ByteFallback", "Fuse"):
                return False
        return boundary

    def _named(self, config: Mapping[str, Any], key: str) -> tuple[str | None, int | None]:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            return None, None
        return text, self.vocab.get(text)

    def _end_ids(
        self, config: Mapping[str, Any], generation_config: Mapping[str, Any], eos: int | None
    ) -> tuple[int, ...]:
        listed = generation_config.get("eos_token_id")
        ids = {eos, self._named(config, "eot_token")[1], self._named(config, "eom_token")[1]}
        ids.update(listed if isinstance(listed, list) else [listed])
        return tuple(sorted(id_ for id_ in ids if isinstance(id_, int)))

    def _find_prompt_prefix(self, config: Mapping[str, Any]) -> list[int]:
        """What goes before a raw prompt: add_bos_token decides where it is set, else whatever the
        post-processor puts there."""
        wanted = config.get("add_bos_token")
        if wanted is None:
            ids = self._plain.encode("a", add_special_tokens=True).ids
            bare = self._plain.encode("a", add_special_tokens=False).ids
            starts = range(len(ids) - len(bare) + 1)
            found = next((at for at in starts if ids[at : at + len(bare)] == bare), 0)
            return ids[:found]
        return [self.bos_token_id] if wanted and self.bos_token_id is not None else []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} must be a JSON object")
    return value


def _alternation(spellings: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest spelling at the earliest place; nothing when there are none."""
    ordered = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _flatten(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A decoder, normalizer or pre-tokenizer as a list of its steps."""
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [inner for item in step.get(key, []) for inner in _flatten(item, key)]
    return [step]


def _metaspace_prefix(step: Mapping[str, Any]) -> bool:
    return step.get("prepend_scheme", "always") != "never" and bool(
        step.get("add_prefix_space", True)
    )


def _has_prefix(document: Mapping[str, Any]) -> bool:
    normalizers = _flatten(document.get("normalizer"), "normalizers")
    pre_tokenizers = _flatten(document.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        (step["type"] == "Metaspace" and _metaspace_prefix(step))
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space", True))
        for step in pre_tokenizers
    )


def _without_prefix(document: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, putting no space in front of a text."""
    normalizers = _flatten(document.get("normalizer"), "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    steps = []
    for step in _flatten(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step = {key: value for key, value in step.items() if key != "add_prefix_space"}
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step = {**step, "add_prefix_space": False}
        steps.append(step)
    return {
        **document,
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
    }


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (encoder.py, bytes_to_unicode): the printable
    Latin-1 characters stand for themselves, the others for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
