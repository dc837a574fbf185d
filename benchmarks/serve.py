"""Load an OpenAI-compatible server and time its streams: a table, then JSON as the last line.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --concurrency 1,4,16

The server may be any (Headwater, vLLM, llama.cpp, transformers serve). With `--turns` each
conversation goes on with the server's own answers, which shows what a prefix cache is worth.
"""

from __future__ import annotations

import argparse
import sys

from server.bench import main


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--model", help="default: the first that the server lists")
    add("--api-key", help="default: HEADWATER_API_KEY")
    add("--concurrency", type=_numbers, default=(1, 4, 16), help="levels, such as 1,4,16")
    add("--num-requests", type=int, help="conversations a level; default: 4 for each stream")
    add("--prompt-tokens", type=_numbers, default=(128,), help="about; several are taken in turn")
    add("--max-tokens", type=int, default=128)
    add("--turns", type=int, default=1)
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="other prompts for another seed")
    add("--warmup", type=int, default=1, help="conversations that are not counted")
    add("--ignore-eos", action="store_true", help="always max-tokens long (not OpenAI's)")
    add("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    add("--endpoint", choices=("chat", "completions"), default="chat")
    add("--timeout", type=float, default=300.0, help="seconds without a byte")
    return parser


if __name__ == "__main__":
    sys.exit(main(**vars(_parser().parse_args())))
