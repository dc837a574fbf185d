"""`headwater doctor`: what this machine has, what is missing, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from model.hub import DEFAULT_MODEL, HubError, resolve
from model.hub.cache import GIB, cache_folder
from model.hub.memory import available_memory

State = Literal["ok", "note", "missing"]
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
MIN_FREE_DISK = 1 * GIB


def examine() -> int:
    """Print the findings. Returns 0, or 1 when something needed is missing."""
    findings = [
        _python(),
        _torch(),
        _cpu(),
        _memory(),
        _disk(),
        _kernels(),
        _gpu(),
        _model(),
    ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for state, what, found, advice in findings:
        table.add_row(_MARKS[state], what, found, advice)
    Console().print(table)
    return 1 if any(state == "missing" for state, *_ in findings) else 0


Finding = tuple[State, str, str, str]


def _python() -> Finding:
    return "ok", "Python", f"{platform.python_version()} in {sys.prefix}", ""


def _torch() -> Finding:
    try:
        return "ok", "torch", version("torch"), ""
    except PackageNotFoundError:
        return "missing", "torch", "not installed", "make run installs it into .venv"


def _cpu() -> Finding:
    flags = _cpu_flags()
    sets = [
        name
        for flag, name in (
            ("avx2", "AVX2"),
            ("avx512f", "AVX-512"),
            ("avx512_vnni", "VNNI"),
            ("avx512_bf16", "BF16"),
        )
        if flag in flags
    ]
    usable = len(os.sched_getaffinity(0))
    found = f"{usable} of {os.cpu_count()} cores usable, {', '.join(sets) or platform.machine()}"
    return "ok", "CPU", found, ""


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    except OSError:
        pass
    return set()


def _memory() -> Finding:
    available, total = available_memory(), psutil.virtual_memory().total
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < 2 * GIB:
        return "note", "memory", found, "the default model needs about 2 GiB; end other programs"
    return "ok", "memory", found, ""


def _disk() -> Finding:
    folder = cache_folder()
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free for models in {folder}"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return "missing", "disk", f"{folder} cannot be written", "set HEADWATER_CACHE"
    if free < MIN_FREE_DISK:
        return "note", "disk", found, "make room, or set HEADWATER_CACHE to another disk"
    return "ok", "disk", found, ""


def _kernels() -> Finding:
    """Asked of a process of its own, which compiles them where that was not done yet."""
    command = [sys.executable, "-P", "-m", "model.ops.kernels"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode == 0:
        instruction_set, compiler = said.stdout.splitlines()
        return "ok", "CPU kernels", f"{instruction_set}, made with {compiler}", ""
    reason = (said.stderr.strip().splitlines() or ["no reason given"])[-1]
    what_to_do = textwrap.shorten(reason, 80, placeholder=" ...")
    return "note", "CPU kernels", "none: torch is used, much slower", what_to_do


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "ok", "GPU", "none; the CPU is used", ""
    said = subprocess.run(
        [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "ok", "GPU", said.stdout.strip().replace("\n", "; ") or "driver does not answer", ""


def _model() -> Finding:
    try:
        files = resolve(DEFAULT_MODEL, allow_download=False)
    except HubError:
        return "note", "model", f"{DEFAULT_MODEL} is not here yet", "headwater pull"
    return "ok", "model", f"{files.name} in {files.folder}", ""
