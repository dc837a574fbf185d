"""What the engine knows of one generation: its tokens, how far they are computed, its parameters.

No torch here, and no text: a request goes from token ids to token ids.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_GRAMMAR_BYTES = 64 * 1024


class Grammar(msgspec.Struct, frozen=True):
    """What the output must be: `text` is a JSON schema, nothing (`json_object`: any object), a
    regular expression that the whole output matches, or a Lark grammar of llguidance's."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are drawn. Bounds are checked at the edge and in `validate`.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `top_logprobs` None asks
    for no log-probabilities, 0 for the sampled token's alone. `prompt_logprobs` asks for those of
    the prompt. `seed`, `prompt_index`, `choice_index` and the position determine each draw.
    `min_tokens` and `max_tokens` count output tokens. `stop_token_ids` end the request;
    with `ignore_eos` the model's own end tokens do not. With a `grammar` the output is one of its
    texts, and ends where it can go on no further or an end token is drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    seed: int = 0
    prompt_index: int = 0
    choice_index: int = 0
    grammar: Grammar | None = None


class Request:
    """One generation inside the engine.

    `token_ids` is prompt and output together; the engine computes until `num_computed_tokens`
    meets its length, and draws the next token when it does. `block_table[i]` holds the KV of tokens
    [i * block_size, (i + 1) * block_size); `block_keys[i]` is the content address of that block
    once it is full, and the first `num_indexed_blocks` of them are in the prefix index.
    """

    __slots__ = (
        "arrival",
        "block_keys",
        "block_table",
        "id",
        "matcher",
        "num_computed_tokens",
        "num_corrupt_blocks",
        "num_disk_tokens",
        "num_found_tokens",
        "num_given_tokens",
        "num_indexed_blocks",
        "num_preempted_blocks",
        "num_reused_tokens",
        "num_told_logprobs",
        "output_token_ids",
        "params",
        "prompt_token_ids",
        "report_blocks",
        "retry_at",
        "root",
        "sampling",
        "token_ids",
        "waiting_for",
    )

    def __init__(
        self,
        id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        root: bytes,
        output_token_ids: list[int] | None = None,
        *,
        report_blocks: bool = False,
    ) -> None:
        self.id = id
        self.params = params
        self.root = root
        self.report_blocks = report_blocks
        self.prompt_token_ids = prompt_token_ids
        self.output_token_ids = list(output_token_ids or [])
        self.token_ids = prompt_token_ids + self.output_token_ids
        self.num_given_tokens = len(self.token_ids)  # prompt, and tokens drawn earlier
        self.num_computed_tokens = 0
        self.num_reused_tokens = -1  # of the given ones; unknown until it is first scheduled
        self.num_disk_tokens = 0  # how many of them came from the disk tier
        self.num_corrupt_blocks = 0  # looked for there and found spoilt until then
        self.num_found_tokens = 0  # since it was admitted last: in the pool, then on disk
        self.num_told_logprobs = 0  # of the prompt's tokens, where they are asked for
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_indexed_blocks = 0
        self.num_preempted_blocks = 0  # indexed at a preemption
        self.waiting_for: bytes | None = None  # the key of the first block that it did not find
        self.retry_at = 0  # `pool.num_releases` from which on its blocks may be there
        self.arrival = 0
        self.sampling: object = None  # the runner's sampling state of this request
        self.matcher: object = None  # where it is in its grammar, a `grammars.Matcher`

    def append(self, token_id: int) -> None:
        """A drawn token."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    @property
    def known_keys(self) -> list[bytes]:
        """The keys of all full blocks that it found or computed, also before a preemption."""
        return self.block_keys[: max(self.num_indexed_blocks, self.num_preempted_blocks)]

    @property
    def last_block(self) -> int | None:
        return self.block_table[-1] if self.block_table else None

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens
