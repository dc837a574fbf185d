"""The native kernels: compiled for this machine on first use, cached, loaded with ctypes.

The cache key is the source, the compiler, the flags and the CPU's own flags, so that a moved home
folder or an upgraded compiler never loads the wrong code.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from model.hub.cache import cache_folder

_SOURCE = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # a fused multiply-add is written as one, or there is none
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
)
_FORCE = {
    "best": (),
    "avx512-vnni": ("-DHEADWATER_NO_BF16",),
    "avx2": ("-DHEADWATER_AVX2",),
    "portable": ("-DHEADWATER_PORTABLE",),
}


class NoKernels(Exception):
    """The kernels cannot be built here; the message is one line that says why."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library. `compiler` is the path of the one that made it and what it says of
    itself; `id` is the hash of all that could change a bit of a result."""

    library: ctypes.CDLL
    instruction_set: str
    compiler: str
    id: str


@lru_cache
def load(instruction_set: str = "best") -> Kernels:
    """Compile if needed (some seconds, once), and load. Raises NoKernels."""
    compiler = find_compiler()
    flags = _FLAGS + _FORCE[instruction_set]
    key = blake3()
    for path in sorted(_SOURCE.iterdir()):
        if path.suffix in (".cpp", ".hpp"):
            key.update(path.name.encode() + path.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    for part in (compiler, version, " ".join(flags), _cpu()):
        key.update(part.encode() + b"\0")
    digest = key.hexdigest()[:32]
    path = cache_folder() / "kernels" / f"{digest}.so"
    if not path.exists():
        _compile(compiler, flags, path)
    library = _declare(ctypes.CDLL(str(path)))
    said = f"{compiler}: {version.partition(chr(10))[0]}"
    return Kernels(library, library.hw_instruction_set().decode(), said, digest)


def find_compiler() -> str:
    """The path of g++ or clang++ (`CXX` goes first). Raises NoKernels."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise NoKernels("no C++ compiler is installed; install g++ (apt-get install g++)")


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "native.so"
            command = [compiler, *flags, str(_SOURCE / "native.cpp"), "-o", str(built)]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            if said.returncode != 0:
                lines = [line for line in said.stderr.splitlines() if "error" in line]
                reason = (lines or said.stderr.splitlines() or ["no message"])[0]
                raise NoKernels(f"{compiler} cannot compile the kernels: {reason}")
            os.replace(built, path)
    except OSError as error:
        raise NoKernels(f"the kernels cannot be built in {path.parent}: {error}") from None


def main() -> None:
    """`python -m model.ops.kernels`: the instruction set in use on stdout, and in a second line the
    compiler; exit code 1 and the reason on stderr where there is none."""
    try:
        kernels = load()
        sys.stdout.write(f"{kernels.instruction_set}\n{kernels.compiler}\n")
    except NoKernels as error:
        raise SystemExit(str(error)) from None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.machine()


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("hw_instruction_set", ctypes.c_char_p, []),
        ("hw_sizeof_instruction", i32, []),
        ("hw_sizeof_step", i32, []),
        ("hw_create", pointer, [i32]),
        ("hw_destroy", None, [pointer]),
        ("hw_strip_bytes", i64, [i32, i32]),
        ("hw_pack", None, [i32, pointer, i32, i32, i32, pointer]),
        ("hw_run", None, [pointer, pointer, pointer]),
        ("hw_sizeof_sample_row", i32, []),
        ("hw_sizeof_sample_result", i32, []),
        ("hw_sample", None, [pointer, pointer, i32, i32, pointer, pointer, i32, pointer, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


if __name__ == "__main__":
    main()
