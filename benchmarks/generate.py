"""Headwater over HTTP at 16 streams against transformers' `generate()` at batch 1, in one run.

    python benchmarks/generate.py

Both run the default model on all cores, greedily, the same number of tokens; transformers in
fp32 from the same GGUF file, dequantised. They alternate, since only ratios within a run mean
anything on a shared machine. A table, then JSON as the last line. Needs transformers (`make test`
installs it).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.hub import resolve
from server.bench import LoadSpec, run_load
from server.bench.origin import origin

MODEL = "smollm2-135m"
NUM_TOKENS = 64
STREAMS = 16
ROUNDS = 3


def transformers_model(path: Path) -> Any:
    """The published configuration in transformers' own Llama, fp32, with the file's weights as its
    own reader sees them (`from_pretrained(gguf_file=...)` wants a package that we do not need)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    model = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if (missing, unexpected) != (["lm_head.weight"], []):  # the head is tied
        raise ValueError(f"the file does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def generate(model: Any, seed: int) -> float:
    """Tokens/s of one `generate()` after a prompt of 100 tokens."""
    ids = torch.randint(17, 49152, (1, 100), generator=torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
        pad_token_id=2,
    )
    return float((out.shape[1] - 100) / (time.perf_counter() - started))


def serve(data: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, once it is ready."""
    serve = ["serve", MODEL, "--port", "0", "--disk-cache", "off", "--data", data]
    command = [sys.executable, "-m", "server.cli", *serve]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " at http://" in line:
            return process, line.rsplit(" at ", 1)[1].strip()
    raise SystemExit("the server did not start")


def load(url: str, seed: int) -> float:
    """Tokens/s of 16 streams over HTTP."""
    spec = LoadSpec(
        url=url,
        concurrency=(STREAMS,),
        num_requests=STREAMS,
        prompt_tokens=(100,),
        max_tokens=NUM_TOKENS,
        seed=seed,
        warmup=1,
        ignore_eos=True,
    )
    return asyncio.run(run_load(spec)).levels[0].tokens_per_s


def main() -> None:
    model = transformers_model(resolve(MODEL).weights[0])
    generate(model, seed=99)
    data = tempfile.TemporaryDirectory()
    process, url = serve(data.name)
    rounds = []
    try:
        for i in range(ROUNDS):
            rounds += [(load(url, i), generate(model, i))]
    finally:
        process.terminate()
        process.wait()
        data.cleanup()
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    table = Table(title=f"{MODEL}, {NUM_TOKENS} tokens after 100")
    for column in ("what", "tokens/s, median", "each round"):
        table.add_column(column)
    for what, value, i in (
        (f"Headwater over HTTP, {STREAMS} streams", ours, 0),
        ("transformers generate(), batch 1, fp32", theirs, 1),
    ):
        table.add_row(what, f"{value:.1f}", ", ".join(f"{r[i]:.1f}" for r in rounds))
    console = Console()
    console.print(table)
    console.print(f"ratio {ours / theirs:.1f}")
    document = {
        **origin(),
        "headwater_tokens_per_s": ours,
        "generate_tokens_per_s": theirs,
        "ratio": ours / theirs,
        "rounds": rounds,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
