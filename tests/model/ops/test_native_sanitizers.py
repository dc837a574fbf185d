"""The kernels in C++ alone: under sanitizers, against naive double arithmetic, and their AVX-512
code on machines that have no AVX-512.

`native/sanitize.cpp` does the work; here it is built in each way and run.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from model.ops import kernels

CHECKS = Path(__file__).parent / "native"
KERNELS = Path(kernels.__file__).parent / "native"
# The kernels' own flags decide what is computed; -O1 and line numbers make a report readable.
FLAGS = [
    *(flag for flag in kernels._FLAGS if flag not in ("-O3", "-fPIC", "-shared")),
    "-O1",
    "-g1",
    "-fno-exceptions",  # none are thrown, and their clean-up takes long to instrument
    f"-I{KERNELS}",
    f"-I{CHECKS}",
]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
# GCC 12 fails on SIMDe's 64-byte structs in this pass, and says once per function that passing
# them by value has another ABI without AVX-512, which is true and without effect here.
EMULATED = ["-include", "emulated_avx512.hpp", "-fno-tree-sra", "-Wno-psabi"]
LONG = pytest.mark.slow
SETS = ("portable", "avx2", "avx512-vnni", "avx512-vnni-bf16")  # each holds those before it
# Leaks are not what is looked for, and looking for them needs ptrace, which containers may forbid.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}

pytestmark = pytest.mark.timeout(300)  # two compilations of half a minute, on a busy machine


def compiled(source: str, *flags: str) -> tuple[bool, str]:
    """Whether the compiler takes `source` (a path, or `-` for an empty program), and its words."""
    command = [find_compiler(), *flags, "-x", "c++", source]
    program = "int main() {}\n" if source == "-" else None
    said = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    return said.returncode == 0, said.stdout + said.stderr


@cache
def find_compiler() -> str:
    try:
        return kernels.find_compiler()
    except kernels.NoKernels as error:
        pytest.skip(str(error))


@cache
def best_set() -> str:
    """What `simd.hpp` chooses for this machine."""
    words = set(compiled("-", "-march=native", "-dM", "-E")[1].split())
    if words >= {"__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512VNNI__"}:
        return "avx512-vnni-bf16" if "__AVX512BF16__" in words else "avx512-vnni"
    return "avx2" if words >= {"__AVX2__", "__FMA__", "__F16C__"} else "portable"


def build(folder: Path, flags: list[str]) -> Path:
    """sanitize.cpp, built with `flags`; skips where a sanitizer is not installed."""
    for flag in flags:
        if flag.startswith("-fsanitize="):
            works, _ = compiled("-", flag, "-o", str(folder / "empty"))
            if not works:
                pytest.skip(f"{find_compiler()} has no libraries for {flag}")
    program = folder / "sanitize"
    works, words = compiled(str(CHECKS / "sanitize.cpp"), *FLAGS, *flags, "-o", str(program))
    assert works, f"sanitize.cpp does not compile with {' '.join(flags)}:\n{words}"
    return program


def check(program: Path, size: str, instruction_set: str) -> None:
    said = subprocess.run(
        [program, size], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    if "unexpected memory mapping" in said.stderr:
        pytest.skip("this ThreadSanitizer cannot run with the kernel's vm.mmap_rnd_bits")
    assert said.returncode == 0, said.stderr[-4000:]
    assert not said.stderr
    lines = said.stdout.splitlines()
    assert lines[0] == f"instruction set: {instruction_set}"
    assert int(lines[1].removeprefix("comparisons: ")) > 100_000


@pytest.mark.parametrize(
    ("forced", "size"),
    [
        ("best", "normal"),
        ("avx512-vnni", "normal"),
        ("avx2", "normal"),
        pytest.param("best", "long", marks=LONG),
        pytest.param("avx512-vnni", "long", marks=LONG),
        pytest.param("avx2", "long", marks=LONG),
        pytest.param("portable", "normal", marks=LONG),
        pytest.param("portable", "long", marks=LONG),
    ],
)
def test_no_overrun_no_undefined_behaviour_right_results(
    tmp_path: Path, forced: str, size: str
) -> None:
    if forced != "best" and SETS.index(forced) >= SETS.index(best_set()):
        pytest.skip(f"the best instruction set of this CPU is {best_set()}: `best` covers it")
    program = build(tmp_path, [*kernels._FORCE[forced], *MEMORY])
    check(program, size, best_set() if forced == "best" else forced)


@pytest.mark.parametrize("size", ["small", pytest.param("normal", marks=LONG)])
def test_no_data_race(tmp_path: Path, size: str) -> None:
    """ThreadSanitizer does not know the futex, and need not: all order comes from the atomics."""
    check(build(tmp_path, THREADS), size, best_set())


@pytest.fixture
def emulation() -> list[str]:
    """The flags for AVX-512 by SIMDe."""
    if best_set().startswith("avx512"):
        pytest.skip("this CPU has AVX-512: `best` covers it natively")
    if best_set() != "avx2":
        pytest.skip("the emulation of AVX-512 stands on AVX2, which this CPU does not have")
    found, _ = compiled("-", "-include", "simde/x86/avx512.h", "-fsyntax-only")
    if not found:
        pytest.skip("SIMDe's headers are not installed (apt-get install libsimde-dev)")
    return EMULATED


def test_avx512_without_the_hardware(tmp_path: Path, emulation: list[str]) -> None:
    check(build(tmp_path, emulation), "normal", "avx512-vnni")


@LONG
def test_avx512_without_the_hardware_under_sanitizers(tmp_path: Path, emulation: list[str]) -> None:
    # -O0: optimising SIMDe's functions with the sanitizers in them takes minutes.
    check(build(tmp_path, [*emulation, *MEMORY, "-O0"]), "normal", "avx512-vnni")
