"""FaultPoint: an engine process that dies or hangs on purpose, for tests of what comes after that.

`HEADWATER_FAULT` in the environment of the engine process, read once at its start:

    die:TOKEN_ID    SIGKILL, when a step is about to compute that token
    hang:TOKEN_ID   that step never returns; the heartbeat goes on

The prompt's tokens count as well as drawn ones. When the variable is not set, nothing stands
between the engine and its runner.
"""

from __future__ import annotations

import os
import re
import signal
import threading

from model.engine.engine import Runner, StepResult
from model.engine.scheduler import ScheduledBatch

VARIABLE = "HEADWATER_FAULT"


class FaultPoint:
    """A runner that fails before it would compute `token_id`."""

    def __init__(self, runner: Runner, kind: str, token_id: int) -> None:
        self._runner = runner
        self._kind = kind
        self._token_id = token_id

    def run(self, batch: ScheduledBatch) -> StepResult:
        for s in batch.sequences:
            if self._token_id in s.request.token_ids[s.start : s.start + s.num_tokens]:
                if self._kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()
        return self._runner.run(batch)


def with_fault(runner: Runner) -> Runner:
    """The runner itself, or one with the fault that the environment asks for. Raises ValueError
    when that is none."""
    text = os.environ.get(VARIABLE)
    if not text:
        return runner
    parts = re.fullmatch(r"(die|hang):(\d+)", text)
    if parts is None:
        raise ValueError(f"{VARIABLE} must be die:TOKEN_ID or hang:TOKEN_ID, not {text!r}")
    return FaultPoint(runner, parts[1], int(parts[2]))
