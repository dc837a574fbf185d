"""Whether a model fits in this machine's memory, said before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from model.hub.cache import GIB, HubError

if TYPE_CHECKING:
    from model.hub import ModelFiles

# Interpreter, libraries and activations beside the weights and the KV blocks.
_RUNTIME_BYTES = GIB // 2
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_memory(
    files: ModelFiles,
    kv_bytes: int,
    dtype: Literal["packed", "float32", "bfloat16", "float16"] = "packed",
) -> None:
    """Raises HubError when the weights in `dtype` ("packed": as they are in the file) and
    `kv_bytes` of KV blocks do not fit in the memory that is available now."""
    each = _DTYPE_BYTES.get(dtype)
    weights = files.weights_bytes if each is None else files.num_parameters * each
    needed = weights + kv_bytes + _RUNTIME_BYTES
    available = available_memory()
    if needed > available:
        raise HubError(
            f"too little memory for {files.name}: it needs {needed / GIB:.2f} GiB "
            f"({weights / GIB:.2f} weights, {kv_bytes / GIB:.2f} KV cache, the rest to run) and "
            f"{available / GIB:.2f} GiB are available; give the KV cache less (--kv-memory), "
            "take a smaller model, or end other programs"
        )


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had without swapping, also inside a container with a limit (cgroup v2)."""
    available: int = psutil.virtual_memory().available
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            available = min(available, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no such group here: the machine's own number counts
    return max(available, 0)
