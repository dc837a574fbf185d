"""The Jinja environment in which chat templates run.

It is Jinja's immutable sandbox, set up as Hugging Face sets it up (transformers'
utils/chat_template_utils.py), so that templates mean the same here as there. The sandbox alone
bounds neither time nor memory. Here the clock is looked at on each loop turn and each call, and
the size of a value before it is built by `+`, `~`, `*`, `**`, `%`, join, replace, indent and
format; what pads a string is taken away. Known gap: nothing interrupts one long call into Python.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.filters import make_attrgetter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer


class BoundError(jinja2.TemplateError):
    """The template went over a bound."""


class RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


# A width of five digits or more, or one taken from an argument, in a format string.
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)|\{[^{}]*:[^{}]*(?:\d{5}|\{)")
_PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "translate"})
_PADDING_FILTERS = ("center", "wordwrap", "random", "filesizeformat", "xmlattr")
# What an item of a list costs, in bytes, so that lists come under the same bound as strings.
_ITEM_BYTES = 8


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on time (seconds) and on the size of values (bytes).

    The clock is each thread's own: `start_clock` before a template runs, `check_clock` raises
    BoundError when its time is over.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._clock = threading.local()
        for name in _PADDING_FILTERS:
            del self.filters[name]
        self.filters.update(
            tojson=_tojson,
            join=self._join,
            replace=self._replace,
            indent=self._indent,
            format=self._format,
            bounded_loop=self._loop,
            bounded_concat=self._join,
        )
        self.globals.pop("lipsum", None)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda format: datetime.now().strftime(str(format)[:256]),
            namespace=_Namespace,
            range=lambda *args: self._loop(range(*args)),
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
        )

    def start_clock(self) -> None:
        """Starts this thread's time."""
        self._clock.deadline = time.monotonic() + self._max_seconds

    def check_clock(self) -> None:
        """Raises BoundError when this thread's time is over."""
        if time.monotonic() > self._clock.deadline:
            raise BoundError(f"it ran longer than {self._max_seconds:g} seconds")

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BoundError(f"it builds a value of over {self._max_bytes} bytes")

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template: jinja2.nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return template

    # ------------------------------------------------------------------------- calls and attributes

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template comes through here, recursive macros too."""
        __self.check_clock()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and args:
            name = getattr(__obj, "__name__", "")
            if name == "join":
                return __self._join(args[0], owner)
            if name == "replace" and len(args) > 1:
                return __self._replace(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Without the methods that pad a string to any width."""
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` without great widths."""
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__name__", "")
        if isinstance(owner, str) and name.startswith("format") and _WIDE.search(owner):
            raise BoundError("it formats with a width that is too large")
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can build something large, looked at first."""
        self.check_clock()
        if operator == "+":
            self._check_size(_size(left) + _size(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    self._check_size(_size(value) * times)
            if isinstance(left, int) and isinstance(right, int):
                self._check_size((left.bit_length() + right.bit_length()) // 8)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_size(left.bit_length() * abs(right) // 8)
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise BoundError("it formats with a width that is too large")
        return super().call_binop(context, operator, left, right)

    # ----------------------------------------------------------------------------- filters, globals

    def _loop(self, iterable: Iterable[Any]) -> _Loop:
        return _Loop(self, iterable)

    def _join(self, values: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        separator = str(d)
        texts: list[str] = []
        size = 0
        for value in self._loop(values):
            texts.append(str(value))
            size += len(texts[-1]) + len(separator)
            self._check_size(size)
        return separator.join(texts)

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, before, after = str(value), str(old), str(new)
        times = text.count(before)
        if count is not None and count >= 0:
            times = min(times, count)
        self._check_size(len(text) + times * len(after))
        return text.replace(before, after, times)

    def _format(self, text: Any, *args: Any, **kwargs: Any) -> str:
        if _WIDE.search(str(text)):
            raise BoundError("it formats with a width that is too large")
        return str(text) % (kwargs or args)

    def _indent(
        self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text = str(value)
        margin = width if isinstance(width, str) else " " * min(int(width), 256)
        self._check_size(len(text) + (text.count("\n") + 1) * len(margin))
        lines = text.split("\n")
        rest = [margin + line if line or blank else line for line in lines[1:]]
        return "\n".join([(margin if first else "") + lines[0], *rest])


class _Loop:
    """What a `for` goes over, with the clock looked at on each turn."""

    def __init__(self, environment: TemplateSandbox, iterable: Iterable[Any]) -> None:
        self._environment = environment
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            self._environment.check_clock()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]  # Jinja expects the TypeError

    def __getitem__(self, index: Any) -> Any:
        return self._iterable[index]  # type: ignore[index]  # as range and list would


class _Bounded(NodeTransformer):
    """Puts the bounds into the program: on what loops go over and on what `~` joins."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(cast(jinja2.nodes.Expr, node.iter), "bounded_loop")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno), "bounded_concat")


def _filter(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """A namespace without underscore names, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; its body is kept as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body: list[jinja2.nodes.Node] = parser.parse_statements(
            ("name:endgeneration",), drop_needle=True
        )
        return body


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return len(value) * _ITEM_BYTES if isinstance(value, list | tuple) else 0


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that HTML needs, which models have not seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent if indent is None else min(indent, 64),
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> NoReturn:
    raise RefusedError(str(message)[:1000])
