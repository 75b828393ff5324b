# SPDX-License-Identifier: Apache-2.0
"""Structured logs on stderr: for people (console) or for machines (JSON, one object per line)."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Final, Literal

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
SELDOM_S: Final = 10.0
"""Least time between two lines about the same thing that may fail at every tick."""


def configure(style: Literal["console", "json"], level: str) -> None:
    """Set up structlog, and what libraries log through the standard module. May be called again."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        # Under systemd the journal has its own time; for JSON a sortable one that needs no time zone.
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if style == "json" else _keep,
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if style == "json"
        # Tracebacks as Python prints them: rich's are cut to 80 columns and show all local variables.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def set_level(level: str) -> None:
    """Least severe events to log from now on."""
    logging.getLogger().setLevel(LEVELS[level])


def _keep(_logger: object, _name: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    return event


class Seldom:
    """Says whether it is time to log about something again: once per ``period`` and key. Bounded."""

    def __init__(self, period: float = SELDOM_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._period = period
        self._clock = clock
        self._next: dict[str, float] = {}

    def __call__(self, key: str) -> bool:
        """True at most once per period for each key."""
        now = self._clock()
        if now < self._next.get(key, 0.0):
            return False
        if len(self._next) > 1000:
            self._next.clear()
        self._next[key] = now + self._period
        return True
