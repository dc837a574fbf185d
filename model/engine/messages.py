"""Every message that crosses the boundary between the API process and the engine process.

The channel is a socketpair. A frame is a 4-byte big-endian length and a msgpack document whose
`type` field names the struct. Nothing else is accepted: no pickle, no free-form dictionaries.
This module imports neither torch nor the server.
"""

from __future__ import annotations

import struct

import msgspec

from model.config import DecoderConfig
from model.engine.request import FinishReason, SamplingParams

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, tag_field="type", omit_defaults=True):
    """A frame on the channel."""


# ---------------------------------------------------------------- API process -> engine process


class Start(Message, tag="start"):
    """The first frame: what to serve and with what. `None` leaves the choice to the engine."""

    epoch: int
    name: str
    config: DecoderConfig
    weights: tuple[str, ...]
    fingerprint: str
    tokenizer: str | None = None  # a tokenizer.json; without one no grammar is taken
    device: str = "auto"
    dtype: str = "auto"
    ops: str = "auto"  # native, reference; avx2 and portable force a smaller instruction set
    quantize: str = "none"  # q4, q8: matrices that are not packed in their file
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_memory: int | None = None  # bytes
    disk_folder: str | None = None  # of the KV cache's disk tier
    disk_bytes: int = 0  # its budget; 0 is off
    check_accounting: bool = False  # assert the block accounting after each step


class Submit(Message, tag="submit"):
    """Run one request. `output_token_ids` are tokens drawn earlier (a resumed generation):
    penalties, limits and draws count from the boundary between the two lists. With `report_blocks`
    the request's last output names its blocks, and there is one also when it is aborted."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []
    salt: bytes = b""
    report_blocks: bool = False


class Abort(Message, tag="abort"):
    """Stop these requests; their blocks are back within the step. Unknown ids are ignored."""

    request_ids: list[str]


class CacheQuery(Message, tag="cache_query"):
    """Where are the blocks of this sequence? Answered by a CacheReport before the next step."""

    query_id: int
    token_ids: list[int]
    salt: bytes = b""


class Forget(Message, tag="forget"):
    """Remove these blocks from every tier; answered by Forgotten. A block that a running request
    has is found by nobody else, never written, and free when that request ends; if that request
    loses it to a preemption and computes it again, it is a new block. Blocks that come after a
    forgotten one are only forgotten when they are named too."""

    keys: list[bytes]


class ForwardInspection(msgspec.Struct, tag="forward", array_like=True):
    """What each token says of the next one: the `top_k` most probable. Of each of these layers the
    logit lens and the norms."""

    top_k: int
    layers: list[int] = []


class AttentionInspection(msgspec.Struct, tag="attention", array_like=True):
    """How much these queries (places of tokens) look at each key before them, in these heads."""

    layer: int
    heads: list[int]
    queries: list[int]


class CacheInspection(msgspec.Struct, tag="kv_cache", array_like=True):
    """`max_tokens` greedy tokens, drawn with the KV cache and without it."""

    max_tokens: int


Inspection = ForwardInspection | AttentionInspection | CacheInspection


class Inspect(Message, tag="inspect"):
    """Look into the model while it computes these tokens, between the steps of the requests.
    Answered by `Inspected` messages up to one that is `done` or has an `error`."""

    inspect_id: int
    token_ids: list[int]
    what: Inspection


class EndInspection(Message, tag="end_inspection"):
    """Nobody waits for this inspection any more."""

    inspect_id: int


class Shutdown(Message, tag="shutdown"):
    """Leave the loop and exit 0."""


# ---------------------------------------------------------------- engine process -> API process


class ModelInfo(msgspec.Struct, frozen=True):
    """What is served, as the API tells it."""

    name: str
    family: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    num_parameters: int
    parameters: dict[str, int]  # of embedding, attention, feed_forward, norms, lm_head (0 if tied)
    quantization: str
    device: str
    dtype: str
    ops: str
    reproducible: bool
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    kv_layout: str
    max_num_seqs: int
    max_num_batched_tokens: int


class EngineReady(Message, tag="ready"):
    """The model is loaded and warmed; requests are taken from now on."""

    epoch: int
    model: ModelInfo


class EngineFailed(Message, tag="failed"):
    """The engine cannot start or go on; it exits right after. `message` is one line for people."""

    message: str


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log-probability of a token under the raw distribution (natural log), its rank (0 is the most
    probable; -1: not asked for), and the most probable tokens as (id, log-probability)."""

    token_id: int
    logprob: float
    rank: int = -1
    top: list[tuple[int, float]] = []


class RequestError(msgspec.Struct):
    """Why one request failed, in the words and codes of the wire."""

    type: str
    code: str
    message: str


