"""`headwater explain`: how a running server's model goes on from a text, in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import msgspec
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from server.remote import EXIT_DONE, FAULTS, Refused, connected, told

TOP, STRONGEST, BAR = 8, 3, 24
READ_SECONDS = 600.0  # the longest comparison, on a slow machine, behind others
_EIGHTHS = " ▏▎▍▌▋▊▉"

Json = dict[str, Any]


@dataclass(frozen=True)
class ExplainOptions:
    """`layer` None is the one a third of the way up. `max_tokens` are drawn with and without the KV
    cache; 0 leaves that out. `as_json` prints one document with all answers of the server."""

    text: str
    url: str
    api_key: str | None = None
    layer: int | None = None
    max_tokens: int = 50
    as_json: bool = False


def explain(options: ExplainOptions) -> int:
    """Ask the server and print. Returns the exit code; what is wrong is one line on stderr."""
    console = Console(highlight=False)
    try:
        with connected(options.url, options.api_key, read_seconds=READ_SECONDS) as client:
            server = _Server(client)
            if options.as_json:
                sections = {name: answer for name, answer, _ in _sections(server, options)}
                sys.stdout.write(msgspec.json.encode(sections).decode() + "\n")
            else:
                for _, _, table in _sections(server, options):
                    console.print(table)
    except FAULTS as error:
        return told(options.url, error)
    return EXIT_DONE


class _Server:
    """The inspect routes."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def __call__(self, name: str, body: Json | None = None) -> Json:
        """The answer of one of them. Raises one of the FAULTS."""
        method = "GET" if body is None else "POST"
        response = self._client.request(method, f"/v1/inspect/{name}", json=body)
        if response.status_code == 200:
            with contextlib.suppress(msgspec.MsgspecError):
                return msgspec.json.decode(response.content, type=dict)
        raise Refused(response)


def _sections(server: _Server, options: ExplainOptions) -> Any:
    """(name, answer, how it is shown), one after the other."""
    model = server("model")
    text = {"text": options.text}
    forward = server("forward", {**text, "top_k": TOP, "layers": "all"})
    yield "model", model, _heading(model, forward)
    yield "forward", forward, _tokens(forward)
    yield "next", forward["positions"][-1], _next(forward)
    layer = (model["blocks"] - 1) // 3 if options.layer is None else options.layer
    last = len(forward["tokens"]) - 1
    attention = server("attention", {**text, "layer": layer, "queries": [last]})
    yield "attention", attention, _attention(attention, model)
    yield "layers", forward["layers"], _lens(forward)
    if options.max_tokens:
        compared = server("kv-cache", {**text, "max_tokens": options.max_tokens})
        yield "kv_cache", compared, _cache(compared)


# ------------------------------------------------------------------------------------ tables


def _heading(model: Json, forward: Json) -> Text:
    shapes = forward["shapes"]
    return Text.assemble(
        (f"{model['model']}", "bold"),
        f": {model['blocks']} blocks of {model['heads']} heads ({model['kv_heads']} for keys and "
        f"values), {model['parameters']['total'] / 1e6:.1f} million parameters\n"
        f"input_ids {shapes['input_ids']} -> hidden {shapes['hidden']} -> logits "
        f"{shapes['logits']}",
    )


def _tokens(forward: Json) -> Group:
    table = _table("place", "id", ("token", "left"), "probability", "rank")
    expected: Json | None = None
    for position, token in zip(forward["positions"], forward["tokens"], strict=True):
        table.add_row(
            str(position["position"]),
            str(token["id"]),
            Text(visible(token["text"]), "dim" if token["special"] else "bold"),
            _percent(expected["prob"]) if expected else "",
            str(expected["rank"]) if expected else "",
        )
        expected = position["next"]
    return _section(
        "The tokens",
        "A model reads numbers. Beside each token: how probable it was after those before it.",
        table,
    )


