"""Values of each server and round -> medians, ratios, a table and one JSON document."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workloads import Metric
from model.config import DecoderConfig
from model.gguf.file import GGUFFile

OURS = "headwater"
KV_BYTES = 2  # of one value of K or V, as both Headwater and llama.cpp keep them


def weight_bytes_per_token(file: GGUFFile) -> int:
    """What one decode step reads of the file: every tensor, but of an embedding that is not also
    the head only a row, which does not count."""
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    if "output.weight" in file.tensors:
        total -= file.tensors["token_embd.weight"].nbytes
    return total


def kv_bytes_per_token(config: DecoderConfig) -> int:
    """K and V of one position in all layers, in 16 bits each."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_BYTES


def memory_bound(tokens_per_s: float, bytes_per_token: int, bytes_per_s: float) -> float:
    """Which share of the bandwidth a decode rate is: 1 would be reading the weights and nothing
    else."""
    return tokens_per_s * bytes_per_token / bytes_per_s


def advantage(ours: float, theirs: float, *, higher_is_better: bool) -> float:
    """How many times better ours is; below 1 it is worse."""
    return ours / theirs if higher_is_better else theirs / ours


class Comparison:
    """What was measured. `absent` has the reason for each peer that was not; `notes` what went
    wrong on the way."""

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self.metrics = metrics
        self.absent: dict[str, str] = {}
        self.notes: list[str] = []
        self._values: dict[str, dict[str, list[float]]] = {
            name: defaultdict(list) for name in metrics
        }

    def add(self, server: str, values: dict[str, float]) -> None:
        """One round of one workload."""
        for name, value in values.items():
            self._values[name][server].append(value)

    def median(self, name: str, server: str) -> float | None:
        """Of the rounds; None when there is no value."""
        runs = self._values[name].get(server)
        return statistics.median(runs) if runs else None

    def ratio(self, name: str, peer: str) -> float | None:
        """How many times better Headwater is than the peer."""
        ours, theirs = self.median(name, OURS), self.median(name, peer)
        if not ours or not theirs:
            return None
        return advantage(ours, theirs, higher_is_better=self.metrics[name].higher_is_better)

    def as_document(self) -> dict[str, Any]:
        """`results`, `absent` and `notes`, for JSON."""
        results = {}
        for name, metric in self.metrics.items():
            servers = {
                server: {
                    "median": round(statistics.median(runs), 3),
                    "runs": [round(run, 3) for run in runs],
                }
                for server, runs in self._values[name].items()
            }
            ratios = {server: self.ratio(name, server) for server in servers if server != OURS}
            results[name] = {
                "title": metric.title,
                "unit": metric.unit,
                "higher_is_better": metric.higher_is_better,
                "servers": servers,
                "headwater_is_better_by": {
                    server: round(ratio, 3) for server, ratio in ratios.items() if ratio is not None
                },
            }
        return {"results": results, "absent": self.absent, "notes": self.notes}

    def print_table(self, servers: list[str], title: str, console: Console | None = None) -> None:
        """A row a metric, a column a server; peers with how many times better Headwater is."""
        console = console or Console()
        table = Table(
            title=title,
            caption="medians of the rounds; in brackets: how many times better Headwater is",
        )
        table.add_column("")
        for server in servers:
            table.add_column(server, justify="right")
        for name, metric in self.metrics.items():
            cells = [self._cell(name, server) for server in servers]
            table.add_row(f"{metric.title}, {metric.unit}", *cells)
        console.print(table)
        for peer, reason in self.absent.items():
            console.print(f"{peer} is absent: {reason}", markup=False)
        for note in self.notes:
            console.print(note, markup=False)

    def _cell(self, name: str, server: str) -> str:
        value = self.median(name, server)
        if value is None:
            return "-"
        text = (
            f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
        )
        ratio = None if server == OURS else self.ratio(name, server)
        return text if ratio is None else f"{text} ({ratio:.2f}x)"
