"""What `/metrics` tells, in Prometheus' words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine_client import EngineClient

if TYPE_CHECKING:
    from server.generation import Timings

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class _EngineCollector(Collector):
    """Gauges and counters that the engine reports with each step; read when scraped."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        stats = self._client.stats
        for name, text, value in (
            ("requests_running", "Requests in the running batch.", stats.num_running),
            ("requests_waiting", "Requests waiting for a place.", self._waiting()),
            ("engine_up", "1 while the engine takes requests.", self._up()),
            ("asyncio_tasks", "Tasks of the API process's event loop.", len(asyncio.all_tasks())),
            ("disk_files", "Blocks in the disk tier.", stats.disk.num_files),
            ("disk_bytes", "Size of the disk tier.", stats.disk.num_bytes),
        ):
            yield GaugeMetricFamily(f"headwater_{name}", text, value)
        blocks = GaugeMetricFamily(
            "headwater_blocks", "KV blocks by tier and state.", labels=["tier", "state"]
        )
        used = stats.blocks_total - stats.blocks_free - stats.blocks_cached
        for state, value in (
            ("free", stats.blocks_free),
            ("cached", stats.blocks_cached),
            ("referenced", used),
        ):
            blocks.add_metric(["device", state], value)
        yield blocks
        hits = CounterMetricFamily(
            "headwater_prefix_hit_tokens", "Prompt tokens found in a cache.", labels=["tier"]
        )
        hits.add_metric(["device"], stats.reused_tokens - stats.disk_tokens)
        hits.add_metric(["disk"], stats.disk_tokens)
        yield hits
        for name, text, value in (
            ("prefill_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("decode_tokens", "Tokens generated.", stats.generated_tokens),
            ("evicted_blocks", "Cached blocks given up for others.", stats.evicted_blocks),
            ("preemptions", "Requests sent back to the queue.", stats.preemptions),
            ("engine_aborts", "Requests aborted in the engine.", stats.aborted),
            ("engine_steps", "Steps of the engine.", stats.steps),
            ("disk_hits", "Blocks read from the disk tier.", stats.disk.hits),
            ("disk_misses", "Blocks that the disk tier did not have.", stats.disk.misses),
            ("disk_corrupt", "Files that were not what they should be.", stats.disk.corrupt),
            ("disk_errors", "Reads and writes of the disk tier that failed.", stats.disk.errors),
            ("disk_written", "Blocks written to the disk tier.", stats.disk.written),
            ("disk_evicted", "Blocks removed from the disk tier.", stats.disk.evicted),
            ("disk_dropped", "Blocks that were not written.", stats.disk.dropped),
        ):
            yield CounterMetricFamily(f"headwater_{name}", text, value)

    def _waiting(self) -> int:
        return max(self._client.num_requests - self._client.stats.num_running, 0)

    def _up(self) -> int:
        return int((self._client.unready_reason() or self._client.stuck_reason()) is None)


class Metrics:
    """The registry of one app: nothing here is global."""

    def __init__(self, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client))
        self.ttft = Histogram(
            "headwater_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "headwater_inter_token_seconds",
            "Mean time between the tokens of a generation.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.aborts = Counter(
            "headwater_aborts",
            "Generations that were cancelled, or whose client left.",
            registry=self.registry,
        )
        self.restarts = Counter(
            "headwater_engine_restarts", "Engine processes that died.", registry=self.registry
        )
        self.errors = Counter(
            "headwater_errors", "Error answers by code.", ["code"], registry=self.registry
        )
        self.requests = Counter(
            "headwater_http_requests",
            "HTTP answers by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.started = time.time()

    def ended(self, timings: Timings, num_tokens: int) -> None:
        """A generation ended."""
        if timings.first_token:
            self.ttft.observe(timings.first_token - timings.submitted)
            if num_tokens > 1:
                self.inter_token.observe(
                    (timings.last_token - timings.first_token) / (num_tokens - 1)
                )

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)
