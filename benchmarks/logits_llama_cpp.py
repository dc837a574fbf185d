"""The logits of llama.cpp for windows of tokens, over a pipe; `quality.py` runs it.

    VENV/bin/python benchmarks/logits_llama_cpp.py MODEL.gguf THREADS

In: for each window an int32 count and so many int32 token ids. Out: once an int32, the size of the
vocabulary; then for each window the logits of all its positions, fp32, one row after the other. It
runs in a venv of its own, with llama-cpp-python.
"""

from __future__ import annotations

import os
import sys

import llama_cpp  # type: ignore[import-not-found,unused-ignore]
import numpy as np

_MAX_WINDOW = 512


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints does not get between the numbers
    model = llama_cpp.Llama(
        model_path=sys.argv[1],
        n_ctx=_MAX_WINDOW,
        n_batch=_MAX_WINDOW,
        n_threads=int(sys.argv[2]),
        n_threads_batch=int(sys.argv[2]),
        logits_all=True,
        verbose=False,
    )
    out.write(np.int32(model.n_vocab()).tobytes())
    out.flush()
    while header := sys.stdin.buffer.read(4):
        count = int(np.frombuffer(header, np.int32)[0])
        tokens = np.frombuffer(sys.stdin.buffer.read(4 * count), np.int32)
        model.reset()
        model.eval(tokens.tolist())
        out.write(np.ascontiguousarray(model.scores[:count], np.float32).tobytes())
        out.flush()


if __name__ == "__main__":
    main()
