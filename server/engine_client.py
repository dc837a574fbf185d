"""EngineClient: the API process's end of the channel to the engine.

Submits go out, outputs come in and are routed to the sink of their request. One frame holds what a
whole step made, so this costs one wake-up a step however many streams there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

import structlog

from model.engine.messages import (
    Abort,
    BlockState,
    CacheQuery,
    CacheReport,
    EndInspection,
    EngineFailed,
    EngineReady,
    EngineStats,
    Forget,
    Forgotten,
    FromEngine,
    Heartbeat,
    Inspect,
    Inspected,
    Inspection,
    ModelInfo,
    RequestError,
    Shutdown,
    Start,
    StepOutputs,
    Submit,
    ToEngine,
    TokenOutput,
    encode_frame,
    frame_length,
    from_engine_decoder,
)
from server.errors import EngineRestarting, EngineStarting, HeadwaterError, ServerDraining

log = structlog.get_logger()

State = Literal["starting", "ready", "restarting", "failed", "stopped"]
Sink = Callable[[TokenOutput], None]
Found = Inspected | HeadwaterError

UNREADY_AFTER_SECONDS = 3.0  # without a heartbeat
STUCK_AFTER_SECONDS = 4.0  # without a step, though there is work
QUERY_SECONDS = 10.0


class EngineChannel(asyncio.Protocol):
    """Frames over the socketpair, for one engine process."""

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        start = 0
        while len(self._data) - start >= 4:
            length = frame_length(bytes(self._data[start : start + 4]))
            end = start + 4 + length
            if len(self._data) < end:
                break
            body = bytes(self._data[start + 4 : end])
            start = end
            self._on_message(from_engine_decoder.decode(body))
        del self._data[:start]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.closed.set()

    def send(self, message: ToEngine) -> None:
        """Queue a frame; nothing happens when the engine is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class EngineClient:
    """State of the engine as the API sees it, and the requests that are in it.

    The supervisor calls `attach` for every engine process it spawns, and `lost` when one is gone;
    everybody else calls `submit`, `abort` and `check_ready`.
    """

    def __init__(self) -> None:
        self.state: State = "starting"
        self.draining = False
        self.model: ModelInfo | None = None
        self.failure: str | None = None
        self.stats = EngineStats()
        self.ready = asyncio.Event()
        self.epoch = 0
        self.last_heartbeat = 0.0
        self.last_progress = 0.0
        self.made_tokens = False  # this engine
        self.on_trial = False  # it computes one generation, which others may have died of
        self.on_lost: Callable[[HeadwaterError | None], None] = lambda _: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_forgotten: Callable[[list[bytes]], None] = lambda _: None
        self._steps = -1
        self._channel: EngineChannel | None = None
        self._sinks: dict[str, Sink] = {}
        self._queries: dict[int, asyncio.Future[list[BlockState]]] = {}
        self._num_queries = 0
        self._inspections: dict[int, Callable[[Found], None]] = {}

    # ----------------------------------------------------------------------- for the supervisor

    def attach(self, epoch: int) -> EngineChannel:
        """A channel for the engine process of this epoch; messages of older ones are dropped."""
        self.epoch = epoch
        self.made_tokens = self.on_trial = False
        self._steps = -1
        self.last_heartbeat = self.last_progress = time.monotonic()

        def on_message(message: FromEngine) -> None:
            if self.epoch == epoch:
                self._receive(message)

        self._channel = EngineChannel(on_message)
        return self._channel

    def start(self, message: Start) -> None:
        assert self._channel is not None
        self._channel.send(message)

    def shutdown(self) -> None:
        """Ask the engine to leave; it also does when the channel closes."""
        self.state = "stopped"
        self.ready.clear()
        self.end_inspections(ServerDraining("the server is shutting down", retry_after=5))
        if self._channel is not None:
            self._channel.send(Shutdown())
            self._channel.close()

    def lost(self, state: State, error: HeadwaterError | None = None) -> None:
        """The engine process is gone. `error`: for good, so every request ends with it."""
        self.state = state
        self.ready.clear()
        self.epoch = -1
        self.stats = EngineStats()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._sinks.clear()
        queries, self._queries = self._queries, {}
        for query in queries.values():
            if not query.done():
                query.set_exception(EngineRestarting("the engine died; try again", retry_after=2))
        self.end_inspections(
            EngineRestarting("the engine died while it computed this; try again", retry_after=2)
        )
        self.on_lost(error)

    # --------------------------------------------------------------------------- for the others

    @property
    def num_requests(self) -> int:
        """Requests submitted and not finished."""
        return len(self._sinks)

    @property
    def has_beaten(self) -> bool:
        """Whether this engine has sent a heartbeat: it does before it loads the model."""
        return self._steps >= 0

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine that can be sent requests, if perhaps a slow one."""
        return self.state == "ready" and self._channel is not None

    def unready_reason(self) -> str | None:
        """Why the engine takes no requests now; None when it does."""
        if self.draining:
            return "the server is shutting down"
        if self.state == "starting":
            return "the engine is starting"
        if self.state == "restarting":
            return "the engine died and is being restarted"
        if self.state != "ready":
            return self.failure or "the engine is stopped"
        if time.monotonic() - self.last_heartbeat > UNREADY_AFTER_SECONDS:
            return "the engine does not answer"
        return None

    def stuck_reason(self) -> str | None:
        """Why whoever can choose should ask another server. Requests are taken all the same: a
        step that takes long ends, and one that hangs is done again by the next engine."""
        if time.monotonic() - self.last_progress > STUCK_AFTER_SECONDS:
            return "the engine is long in one step, or hangs"
        return None

    def check_ready(self) -> ModelInfo:
        """The served model. Raises an Overloaded error while no engine can take requests."""
        reason = self.unready_reason()
        if reason is None and self.model is not None:
            return self.model
        text = f"{reason}; try again in a moment"
        if self.draining or self.state == "stopped":
            raise ServerDraining(text, retry_after=5)
        if self.state == "starting":
            raise EngineStarting(text, retry_after=2)
        raise EngineRestarting(text, retry_after=2)

    def submit(self, message: Submit, sink: Sink) -> None:
        """Send a request to the engine that is there; `sink` gets its outputs, in order."""
        assert self._channel is not None
        if not self._sinks:  # an idle engine makes no progress: the clock starts with the work
            self.last_progress = time.monotonic()
        self._sinks[message.request_id] = sink
        self._channel.send(message)

    def abort(self, request_ids: list[str], *, last_word: bool = False) -> None:
        """Have the blocks of these requests back; ids that are done are ignored. Their sinks get
        nothing more, or with `last_word` the output that names their blocks."""
        known = [i for i in request_ids if i in self._sinks]
        if not last_word:
            for request_id in known:
                del self._sinks[request_id]
        if known and self._channel is not None:
            self._channel.send(Abort(known))

    async def cached_blocks(self, token_ids: list[int], salt: bytes) -> list[BlockState]:
        """Where the full blocks of this sequence are. Raises an Overloaded error."""
        self.check_ready()
        assert self._channel is not None
        self._num_queries += 1
        query_id = self._num_queries
        answer = asyncio.get_running_loop().create_future()
        self._queries[query_id] = answer
        self._channel.send(CacheQuery(query_id, token_ids, salt))
        try:
            return await asyncio.wait_for(answer, QUERY_SECONDS)
        except TimeoutError:
            raise EngineRestarting("the engine does not answer", retry_after=2) from None
        finally:
            self._queries.pop(query_id, None)

    def inspect(self, token_ids: list[int], what: Inspection, sink: Callable[[Found], None]) -> int:
        """Look into the model while it computes these tokens. `sink` gets what is found, in parts,
        or why nothing comes. Returns the id to end it by. Raises an Overloaded error."""
        self.check_ready()
        assert self._channel is not None
        if not self._sinks:
            self.last_progress = time.monotonic()
        self._num_queries += 1
        self._inspections[self._num_queries] = sink
        self._channel.send(Inspect(self._num_queries, token_ids, what))
        return self._num_queries

    def end_inspection(self, inspect_id: int) -> None:
        """The sink gets nothing more, and the engine stops looking. Ended ones are ignored."""
        if self._inspections.pop(inspect_id, None) is not None and self._channel is not None:
            self._channel.send(EndInspection(inspect_id))

    def end_inspections(self, error: HeadwaterError) -> None:
        """All of them end with `error`."""
        sinks, self._inspections = self._inspections, {}
        for sink in sinks.values():
            sink(error)

    def forget(self, keys: list[bytes]) -> None:
        """Have these blocks removed from every tier; `on_forgotten` tells which are."""
        if self._channel is not None and keys:
            self._channel.send(Forget(keys))

    # --------------------------------------------------------------------------------- messages

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self.last_progress = time.monotonic()
                self.stats = message.stats
                for output in message.outputs:
                    self.made_tokens = self.made_tokens or bool(output.token_ids)
                    sink = self._sinks.get(output.request_id)
                    if sink is None:
                        continue  # aborted on this side already
                    if output.finish_reason is not None:
                        del self._sinks[output.request_id]
                    self._deliver(sink, output)
            case Heartbeat():
                self.last_heartbeat = time.monotonic()
                if message.steps != self._steps or not message.pending:
                    self._steps = message.steps
                    self.last_progress = self.last_heartbeat
            case EngineReady():
                self.model = message.model
                self.stats = EngineStats(
                    blocks_total=message.model.num_blocks, blocks_free=message.model.num_blocks
                )
                self.last_heartbeat = time.monotonic()
                self.state = "ready"
                self.ready.set()
                self.on_ready()
            case CacheReport():
                query = self._queries.get(message.query_id)
                if query is not None and not query.done():
                    query.set_result(message.blocks)
            case Forgotten():
                self.on_forgotten(message.keys)
            case Inspected():
                last = message.done or message.error is not None
                find = self._inspections.pop if last else self._inspections.get
                found = find(message.inspect_id, None)
                if found is not None:
                    found(message)
            case EngineFailed():
                self.failure = message.message

    @staticmethod
    def _deliver(sink: Sink, output: TokenOutput) -> None:
        try:
            sink(output)
        except Exception:  # one request's trouble must not stop the routing of the others
            log.exception("delivery_failed", request=output.request_id)
            error = RequestError("server_error", "internal", "the server failed at this answer")
            sink(TokenOutput(output.request_id, finish_reason="error", error=error))
