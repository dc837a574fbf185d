"""Where a measurement comes from: the machine, the commit, the command. No number without it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil


def origin(secret: str | None = None) -> dict[str, Any]:
    """`machine`, `commit` (None outside a checkout), `command` (without `secret`), `time`."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if secret:
        command = [argument.replace(secret, "***") for argument in command]
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "command": shlex.join(command),
        "time": int(time.time()),
    }


def _cores() -> int:
    """Cores that this process may use."""
    own = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(own(0)) if own is not None else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` when files differ from it."""
    top = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(top)]
    try:
        found = _output([*git, "rev-parse", "--show-toplevel"])
        if Path(found).resolve() != top:
            return None  # installed inside somebody else's repository
        commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
        dirty = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
