"""OpenVINO GenAI as a server, for `compare.py`: `/v1/completions` over its continuous batching.

GenAI is a library. This is the thinnest server around it: one process steps the pipeline, which
keeps Python's lock for the whole step; this one speaks HTTP. Lines of JSON go between them, one
a request and one a step. It runs in a venv of its own with openvino-genai, fastapi and uvicorn:

    VENV/bin/python benchmarks/serve_openvino.py MODEL.gguf --port 9000 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import select
import sys
from collections.abc import AsyncGenerator
from typing import Any

_CACHE_GIB = 2
_MAX_STREAMS = 32

# ------------------------------------------------------------------ the process of the pipeline


class Worker:
    """Requests from stdin, `{"id", "prompt", "max_tokens", "ignore_eos"}` or `{"cancel": id}`; the
    tokens of each step to `out`, `{id: {"text", "tokens", "done"}}`."""

    def __init__(self, model: str, threads: int, out: int) -> None:
        import openvino_genai  # type: ignore[import-not-found,unused-ignore]

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GIB
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = _MAX_STREAMS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._handles: dict[int, Any] = {}
        self._rest = b""
        self._out = out

    def run(self) -> None:
        """Until stdin ends."""
        self._send({"ready": True})
        while self._receive():
            if self._handles:
                self._pipeline.step()
                self._send(self._step_outputs())

    def _receive(self) -> bool:
        """Takes what has come; waits for it when there is nothing to do. False: stdin ended."""
        while not self._handles or select.select([0], [], [], 0)[0]:
            data = os.read(0, 1 << 20)
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        return True

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            handle = self._handles.pop(message["cancel"], None)
            if handle is not None:
                handle.cancel()
            return
        config = self._genai.GenerationConfig()
        config.max_new_tokens = message["max_tokens"]
        config.ignore_eos = message["ignore_eos"]
        config.do_sample = False
        number = message["id"]
        self._handles[number] = self._pipeline.add_request(number, message["prompt"], config)

    def _step_outputs(self) -> dict[int, dict[str, Any]]:
        outputs: dict[int, dict[str, Any]] = {}
        for number, handle in list(self._handles.items()):
            tokens: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
            done = handle.get_status() != self._genai.GenerationStatus.RUNNING
            if done:
                del self._handles[number]
            if tokens or done:
                text = self._tokenizer.decode(tokens) if tokens else ""
                outputs[number] = {"text": text, "tokens": len(tokens), "done": done}
        return outputs

    def _send(self, message: dict[Any, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._out, data) :]


# ------------------------------------------------------------------ the process that speaks HTTP


class Engine:
    """The worker, as the HTTP side sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._streams: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self.failed = False

    async def run(self) -> None:
        """Gives each step's tokens to their streams, until the worker ends."""
        while line := await self._stdout.readline():
            for number, output in json.loads(line).items():
                stream = self._streams.get(int(number))
                if stream is not None:
                    stream.put_nowait(output)
        self.failed = True
        for stream in self._streams.values():
            stream.put_nowait({"text": "", "tokens": 0, "done": True, "failed": True})

    async def generate(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What the steps give for this request. Leaving early cancels it."""
        number = next(self._numbers)
        stream = self._streams[number] = asyncio.Queue()
        done = self.failed
        request = {
            "id": number,
            "prompt": body["prompt"],
            "max_tokens": int(body["max_tokens"]),
            "ignore_eos": bool(body.get("ignore_eos")),
        }
        try:
            self._tell(request)
            while not done:
                output = await stream.get()
                done = output["done"]
                yield output
        finally:
            del self._streams[number]
            if not done:
                self._tell({"cancel": number})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):
            self._stdin.write(json.dumps(message).encode() + b"\n")


async def frames(engine: Engine, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    count = 0
    async with contextlib.aclosing(engine.generate(body)) as outputs:
        async for output in outputs:
            if output.get("failed"):
                yield _frame({"error": {"code": "engine_died"}})
                return
            count += output["tokens"]
            if output["tokens"]:
                text = output["text"] or " "  # an empty text would not be counted as a token
                yield _frame({"choices": [{"index": 0, "text": text}]})
    yield _frame({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    yield _frame({"choices": [], "usage": {"completion_tokens": count}})
    yield b"data: [DONE]\n\n"


def _frame(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


async def serve(model: str, port: int, threads: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, model, "--worker", "--threads", str(threads)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert worker.stdout is not None
    if not await worker.stdout.readline():
        sys.exit(f"the pipeline did not load {model}")
    engine = Engine(worker)
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "openvino", "object": "model"}]}

    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(
            frames(engine, await request.json()), media_type="text/event-stream"
        )

    app.add_route("/v1/completions", completions, methods=["POST"])
    running = asyncio.create_task(engine.run())
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
    await uvicorn.Server(config).serve()
    worker.terminate()
    await running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--worker", action="store_true", help="be the process of the pipeline")
    options = parser.parse_args()
    if not options.worker:
        asyncio.run(serve(options.model, options.port, options.threads))
        return
    out = os.dup(1)
    os.dup2(2, 1)  # what the library prints does not get between the lines
    Worker(options.model, options.threads, out).run()


if __name__ == "__main__":
    main()
