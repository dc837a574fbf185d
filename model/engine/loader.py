"""From a `Start` message to an engine that is ready to step."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from model.config import DecoderConfig
from model.decoder import Decoder
from model.engine.backing import Backing
from model.engine.engine import Engine
from model.engine.fault import with_fault
from model.engine.grammars import Grammars, Vocabulary
from model.engine.inspections import Inspections
from model.engine.messages import ModelInfo, Start, Submit
from model.engine.prefix import root_key
from model.engine.request import SamplingParams
from model.engine.scheduler import Scheduler
from model.engine.threads import usable_cores
from model.engine.tiers import DiskTier, TierUnavailable
from model.grammar import vocabulary
from model.hub.cache import GIB
from model.hub.memory import available_memory
from model.inspect import Inspector
from model.kv import KVCache
from model.ops.base import Ops
from model.ops.kernels import NoKernels
from model.ops.native import NativeOps
from model.ops.reference import ReferenceOps
from model.runner import ModelRunner
from model.sampling.native import NativeSampler
from model.sampling.sampler import Sampler
from model.weights.load import load_weights

CPU_KV_BYTES = GIB
CPU_KV_SHARE = 0.25  # of the memory that is available
CUDA_KV_SHARE = 0.8  # of what the weights leave
POPULATED_KV_BYTES = 256 << 20  # at most so much of the pool before it is asked for


class LoadError(Exception):
    """The engine cannot start; the message is one line for people."""


def load_engine(start: Start) -> tuple[Engine, ModelInfo]:
    """Load the weights, size the KV pool, warm up. Raises LoadError."""
    try:
        return _load(start)
    except LoadError:
        raise
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load {start.name}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LoadError(
            f"not enough memory to load {start.name}: take a smaller model, or give the KV cache "
            f"less (--kv-memory) ({error})"
        ) from error


def _load(start: Start) -> tuple[Engine, ModelInfo]:
    config = start.config
    device = _device(start.device)
    if start.max_model_len is not None and start.max_model_len > config.max_position_embeddings:
        raise LoadError(
            f"--max-model-len {start.max_model_len} is more than the "
            f"{config.max_position_embeddings} tokens that {start.name} was made for"
        )
    num_threads = start.threads or usable_cores()
    grammars = _grammars(start)
    torch.set_num_threads(1)  # unpacking is many small ops: threads only wait for each other
    ops, warning = _ops(start, device, num_threads)
    if start.kv_memory is not None:
        _pool_size(start, ops)  # a pool that is too small is told before the weights are read
    weights = load_weights([Path(path) for path in start.weights], config, ops)
    if isinstance(ops, ReferenceOps):  # the native ones have threads of their own
        torch.set_num_threads(num_threads)
    num_blocks, max_model_len = _pool_size(start, ops)
    decoder = Decoder(config, weights, ops, max_model_len)
    kv = KVCache(config, num_blocks, start.block_size, ops)
    runner = ModelRunner(
        decoder,
        kv,
        NativeSampler(config.vocab_size, ops)
        if isinstance(ops, NativeOps)
        else Sampler(config.vocab_size, device),
        end_token_ids=config.eos_token_ids,
        device=device,
    )
    static_root = root_key(start.fingerprint, ops.id, kv.layout, decoder.rope.variant)
    _warm_up(_scheduler(start, num_blocks, max_model_len, config), runner, config)
    # One long session's memory, while nobody has asked yet: it would wait for it otherwise. Not
    # sooner: loading wants both the cores and the memory's bandwidth.
    one_session = -(-max_model_len // start.block_size)
    num_populated = min(one_session, POPULATED_KV_BYTES // kv.bytes_per_block)
    threading.Thread(target=kv.populate, args=[num_populated], name="kv-pages", daemon=True).start()
    backing = _backing(start, kv, static_root)
    engine = Engine(
        _scheduler(start, num_blocks, max_model_len, config, backing),
        with_fault(runner),
        vocab_size=config.vocab_size,
        static_root=static_root,
        epoch=start.epoch,
        backing=backing,
        grammars=grammars,
        inspections=Inspections(Inspector(decoder, start.block_size)),
        check_accounting=start.check_accounting,
    )
    info = ModelInfo(
        name=start.name,
        family=config.family,
        fingerprint=start.fingerprint,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_parameters=weights.num_parameters,
        parameters=weights.parameters,
        quantization=weights.quantization,
        device=str(device),
        dtype=str(ops.dtype).removeprefix("torch."),
        ops=ops.id,
        reproducible=ops.reproducible,
        eos_token_ids=config.eos_token_ids,
        block_size=start.block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=kv.bytes_per_token,
        kv_layout=ops.kv_layout,
        max_num_seqs=start.max_num_seqs,
        max_num_batched_tokens=start.max_num_batched_tokens,
    )
    if warning is not None:
        sys.stderr.write(f"headwater: {warning}\n")
    return engine, info


def _grammars(start: Start) -> Grammars | None:
    if start.tokenizer is None:
        return None
    tokenizer, vocab_size = Path(start.tokenizer), start.config.vocab_size
    ends = start.config.eos_token_ids
    return Grammars(lambda: Vocabulary(vocabulary(tokenizer, vocab_size, ends), ends))


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            "--device cuda: no CUDA device is usable here (no GPU, no driver, or a CPU build of "
            "torch); use --device cpu"
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def _ops(start: Start, device: torch.device, num_threads: int) -> tuple[Ops, str | None]:
    """Our own kernels on a CPU, unless they are not wanted (`--ops reference`, a dtype that only
    torch has) or cannot be had: then torch, and the reason why."""
    reference = ReferenceOps(device, _dtype(start.dtype, device))
    if device.type != "cpu" or start.ops == "reference":
        return reference, None
    if start.ops == "auto" and start.dtype not in ("auto", "float32"):
        return reference, None
    try:
        if not NativeOps.fit(start.config, start.block_size):
            raise NoKernels("the model's dimensions are not multiples of 16")
        instruction_set = "best" if start.ops in ("auto", "native") else start.ops
        return NativeOps(num_threads, instruction_set, start.quantize), None
    except NoKernels as error:
        if start.ops != "auto":
            raise LoadError(f"--ops {start.ops}: {error}") from None
        return reference, f"slower torch ops are used instead of our own: {error}"


def _dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        asked = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, asked)
    return dtype


def _pool_size(start: Start, ops: Ops) -> tuple[int, int]:
    """`num_blocks` and `max_model_len`: as many blocks as the memory allows, but never more than
    could be referenced at once."""
    config, size = start.config, start.block_size
    block_bytes = KVCache.measure_block(config, size, ops)
    wanted_len = start.max_model_len or config.max_position_embeddings
    if start.kv_memory is not None:
        budget = start.kv_memory
    elif ops.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(ops.device)[0] * CUDA_KV_SHARE)
    else:
        budget = min(CPU_KV_BYTES, int(available_memory() * CPU_KV_SHARE))
    num_blocks = min(budget // block_bytes, start.max_num_seqs * -(-wanted_len // size))
    if num_blocks < 2:
        raise LoadError(
            f"{budget} bytes of KV cache hold less than two blocks of {block_bytes} bytes; give it "
            "more (--kv-memory) or use a smaller model"
        )
    if start.max_model_len is not None and num_blocks * size < wanted_len:
        raise LoadError(
            f"the KV cache holds {num_blocks * size} tokens, less than --max-model-len "
            f"{wanted_len}; give it more (--kv-memory) or ask for less"
        )
    return num_blocks, min(wanted_len, num_blocks * size)


def _backing(start: Start, kv: KVCache, static_root: bytes) -> Backing | None:
    """The disk tier, where it is wanted and can be had; why not is a line on stderr."""
    if start.disk_folder is None or start.disk_bytes == 0:
        return None
    try:
        tier = DiskTier(
            Path(start.disk_folder),
            root=static_root,
            layout=kv.layout,
            block_size=start.block_size,
            block_bytes=kv.bytes_per_block,
            budget_bytes=start.disk_bytes,
        )
    except TierUnavailable as error:
        sys.stderr.write(
            f"headwater: no KV cache on disk: {error}; give this server a folder of its own "
            "(--data), or switch it off (--disk-cache off)\n"
        )
        return None
    return Backing(kv, tier)


def _scheduler(
    start: Start,
    num_blocks: int,
    max_model_len: int,
    config: DecoderConfig,
    backing: Backing | None = None,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=start.block_size,
        max_num_seqs=start.max_num_seqs,
        max_num_batched_tokens=start.max_num_batched_tokens,
        max_model_len=max_model_len,
        end_token_ids=config.eos_token_ids,
        backing=backing,
    )


def _warm_up(scheduler: Scheduler, runner: ModelRunner, config: DecoderConfig) -> None:
    """A short prefill and two decodes with a scheduler of their own: first calls are slow ones."""
    engine = Engine(scheduler, runner, vocab_size=config.vocab_size, static_root=b"warm up")
    num_tokens = min(8, scheduler.max_model_len - 3)
    if num_tokens < 1:
        return
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.submit(Submit("warm-up", [0] * num_tokens, params))
    while engine.has_work:
        engine.step()
