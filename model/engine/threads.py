"""How many threads to compute with: as many as there are cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores by affinity, and no more than a container's quota (cgroup v2) pays for."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (group / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no such group: the affinity counts
    return cores
