"""Headwater and its peers as servers, on the same GGUF file, the same prompts and the same load.

    python -m benchmarks.compare --llama-server PATH --openvino VENV/bin/python

All servers are up from the beginning to the end, and are measured in turn: each round of each
workload visits every server, in an order that rotates. So a slow minute of the machine hits all of
them; only ratios within one run mean anything. A server that waits must not compute: before each
measurement all of them have to be idle, and what the others computed during it is noted. No prompt
comes twice. A peer that is not given or does not start is absent, with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.bandwidth import read_bandwidth
from benchmarks.comparison import (
    OURS,
    Comparison,
    kv_bytes_per_token,
    memory_bound,
    weight_bytes_per_token,
)
from benchmarks.dequantise import write_folder
from benchmarks.peers import HEADWATER, PEERS, Work, find_program
from benchmarks.running import Absent, Server, started
from benchmarks.workloads import SHORT, Client, Growth, Workload, WorkloadError, workloads
from model.engine.threads import usable_cores
from model.gguf.file import GGUFFile
from model.hub import DEFAULT_MODEL, HubError, ModelFiles, resolve
from model.ops.kernels import NoKernels
from server.bench.origin import origin
from server.bench.prompts import Prompts

_IDLE_CORES = 0.05  # what waiting servers may use together before a reader is told
_PIPE_WIDTH = 140
_GROWTH_FACTOR = 1.4  # what may be lost on the way from the bandwidth to the keys that are read


class Run:
    """One run: the servers that are up, and what was measured of them."""

    def __init__(
        self,
        servers: list[Server],
        plan: list[Workload],
        tokenizer: Tokenizer,
        seed: int,
        threads: int,
    ) -> None:
        self.servers = servers
        self.plan = plan
        self.bandwidths: list[float] = []  # bytes/s, one after each round
        self._threads = threads
        self._tokenizer = tokenizer
        metrics = {name: metric for work in plan for name, metric in work.metrics.items()}
        self.comparison = Comparison(metrics)
        self._progress = Console(stderr=True)
        self._seed = seed

    def count(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def warm_up(self) -> None:
        """Each server answers a long prompt and several short ones, since some compile for each
        shape they meet. One that cannot is taken out."""
        for server in list(self.servers):
            try:
                asyncio.run(self._warm_up(server))
            except WorkloadError as error:
                self.comparison.absent[server.peer.name] = f"it started, but {error}"
                self.servers.remove(server)

    async def _warm_up(self, server: Server) -> None:
        client = Client(server, self.count)
        streams = 4 if server.peer.concurrent else 1
        prompts = Prompts(self._seed, [SHORT])
        await client.complete(Prompts(self._seed, [1000]).message(streams, 0), 8)
        work = [client.complete(prompts.message(i, 0), 16) for i in range(streams)]
        await asyncio.gather(*work)

    def measure(self) -> None:
        """All rounds of all workloads, and the machine's bandwidth between them."""
        for work in self.plan:
            for number in range(work.rounds):
                self._seed += 1  # other prompts in each round, the same ones for all servers
                turn = number % len(self.servers)
                for server in self.servers[turn:] + self.servers[:turn]:
                    if work.streams > 1 and not server.peer.concurrent:
                        continue
                    self._measure(server, work, number)
                try:
                    self.bandwidths.append(read_bandwidth(self._threads))
                except NoKernels as error:
                    self._note(f"the bandwidth was not measured: {error}")

    def _measure(self, server: Server, work: Workload, number: int) -> None:
        what = f"{type(work).__name__.lower()} {work.streams}, round {number + 1}"
        for one in self.servers:
            if not one.wait_idle():
                self._note(f"{one.peer.name} did not come to rest before {what}")
        others = [one for one in self.servers if one is not server]
        before = sum(one.cpu_seconds() for one in others)
        try:
            values, seconds = asyncio.run(self._timed(server, work))
        except WorkloadError as error:
            self._note(f"{server.peer.name}, {what}: {error}")
            return
        cores = (sum(one.cpu_seconds() for one in others) - before) / seconds
        if cores > _IDLE_CORES:
            self._note(f"{server.peer.name}, {what}: waiting servers used {cores:.2f} cores")
        self.comparison.add(server.peer.name, values)
        said = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        self._progress.print(f"{what}: {server.peer.name}: {said}", markup=False)

    async def _timed(self, server: Server, work: Workload) -> tuple[dict[str, float], float]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        values = await work.run(Client(server, self.count), self._seed)
        return values, loop.time() - begun

    def _note(self, text: str) -> None:
        self.comparison.notes.append(text)
        self._progress.print(text, markup=False)