class TokenOutput(msgspec.Struct, omit_defaults=True):
    """What one request got from one step.

    `num_reused_tokens` comes with the request's first output of tokens or of `prefill`: how many of
    the given tokens, those drawn earlier among them, were found in a cache, and `num_disk_tokens`
    of these in the disk tier; beside them `num_corrupt_blocks`, whose files were there and not what
    they should be. `prefill` is (done, total) while the prompt is being computed. `queue_position`
    is how many requests are before one that waits, when that has changed (-1: it is not told).
    `prompt_logprobs` has one entry for each prompt token after the first. `block_keys` comes with
    the last output where it was asked for: the keys of the full blocks that the request found or
    computed, from the root on."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    finish_reason: FinishReason | None = None
    num_reused_tokens: int = -1
    num_disk_tokens: int = 0
    num_corrupt_blocks: int = 0
    prefill: tuple[int, int] | None = None
    queue_position: int = -1
    error: RequestError | None = None
    block_keys: list[bytes] = []


class DiskStats(msgspec.Struct, array_like=True, frozen=True):
    """The disk tier, in blocks: read and found good, looked for in vain, removed because a file
    was not what its name says, failed reads and writes, written, removed for others, given up
    unwritten; and what is there now."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    errors: int = 0
    written: int = 0
    evicted: int = 0
    dropped: int = 0
    num_files: int = 0
    num_bytes: int = 0


class EngineStats(msgspec.Struct, array_like=True):
    """The state after a step; counters count from the engine's start. `reused_tokens` are those of
    all tiers, `disk_tokens` of them from the disk."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    disk_tokens: int = 0
    evicted_blocks: int = 0
    preemptions: int = 0
    aborted: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    disk: DiskStats = DiskStats()


class StepOutputs(Message, tag="outputs"):
    """All that one step made, for all requests, in one frame."""

    epoch: int
    outputs: list[TokenOutput]
    stats: EngineStats


class BlockState(msgspec.Struct, array_like=True, frozen=True):
    """A full block of a sequence: its key, whether the pool holds it with these very tokens, and
    whether the disk tier has a file of that name (what is in it, only a read can tell)."""

    key: bytes
    device: bool
    disk: bool


class CacheReport(Message, tag="cache_report"):
    """The full blocks of a CacheQuery's tokens in order; none when a token id is out of range."""

    query_id: int
    blocks: list[BlockState]


class Forgotten(Message, tag="forgotten"):
    """The keys of a Forget of which nothing is left. One that is missing here has a file that
    cannot be removed: try again."""

    keys: list[bytes]


class PositionView(msgspec.Struct, array_like=True):
    """What the model says after one token: the most probable next ones as (id, logit,
    log-probability), the entropy of the distribution in nats, and the (log-probability, rank) of
    the token that came; rank 0 is the most probable. None where nothing came."""

    top: list[tuple[int, float, float]]
    entropy: float
    next: tuple[float, int] | None


class LayerView(msgspec.Struct, array_like=True):
    """What a layer did to some tokens, in order: the top of the logit lens behind it as (id,
    probability), the norm of the residual stream behind it, and the norms of what attention and
    the feed-forward part added to it."""

    layer: int
    lens: list[tuple[int, float]]
    residual: list[float]
    attention: list[float]
    feed_forward: list[float]


class AttentionRows(msgspec.Struct, array_like=True):
    """Some queries of a head, in the order asked for; each row has a number for every key up to the
    query itself."""

    head: int
    scores: list[list[float]] = []
    weights: list[list[float]] = []
    values_share: list[list[float]] = []


class CacheComparison(msgspec.Struct, array_like=True):
    """The tokens drawn with the KV cache, the seconds of all forward passes with it and without,
    and whether the same tokens were drawn without."""

    token_ids: list[int]
    seconds_with: float
    seconds_without: float
    tokens_equal: bool


class Inspected(Message, tag="inspected"):
    """A part of what an inspection found; parts come in order. `widths` are those of a hidden state
    and of the logits."""

    inspect_id: int
    widths: tuple[int, int] | None = None
    positions: list[PositionView] = []
    layers: list[LayerView] = []
    rows: list[AttentionRows] = []
    comparison: CacheComparison | None = None
    done: bool = False
    error: RequestError | None = None


class Heartbeat(Message, tag="heartbeat"):
    """Sent each second by a thread of its own. `pending` says whether there is work; `steps` grows
    with each finished step, so that a step that never ends shows."""

    epoch: int
    steps: int
    pending: bool


ToEngine = Start | Submit | Abort | CacheQuery | Forget | Inspect | EndInspection | Shutdown
FromEngine = (
    EngineReady | EngineFailed | StepOutputs | CacheReport | Forgotten | Inspected | Heartbeat
)

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One frame: length, then the document."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the {MAX_FRAME_BYTES} of a frame")
    return _LENGTH.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The body's length from the 4-byte header. Raises ValueError beyond MAX_FRAME_BYTES."""
    length: int = _LENGTH.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return length
