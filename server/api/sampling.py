"""The sampling fields that chat and completions have in common, with their bounds."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, ConfigDict, Field

from model.engine.request import Grammar, SamplingParams
from server.api.body import Body, Part, at_most
from server.api.structured import GrammarText, ResponseFormat
from server.errors import InvalidRequest, UnsupportedParameter
from server.services import Services

MAX_N = 8
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 128
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1

# Of other servers: what changes an answer, and no route of this one knows.
_REFUSED = {
    "guided_json": "a schema goes into the response format",
    "guided_regex": "use `regex`",
    "guided_grammar": "use `grammar`",
    "guided_choice": "use `regex`: a|b|c",
    "structured_outputs": "use the response format, `regex` or `grammar`",
    "json_schema": "a schema goes into the response format",
    "bad_words": "use `logit_bias`",
    "use_beam_search": "this server samples",
    "prompt_logprobs": "completions have them, with `echo` and `logprobs`",
    "include_stop_str_in_output": "an answer ends before a stop string",
    "truncate_prompt_tokens": "no prompt is cut without a word",
    "chat_template": "the model's own is used",
}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_as_list)
]


LogitBias = dict[  # JSON has its keys as strings
    Annotated[int, Field(ge=0, strict=False)],
    Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
]


class StreamOptions(Part):
    include_usage: bool | None = None


class SamplingFields(Body):
    """Unknown harmless fields are ignored; those that would change the meaning are refused by
    `refuse`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = Field(default=None, max_length=1024)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    # Below that, a logit divided by it may be no finite number.
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[LogitBias | None, at_most(MAX_LOGIT_BIAS)] = Field(
        default=None, max_length=MAX_LOGIT_BIAS
    )
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    seed: int | None = Field(default=None, ge=-(2**63), le=MAX_SEED)
    stop: Stops | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64, fail_fast=True)] | None
    ) = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    regex: GrammarText | None = None
    grammar: GrammarText | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    _grammars: dict[str, Grammar] | None = None

    def grammars(self) -> dict[str, Grammar]:
        """The grammars that the answer must follow, by the field that asks for each."""
        if self._grammars is None:
            self._grammars = self._make_grammars()
        return self._grammars

    def _make_grammars(self) -> dict[str, Grammar]:
        given = {}
        if self.regex is not None:
            given["regex"] = Grammar("regex", self.regex)
        if self.grammar is not None:
            given["grammar"] = Grammar("lark", self.grammar)
        return given

    def sampling_params(
        self, services: Services, *, max_tokens: int, top_logprobs: int | None
    ) -> SamplingParams:
        """The engine's parameters: what the request says, else the model's own defaults. Raises
        InvalidRequest as `unlimited_params` and `limited` do."""
        return self.limited(self.unlimited_params(services, top_logprobs=top_logprobs), max_tokens)

    def limited(self, params: SamplingParams, max_tokens: int) -> SamplingParams:
        """Those of an answer that may have so many tokens. Raises InvalidRequest for min_tokens
        over that."""
        if params.min_tokens > max_tokens:
            raise InvalidRequest(
                f"`min_tokens` ({params.min_tokens}) is more than the {max_tokens} tokens that the "
                "answer may have",
                param="min_tokens",
            )
        return msgspec.structs.replace(params, max_tokens=max_tokens)

    def unlimited_params(self, services: Services, *, top_logprobs: int | None) -> SamplingParams:
        """The parameters, with a seed drawn where none is given, but for the length of the answer.

        Raises InvalidRequest for token ids beyond the vocabulary and more than one grammar."""
        defaults = services.sampling_defaults
        vocab_size = services.files.config.vocab_size
        for param, ids in (
            ("logit_bias", self.logit_bias or {}),
            ("stop_token_ids", self.stop_token_ids or []),
        ):
            if ids and max(ids) >= vocab_size:
                raise InvalidRequest(
                    f"`{param}` names token {max(ids)}; this model's ids go to {vocab_size - 1}",
                    param=param,
                )
        grammars = self.grammars()
        if len(grammars) > 1:
            first, second, *_ = grammars
            raise InvalidRequest(
                f"`{first}` and `{second}` exclude each other; give one of them", param=second
            )

        def pick(name: str, otherwise: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, otherwise) if value is None else value)

        return SamplingParams(
            temperature=pick("temperature", 1.0),
            top_k=max(int(pick("top_k", 0)), 0),
            top_p=pick("top_p", 1.0),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            seed=secrets.randbits(53) if self.seed is None else self.seed % 2**64,
            grammar=next(iter(grammars.values()), None),
        )

    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def refuse(self, reasons: dict[str, str]) -> None:
        """Raise UnsupportedParameter for a field in `reasons`, or one that no route knows, that is
        there and says something."""
        said: dict[str, Any] = {**(self.model_extra or {})}
        for name, reason in {**_REFUSED, **reasons}.items():
            if said.get(name, getattr(self, name, None)) not in (None, False, [], {}, ""):
                raise UnsupportedParameter(f"`{name}` is not supported: {reason}", param=name)


class FormattedFields(SamplingFields):
    """Sampling fields beside which a response format may stand."""

    response_format: ResponseFormat | None = None

    def _make_grammars(self) -> dict[str, Grammar]:
        given = super()._make_grammars()
        grammar = None if self.response_format is None else self.response_format.grammar()
        return given if grammar is None else {"response_format": grammar, **given}
