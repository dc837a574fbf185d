"""The benchmark of the KV cache runs on the default model and says where its numbers are from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
def test_the_script() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "kv_cache.py")]
    options = ["--prompt-tokens", "5", "--tokens", "6", "--runs", "2"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["tokens_equal"] is True
    assert (document["prompt_tokens"], document["tokens"]) == (5, 6)
    for name in ("with_cache", "without_cache"):
        assert len(document[name]["runs"]) == 2 and min(document[name]["runs"]) > 0
    assert document["machine"]["cores"] >= 1 and document["command"].startswith("kv_cache.py")
