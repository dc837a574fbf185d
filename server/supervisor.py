"""Supervisor: spawns the engine process, watches it, restarts it.

    starting -> ready -> (restarting -> ready)* -> failed

An engine is dead when its process exits or its channel closes, or when none can be started. It
hangs when no heartbeat comes, or no step ends while there is work, for `engine_timeout` seconds:
then its stacks are logged and it is killed. Restarts back off. Too many deaths in a short time end
the server with exit code 1; those that a generation is the cause of, or may be, do not count:
`Generations` finds it and ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque

import structlog

from model.engine.messages import Start
from model.hub import ModelFiles
from server.engine_client import EngineClient
from server.engine_process import EngineProcess
from server.errors import EngineCrash
from server.metrics import Metrics
from server.settings import Settings

log = structlog.get_logger()

MAX_DEATHS = 5
DEATHS_WITHIN_SECONDS = 60.0
WATCH_SECONDS = 0.5
STOP_SECONDS = 3.0


class Supervisor:
    """Keeps one engine process alive for `client`. The first may be spawned already."""

    def __init__(
        self,
        settings: Settings,
        files: ModelFiles,
        client: EngineClient,
        metrics: Metrics,
        engine: EngineProcess | None = None,
    ) -> None:
        self._settings = settings
        self._client = client
        self._files = files
        self._metrics = metrics
        self._spawned = engine
        self._engine: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.failed = asyncio.Event()  # no engine will come back

    def start(self) -> None:
        """Have an engine, and keep watching, in the background."""
        self._task = asyncio.create_task(self._run(), name="supervisor")

    async def stop(self) -> None:
        """End the engine process: a word first, SIGKILL after a while."""
        self._stopping = True
        self._client.shutdown()
        if self._engine is not None:
            try:
                await asyncio.wait_for(self._engine.wait(), STOP_SECONDS)
            except TimeoutError:
                self._engine.signal(signal.SIGKILL)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._engine is not None:
            await self._engine.wait()

    # -------------------------------------------------------------------------------- details

    async def _run(self) -> None:
        deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        epoch = 0
        while True:
            epoch += 1
            try:
                was_ready = await self._one_engine(epoch)
            except OSError as error:  # no process or no socket: short of memory, or of files
                log.error("engine_not_started", reason=str(error))
                was_ready = False
            if self._stopping:
                return
            if self._client.made_tokens or self._client.on_trial:
                deaths.clear()  # it works; what it died of is told by the generations
            deaths.append(time.monotonic())
            self._metrics.restarts.inc()
            too_many = len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN_SECONDS
            if too_many or self._client.failure is not None or (epoch == 1 and not was_ready):
                reason = self._client.failure or "the engine process keeps dying"
                self._client.failure = reason
                log.error("engine_failed", reason=reason, deaths=len(deaths))
                self._client.lost("failed", EngineCrash(f"{reason}; the server stops"))
                self.failed.set()
                return
            self._client.lost("restarting")
            delay = 0.0 if len(deaths) == 1 else min(0.25 * 2 ** (len(deaths) - 2), 5.0)
            log.warning("engine_restarting", deaths=len(deaths), delay_s=delay)
            await asyncio.sleep(delay)

    async def _one_engine(self, epoch: int) -> bool:
        """Run one engine process to its end. True if it was ready once."""
        engine, self._spawned = self._spawned or await EngineProcess.spawn(), None
        self._engine = engine
        channel = self._client.attach(epoch)
        await asyncio.get_running_loop().create_connection(lambda: channel, sock=engine.socket)
        self._client.start(self._start_message(epoch))
        exited = asyncio.create_task(engine.wait())
        closed = asyncio.create_task(channel.closed.wait())
        try:
            while not exited.done() and not closed.done():
                asleep_since = time.monotonic()
                await asyncio.wait(
                    {exited, closed},
                    timeout=WATCH_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if time.monotonic() - asleep_since > 2 * WATCH_SECONDS:
                    continue  # it is this process that stood still: what came meanwhile is unread
                if not exited.done() and self._hangs():
                    self._client.state = "restarting"  # it may stir while it tells its stacks
                    await self._dump_stacks(engine)
                    engine.signal(signal.SIGKILL)
            if not exited.done():
                # The channel closed. A process on its way out gets a moment, then no more.
                await asyncio.wait({exited}, timeout=0.2)
                if not exited.done() and not self._stopping:
                    engine.signal(signal.SIGKILL)
            return_code = await exited
            if not self._stopping:
                log.warning("engine_died", pid=engine.pid, return_code=return_code)
            return self._client.ready.is_set()
        finally:
            exited.cancel()
            closed.cancel()

    def _hangs(self) -> bool:
        now, timeout = time.monotonic(), self._settings.engine_timeout
        silent = now - self._client.last_heartbeat > timeout
        if self._client.state != "ready":  # loading is no progress, and it may take its time
            return silent and self._client.has_beaten
        return silent or now - self._client.last_progress > timeout

    async def _dump_stacks(self, engine: EngineProcess) -> None:
        """Ask faulthandler in the engine for all its stacks (they go to our stderr)."""
        log.error("engine_hangs", pid=engine.pid)
        engine.signal(signal.SIGCONT)
        engine.signal(signal.SIGUSR1)
        await asyncio.sleep(0.2)

    def _start_message(self, epoch: int) -> Start:
        settings, files = self._settings, self._files
        return Start(
            epoch=epoch,
            name=files.name,
            config=files.config,
            weights=tuple(str(path) for path in files.weights),
            fingerprint=files.fingerprint,
            tokenizer=str(files.folder / "tokenizer.json"),
            device=settings.device,
            dtype=settings.dtype,
            ops=settings.ops,
            quantize=settings.quantize,
            threads=settings.threads,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
            block_size=settings.block_size,
            kv_memory=settings.kv_memory,
            disk_folder=str((settings.data_folder / "kv").absolute()),
            disk_bytes=settings.disk_cache,
            check_accounting=settings.check_accounting,
        )
