"""The machine's read bandwidth: the bound of a decode step, which reads all weights once.

python -m benchmarks.bandwidth
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from model.engine.threads import usable_cores
from model.ops.kernels import NoKernels, find_compiler
from server.bench.origin import origin

_SOURCE = Path(__file__).with_name("bandwidth.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread")
MEBIBYTES = 512  # far beyond any cache
PASSES = 8


def read_bandwidth(threads: int, mebibytes: int = MEBIBYTES, passes: int = PASSES) -> float:
    """Bytes per second that `threads` threads read together, the best of `passes`.

    Raises NoKernels where there is no compiler or the program cannot be built or run."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "bandwidth")
        try:
            _run([find_compiler(), *_FLAGS, str(_SOURCE), "-o", program])
            said = _run([program, str(threads), str(mebibytes), str(passes)])
        except (OSError, subprocess.SubprocessError) as error:
            raise NoKernels(f"the read bandwidth cannot be measured: {error}") from None
    return float(said.split()[0])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def main() -> int:
    """One line for people, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--mebibytes", type=int, default=MEBIBYTES)
    options = parser.parse_args()
    if min(options.threads, options.mebibytes) < 1:
        parser.error("--threads and --mebibytes must be at least 1")
    try:
        rate = read_bandwidth(options.threads, options.mebibytes)
    except NoKernels as error:
        print(f"bandwidth: {error}", file=sys.stderr)
        return 1
    print(f"{options.threads} threads read {rate / 1e9:.1f} GB/s")
    document = {
        "benchmark": "bandwidth",
        "threads": options.threads,
        "mebibytes": options.mebibytes,
        "bytes_per_s": round(rate),
    }
    print(json.dumps(document | origin()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
