"""The engine process: frames in, steps, frames out.

It has three threads of its own. The main one runs the steps. One reads frames into a queue, so that
an abort is seen in the step in which it comes. One sends a heartbeat each second, so that an engine
that hangs is told from one that works. It ignores SIGINT and SIGTERM, since the server decides when
to stop it, and it dies with the server: by the kernel's parent-death signal, and when the channel
closes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import queue
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

import msgspec

from model.engine.messages import (
    Abort,
    CacheQuery,
    EndInspection,
    EngineFailed,
    EngineReady,
    Forget,
    FromEngine,
    Heartbeat,
    Inspect,
    Shutdown,
    Start,
    Submit,
    ToEngine,
    encode_frame,
    frame_length,
    to_engine_decoder,
)

if TYPE_CHECKING:
    from model.engine.engine import Engine

HEARTBEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Channel:
    """The engine's end of the socketpair: whole frames, both ways."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        """Ends the process when the server is gone: nothing here is worth a clean-up then."""
        frame = encode_frame(message)
        try:
            with self._lock:
                self._sock.sendall(frame)
        except OSError:
            os._exit(0)

    def receive(self) -> ToEngine | None:
        """The next message; None when the other end is closed."""
        header = self._exactly(4)
        if header is None:
            return None
        body = self._exactly(frame_length(header))
        return None if body is None else to_engine_decoder.decode(body)

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            chunk = self._sock.recv(min(size - len(data), 1 << 20))
            if not chunk:
                return None
            data += chunk
        return bytes(data)


class Loop:
    """The inbox, and the engine that works it off."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # None only wakes the loop.
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._epoch = 0
        self._steps = 0
        self._stopping = False

    def run(self) -> None:
        """Load the model named by the first frame, then step until told to stop."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        # torch is imported here and not above: while it is, the server prepares its first message,
        # and the reader sees it if the server goes
        from model.engine.loader import LoadError, load_engine

        start = self._inbox.get()
        if not isinstance(start, Start):
            raise SystemExit("the engine process expects a start message first")
        self._epoch = start.epoch
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            self._engine, info = load_engine(start)
        except LoadError as error:
            self._channel.send(EngineFailed(str(error)))
            raise SystemExit(1) from None
        if self._engine.grammars is not None:
            self._engine.grammars.on_compiled = lambda: self._inbox.put(None)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection of garbage looks at it
        self._channel.send(EngineReady(start.epoch, info))
        while True:
            if not self._busy:
                self._take(self._wait())
            self._drain()
            if self._stopping:
                self._engine.close()
                return
            if self._engine.has_work:
                outputs = self._engine.step(self._drain)
                self._steps += 1
                if outputs.outputs or not self._engine.has_work:
                    self._channel.send(outputs)
            elif not self._engine.inspects:
                self._channel.send(self._engine.idle_report())
            if self._engine.inspects:
                found = self._engine.inspect()
                self._steps += 1
                if found is not None:
                    self._channel.send(found)

    @property
    def _busy(self) -> bool:
        return self._engine is not None and (self._engine.has_work or self._engine.inspects)

    def _wait(self) -> ToEngine | None:
        """The next message; until it comes, the accounts are checked (some 40 ms with 100,000
        blocks, for which no token waits here) and blocks are brought to the disk."""
        assert self._engine is not None
        self._engine.scheduler.check()
        while (pause := self._engine.write_behind()) is not None:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=pause)
        if self._engine.has_news:
            self._channel.send(self._engine.idle_report())
        return self._inbox.get()

    def _drain(self) -> None:
        while True:
            try:
                self._take(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, message: ToEngine | None) -> None:
        assert self._engine is not None
        match message:
            case None:
                self._engine.submit_compiled()
            case Submit():
                self._engine.submit(message)
            case Abort():
                self._engine.abort(message.request_ids)
            case CacheQuery():
                self._channel.send(self._engine.cache_report(message))
            case Forget():
                self._channel.send(self._engine.forget(message.keys))
            case Inspect() if self._engine.inspections is not None:
                self._engine.inspections.add(message)
            case EndInspection() if self._engine.inspections is not None:
                self._engine.inspections.end(message.inspect_id)
            case Shutdown():
                self._stopping = True
            case Start():
                raise SystemExit("the engine process was started twice")

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except ConnectionResetError:
            pass  # it left without reading all that was sent
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            sys.stderr.write(f"engine: the channel broke: {error}\n")
        os._exit(0)  # the server is gone: nothing here is worth a clean-up

    def _beat(self) -> None:
        pause = threading.Event()
        while True:
            self._channel.send(Heartbeat(self._epoch, self._steps, self._busy))
            pause.wait(HEARTBEAT_SECONDS)


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when the thread that spawned it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(0)


def main() -> None:
    """Entry point of `python -m model.engine`."""
    parser = argparse.ArgumentParser(prog="model.engine")
    parser.add_argument("--fd", type=int, required=True, help="this end of the socketpair")
    parser.add_argument("--parent", type=int, required=True, help="the server's process id")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    die_with_parent(options.parent)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    Loop(Channel(socket.socket(fileno=options.fd))).run()