def _derived(run: Run, files: ModelFiles) -> dict[str, Any]:
    """What follows from the measurements: shares of the memory bound, and growth against it."""
    found: dict[str, Any] = {
        "memory_mib": {one.peer.name: round(one.memory_mib()) for one in run.servers}
    }
    per_token = weight_bytes_per_token(GGUFFile.open(files.weights[0]))
    found["weight_bytes_per_token"] = per_token
    if not run.bandwidths:
        return found
    bandwidth = statistics.median(run.bandwidths)
    found["read_bandwidth"] = {
        "bytes_per_s": round(bandwidth),
        "runs": [round(one) for one in run.bandwidths],
    }
    rates = {one.peer.name: run.comparison.median("decode_1", one.peer.name) for one in run.servers}
    found["decode_1_share_of_memory_bound"] = {
        name: round(memory_bound(rate, per_token, bandwidth), 3)
        for name, rate in rates.items()
        if rate is not None
    }
    short = run.comparison.median("inter_token_short", OURS)
    long = run.comparison.median("inter_token_long", OURS)
    if short is not None and long is not None:
        late = next(work.prompt_tokens for work in run.plan if isinstance(work, Growth))
        read = kv_bytes_per_token(files.config) * (late - SHORT)
        allowed = short + 1000 * _GROWTH_FACTOR * read / bandwidth
        found["growth_ms"] = {
            "context": late,
            "short": round(short, 3),
            "long": round(long, 3),
            "bound": round(allowed, 3),
        }
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="an alias or a GGUF file")
    for peer in PEERS:
        what = "the vllm command" if peer.name == "vllm" else "the python of a venv with it"
        if peer.name == "llama-server":
            what = "the llama-server program"
        parser.add_argument(peer.option, metavar="PATH", help=what)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every server")
    parser.add_argument("--seed", type=int, default=0, help="other prompts for another seed")
    parser.add_argument("--quick", action="store_true", help="a smoke run: its numbers say little")
    return parser


def main() -> int:
    """0 when Headwater was measured; peers may be absent."""
    options = _parser().parse_args()
    try:
        files = resolve(options.model, console=Console(stderr=True))
    except HubError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    if files.format != "gguf":
        print("compare: the peers want one GGUF file; name one", file=sys.stderr)
        return 1
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    absent: dict[str, str] = {}
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unpacked = cache(lambda: write_folder(files, folder))
        work = Work(files.weights[0], unpacked, options.threads)
        for peer in (HEADWATER, *PEERS):
            given = getattr(options, peer.option.strip("-").replace("-", "_"), None)
            try:
                program = find_program(peer, given)
                servers.append(stack.enter_context(started(peer, program, work)))
            except (LookupError, Absent) as error:
                absent[peer.name] = str(error)
        plan = workloads(quick=options.quick)
        run = Run(servers, plan, tokenizer, options.seed, options.threads)
        run.comparison.absent.update(absent)
        run.warm_up()
        if not any(one.peer is HEADWATER for one in run.servers):
            print(f"compare: {OURS}: {run.comparison.absent[OURS]}", file=sys.stderr)
            return 1
        run.measure()
        derived = _derived(run, files)
    _report(run, files, options, derived)
    return 0


def _report(
    run: Run, files: ModelFiles, options: argparse.Namespace, derived: dict[str, Any]
) -> None:
    names = [one.peer.name for one in run.servers]
    title = f"{files.name}: servers on the same file, {options.threads} threads each"
    # What is piped has no width of its own: a line a metric, then.
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    title += ", a smoke run" if options.quick else ""
    run.comparison.print_table(names, title, console)
    for name, share in derived.get("decode_1_share_of_memory_bound", {}).items():
        rate = derived["read_bandwidth"]["bytes_per_s"] / 1e9
        console.print(f"{name}: decode at {share:.2f} of the memory bound ({rate:.1f} GB/s)")
    if "growth_ms" in derived:
        grown = derived["growth_ms"]
        console.print(
            f"headwater: {grown['short']:.2f} ms a token at {SHORT} tokens of context, "
            f"{grown['long']:.2f} ms at {grown['context']}, bound {grown['bound']:.2f} ms"
        )
    for one in run.servers:
        if one.peer.note:
            console.print(f"{one.peer.name}: {one.peer.note}", markup=False)
    document = {
        "benchmark": "compare",
        "model": files.name,
        "fingerprint": files.fingerprint,
        "threads": options.threads,
        "quick": options.quick,
        "seed": options.seed,
        "commands": {one.peer.name: one.command for one in run.servers},
        **run.comparison.as_document(),
        **derived,
    }
    print(json.dumps(document | origin()))


if __name__ == "__main__":
    sys.exit(main())
