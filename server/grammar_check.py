"""GrammarCheck: whether a client's grammar can be followed, found out before its stream begins.

Compiling one can take minutes, gigabytes or a deep stack, so it is tried in a process of its own
that can be killed (model/grammar.py). What it said is remembered for the grammars used last; that
it had to be killed is not: the machine may have been busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterable

import msgspec
from blake3 import blake3

from model.engine.request import Grammar
from server.errors import InvalidRequest

TRIAL_SECONDS = 5.0
MAX_TRIALS = 2  # at a time
MAX_REMEMBERED = 1024


class GrammarCheck:
    """Tries grammars. `special_tokens` are the names that one may have for the model's own."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special_tokens = sorted(special_tokens)
        self._problems: OrderedDict[bytes, str] = OrderedDict()  # empty: there is none
        self._room = asyncio.Semaphore(MAX_TRIALS)

    async def check(self, grammar: Grammar | None, *, param: str) -> None:
        """Raises InvalidRequest, naming `param`, for a grammar that cannot be followed."""
        if grammar is None:
            return
        key = blake3(msgspec.msgpack.encode(grammar)).digest()
        problem = self._problems.get(key)
        if problem is None:
            async with self._room:
                problem, said = await self._try(grammar)
            if said:
                self._problems[key] = problem
            if len(self._problems) > MAX_REMEMBERED:
                self._problems.popitem(last=False)
        else:
            self._problems.move_to_end(key)
        if problem:
            kind = "schema" if grammar.kind == "json_schema" else "grammar"
            raise InvalidRequest(f"`{param}`: this {kind} is refused: {problem}", param=param)

    async def _try(self, grammar: Grammar) -> tuple[str, bool]:
        """What is wrong with it (empty: nothing), and whether the trial itself said so."""
        trial = {"grammar": grammar, "special_tokens": self._special_tokens}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "model.grammar"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            output, _ = await asyncio.wait_for(
                process.communicate(msgspec.msgpack.encode(trial)), TRIAL_SECONDS
            )
        except TimeoutError:
            return f"compiling it takes more than {TRIAL_SECONDS:g} s; make it simpler", False
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process.returncode != 0:
            return "compiling it takes too much time, memory or depth; make it simpler", False
        return output.decode(), True
