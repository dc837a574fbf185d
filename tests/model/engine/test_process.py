"""The engine process over its real channel: reports, forgetting, and faults on purpose."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from model.engine.messages import (
    Abort,
    CacheQuery,
    CacheReport,
    EngineFailed,
    EngineReady,
    Forget,
    Forgotten,
    FromEngine,
    Heartbeat,
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
from model.engine.process import Channel, Loop
from model.engine.request import SamplingParams
from tests.fixtures.tiny import make_tiny
from tests.model.decoding import read_config
from tests.model.engine.simulation import make_engine, submit

M = TypeVar("M", bound=FromEngine)
FATAL = 77


class EngineProcess:
    """A process, and this end of its channel."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self._sock = sock
        self._frames = sock.makefile("rb")
        self.passed: list[FromEngine] = []  # what `until` read on its way

    def send(self, message: ToEngine) -> None:
        self._sock.sendall(encode_frame(message))

    def receive(self) -> FromEngine:
        """The next message. Raises EOFError when the process is gone."""
        header = self._frames.read(4)
        if len(header) < 4:
            raise EOFError
        return from_engine_decoder.decode(self._frames.read(frame_length(header)))

    def until(self, kind: type[M]) -> M:
        self.passed = []
        while not isinstance(message := self.receive(), kind):
            self.passed.append(message)
        return message

    def outputs(self, request_id: str) -> Iterator[TokenOutput]:
        """A request's outputs up to its last one."""
        while True:
            for output in self.until(StepOutputs).outputs:
                if output.request_id == request_id:
                    yield output
                    if output.finish_reason is not None:
                        return


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def started(model: Path, data: Path, fault: str = "") -> Iterator[EngineProcess]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    command = [sys.executable, "-m", "model.engine", "--fd", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "HEADWATER_FAULT": fault},
        ) as process,
    ):
        theirs.close()
        engine = EngineProcess(process, ours)
        try:
            engine.send(
                Start(
                    epoch=1,
                    name="tiny",
                    config=read_config(model),
                    weights=tuple(str(path) for path in model.glob("*.safetensors")),
                    fingerprint="tiny",
                    device="cpu",
                    ops="reference",
                    threads=1,
                    max_num_batched_tokens=32,
                    kv_memory=1 << 20,
                    disk_folder=str(data),
                    disk_bytes=1 << 24,
                    check_accounting=True,
                )
            )
            yield engine
        finally:
            process.kill()


PROMPT = list(range(100, 180))
LONG = SamplingParams(max_tokens=170, ignore_eos=True, logit_bias={FATAL: -100.0})


def test_reports_forgetting_and_aborts(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path) as engine:
        engine.until(EngineReady)
        engine.send(Submit("r", PROMPT, LONG, report_blocks=True))
        outputs = engine.outputs("r")
        while not next(outputs).token_ids:
            pass
        # It runs: a query is answered in the midst of it.
        engine.send(CacheQuery(1, PROMPT))
        report = engine.until(CacheReport)
        assert report.query_id == 1
        assert [(block.device, block.disk) for block in report.blocks] == [(True, False)] * 5
        engine.send(Abort(["r"]))
        last = list(outputs)[-1]
        assert last.finish_reason == "abort"
        assert last.block_keys[:5] == [block.key for block in report.blocks]

        engine.send(Submit("again", PROMPT, LONG))
        assert next(engine.outputs("again")).num_reused_tokens == 64
        engine.send(Abort(["again"]))
        stats = engine.until(StepOutputs).stats
        while stats.num_running or stats.disk.num_files < len(last.block_keys):
            stats = engine.until(StepOutputs).stats
        engine.send(CacheQuery(2, PROMPT))
        assert all(b.device and b.disk for b in engine.until(CacheReport).blocks)
        assert len(list(tmp_path.glob("??/*.kv"))) >= len(last.block_keys)
        engine.send(Forget(last.block_keys))
        assert engine.until(Forgotten).keys == last.block_keys
        left = {path.stem for path in tmp_path.glob("??/*.kv")}
        assert not left & {key.hex() for key in last.block_keys}
        engine.send(CacheQuery(3, PROMPT))
        assert not any(b.device or b.disk for b in engine.until(CacheReport).blocks)
        engine.send(Abort(["unknown"]))
        engine.send(Shutdown())
        with pytest.raises(EOFError):
            engine.until(EngineFailed)
        assert engine.process.wait(30) == 0


@pytest.mark.parametrize("where", ["prompt", "drawn"])
def test_it_dies_where_it_is_told_to(model: Path, tmp_path: Path, where: str) -> None:
    with started(model, tmp_path, f"die:{FATAL}") as engine:
        engine.until(EngineReady)
        short = SamplingParams(max_tokens=4, ignore_eos=True, logit_bias={FATAL: -100.0})
        engine.send(Submit("fine", PROMPT, short))
        assert list(engine.outputs("fine"))[-1].finish_reason == "length"
        drawn = SamplingParams(max_tokens=4, ignore_eos=True, logit_bias={FATAL: 100.0})
        fatal = Submit("fatal", [*PROMPT, FATAL], short)
        engine.send(fatal if where == "prompt" else Submit("fatal", PROMPT, drawn))
        with pytest.raises(EOFError):
            engine.until(EngineFailed)
        # A drawn token is told first; it is fatal when it comes in again.
        told = [o for m in engine.passed if isinstance(m, StepOutputs) for o in m.outputs]
        assert [o.token_ids for o in told if o.token_ids] == [[FATAL]] * (where == "drawn")
        assert engine.process.wait(30) == -signal.SIGKILL


def test_it_hangs_where_it_is_told_to(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path, f"hang:{FATAL}") as engine:
        engine.until(EngineReady)
        engine.send(Submit("fatal", [FATAL], LONG))
        while not (beat := engine.until(Heartbeat)).pending:
            pass
        again = engine.until(Heartbeat)  # it beats, and gets nowhere
        assert again.pending and again.steps == beat.steps
        assert engine.passed == []
        assert engine.process.poll() is None


def test_a_fault_that_is_none_is_told(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path, "explode:1") as engine:
        assert "HEADWATER_FAULT" in engine.until(EngineFailed).message
        assert engine.process.wait(30) == 1


def test_the_accounts_are_checked_once_all_is_said() -> None:
    engine, _ = make_engine()
    engine._check_accounting = False  # as in production
    engine.scheduler.pool._references[-1] = 1  # though it is free
    submit(engine, "r", [1, 2], max_tokens=1)
    assert [o.finish_reason for o in engine.step().outputs] == ["length"]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = Loop(Channel(theirs))
        loop._engine = engine
        loop._inbox.put(None)
        with pytest.raises(AssertionError, match="!= total"):
            loop._wait()


def test_an_engine_whose_server_has_gone_leaves_without_a_word() -> None:
    """Whichever of its threads notices first."""
    code = (
        "import socket; from model.engine.messages import Heartbeat\n"
        "from model.engine.process import Channel\n"
        "ours, theirs = socket.socketpair(); theirs.close()\n"
        "Channel(ours).send(Heartbeat(1, 0, False)); raise SystemExit('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