def _next(forward: Json) -> Group:
    position = forward["positions"][-1]
    table = _table("id", ("token", "left"), "logit", "probability", ("", "left"))
    for token in position["top"]:
        table.add_row(
            str(token["id"]),
            Text(visible(token["text"]), "bold"),
            f"{token['logit']:.2f}",
            _percent(token["prob"]),
            _bar(token["prob"]),
        )
    return _section(
        "What may come next",
        f"The logits of the last token, as probabilities. Entropy: {position['entropy']:.2f} nats.",
        table,
    )


def _attention(attention: Json, model: Json) -> Group:
    heads = [rows[0] for rows in attention["weights"]]  # of the one query
    mean = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
    # Many heads rest on the first token; a head that looks at another one has something to say.
    strength = [max(row[1:-1], default=row[0]) for row in heads]
    strongest = sorted(range(len(heads)), key=lambda head: -strength[head])[:STRONGEST]
    names = [f"head {attention['heads'][head]}" for head in strongest]
    table = _table("place", ("token", "left"), "mean", ("", "left"), *names)
    for i, token in enumerate(attention["tokens"][: len(mean)]):
        table.add_row(
            str(i),
            Text(visible(token["text"]), "bold"),
            _percent(mean[i]),
            _bar(mean[i]),
            *(_percent(heads[head][i]) for head in strongest),
        )
    return _section(
        f"What the last token looks at, in layer {attention['layer']} (0 to {model['blocks'] - 1})",
        "The weights of attention add up to 100 % down each column. The mean of all heads, and the "
        "heads that look hardest at one token between the first and the last.",
        table,
    )


def _lens(forward: Json) -> Group:
    table = _table(
        "layer",
        ("token", "left"),
        "probability",
        ("", "left"),
        "residual",
        "attention",
        "feed-forward",
    )
    for layer in forward["layers"]:
        token, norms = layer["lens"][-1], layer["norms"]
        table.add_row(
            str(layer["layer"]),
            Text(visible(token["text"]), "bold"),
            _percent(token["prob"]),
            _bar(token["prob"], BAR // 2),
            *(f"{norms[name][-1]:.1f}" for name in ("residual", "attention", "feed_forward")),
        )
    return _section(
        "Through the layers",
        "What the last token would say if the model ended there (the logit lens); how long its "
        "residual stream is, and the vectors that attention and feed-forward add to it.",
        table,
    )


def _cache(compared: Json) -> Group:
    equal = "the same tokens" if compared["tokens_equal"] else "not quite the same tokens"
    table = _table(("", "left"), "seconds", "tokens/s", ("", "left"))
    slowest = max(compared[name]["seconds"] for name in ("with_cache", "without_cache"))
    for name in ("with_cache", "without_cache"):
        clock = compared[name]
        table.add_row(
            name.replace("_", " "),
            f"{clock['seconds']:.3f}",
            f"{clock['tokens_per_s']:.1f}",
            _bar(clock["seconds"] / slowest),
        )
    return _section(
        "With and without the KV cache",
        f"{compared['tokens']} tokens after {compared['prompt_tokens']}, {equal} both ways; "
        f"{compared['speedup']:.1f} times as fast with it.",
        table,
    )


def _table(*columns: str | tuple[str, Literal["left"]]) -> Table:
    """A column is a name, right-aligned, or (name, alignment)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        if isinstance(column, str):
            table.add_column(column, justify="right", no_wrap=True, header_style="dim")
        else:
            table.add_column(column[0], no_wrap=True, header_style="dim")
    return table


def _section(title: str, about: str, table: Table) -> Group:
    return Group("", Text(title, "bold"), Text(about, "dim"), "", table)


def visible(token: str) -> str:
    """A token as one word on the screen: spaces to be seen, nothing that moves the cursor."""
    shown = token.replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bar(share: float, width: int = BAR) -> Text:
    eighths = round(8 * width * min(share, 1.0))
    return Text("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip(), "cyan")
