"""What is logged, and how."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog


def set_up_logs(level: str, quiet: Callable[[], bool] = lambda: False) -> None:
    """One line an event on stderr; values are escaped, so that no log line can be forged. Nothing
    is logged while `quiet` says so."""
    tty = sys.stderr.isatty()

    def unless_quiet(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if quiet():
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[
            unless_quiet,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if tty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
