"""Inspections: what looks into the model, a little at a time, between two steps.

An inspection is a generator (`model/inspect.py`), and one item of it is a unit: some tens of
milliseconds at most. While requests run, they come first: between two units there are at least
MIN_STEPS steps, so the median time between two tokens stays that of a step, and steps get SHARE
times as long as the unit took, so the mean grows by half at most.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from model.engine.messages import Inspect, Inspected, RequestError

MIN_STEPS = 3
SHARE = 2.0


class Inspector(Protocol):
    """Does the looking."""

    def run(self, message: Inspect) -> Iterator[Inspected | None]: ...


class Inspections:
    """One runs, others wait for it. `clock` gives seconds."""

    def __init__(
        self, inspector: Inspector, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._inspector = inspector
        self._clock = clock
        self._queue: deque[tuple[int, Iterator[Inspected | None]]] = deque()
        self._num_steps = MIN_STEPS  # since the last unit
        self._not_before = 0.0  # the next unit, while requests run

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def add(self, message: Inspect) -> None:
        self._queue.append((message.inspect_id, self._inspector.run(message)))

    def end(self, inspect_id: int) -> None:
        """Drop an inspection, with all that it holds. Unknown ids are ignored."""
        self._queue = deque(one for one in self._queue if one[0] != inspect_id)

    def advance(self, *, busy: bool) -> Inspected | None:
        """A unit of the first inspection, if it is its turn; what was found, if anything. To be
        called after each step; `busy`: requests wait for the next one."""
        self._num_steps += 1
        if not self._queue:
            return None
        begun = self._clock()
        if busy and (self._num_steps < MIN_STEPS or begun < self._not_before):
            return None
        inspect_id, unit = self._queue[0]
        try:
            found = next(unit)
        except StopIteration:
            found = Inspected(inspect_id, done=True)
        except Exception as error:  # its own trouble: the requests go on
            reason = str(error) or type(error).__name__
            text = f"this inspection failed: {reason[:500]}"
            found = Inspected(inspect_id, error=RequestError("server_error", "internal", text))
        if found is not None and (found.done or found.error is not None):
            self._queue.popleft()
        ended = self._clock()
        self._num_steps = 0
        self._not_before = ended + SHARE * (ended - begun)
        return found
