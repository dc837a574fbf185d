"""EngineProcess: one `python -m model.engine`, and our end of its channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

# libgomp's threads spin for milliseconds at a barrier by default: on a machine where another
# process has one of the cores, that makes every small parallel region wait for a time slice.
_SPIN_SHORTLY = {"GOMP_SPINCOUNT": "2000"}


class EngineProcess:
    """A spawned engine. It imports what it needs, then waits for its Start message."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._process = process
        self.socket = channel

    @classmethod
    async def spawn(cls) -> EngineProcess:
        """Start one. It ends when our end of its channel closes."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # Ctrl+C goes to the whole process group. The child must not die of it before it ignores it,
        # so it is born with these signals blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the current folder must not shadow our packages
                "-m",
                "model.engine",
                "--fd",
                str(theirs.fileno()),
                "--parent",
                str(os.getpid()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=_SPIN_SHORTLY | os.environ,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        return cls(process, ours)

    @classmethod
    @contextlib.asynccontextmanager
    async def spawned(cls) -> AsyncIterator[EngineProcess]:
        """One that does not outlive the block."""
        engine = await cls.spawn()
        try:
            yield engine
        finally:
            engine.signal(signal.SIGKILL)
            engine.socket.close()
            await engine.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Until it has ended. Returns its return code."""
        return await self._process.wait()

    def signal(self, number: int) -> None:
        """Nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
