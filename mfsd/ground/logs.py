# SPDX-License-Identifier: Apache-2.0
"""Structured logs on stderr: for people (console) or for machines (JSON, one object per line).

Where stderr is systemd's journal, levels become its priorities, and in the console style an event goes to it with its
values as fields (``journalctl MFSD_DEVICE=eth0``). One event is one line; of what floods, ``FLOOD`` lines are written.
Lines are written by a thread: whoever should read them and does not, or a disk that hangs, holds up nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Literal

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
SELDOM_S: Final = 10.0
"""Least time between two lines about the same thing that may fail at every tick."""
FLOOD: Final = 20
"""Lines of one event within FLOOD_S; beyond, the next one that is written says how many were not."""
FLOOD_S: Final = 10.0
WAITING: Final = 1000
"""Lines that wait to be written; what comes beyond is left out."""
LAST_S: Final = 1.0
"""At its end, a process waits for them no longer than this."""
STDERR: Final = 2
JOURNAL: Final = "/run/systemd/journal/socket"
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog (RFC 5424, 6.2.1), by level."""


def configure(style: Literal["console", "json"], level: str) -> None:
    """Set up structlog, and what libraries log through the standard module. May be called again."""
    journal = to_journal(os.environ.get("JOURNAL_STREAM", ""))
    native = journal and style == "console"
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        # A sortable time that needs no time zone; the journal has its own.
        _keep if native else structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if style == "json" else _keep,
    ]
    # Tracebacks as Python prints them: rich's are cut to 80 columns and show all local variables.
    console = structlog.dev.ConsoleRenderer(colors=os.isatty(STDERR), exception_formatter=structlog.dev.plain_traceback)
    json = structlog.processors.JSONRenderer()
    renderer: structlog.types.Processor = Journalled(console) if native else json if style == "json" else console
    if journal and not native:
        renderer = _prefixed(renderer)
    handler = Apart(Journal() if native else to_stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    set_level(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            Flood(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def level() -> str:
    """Least severe events that are logged now."""
    now = logging.getLogger().level
    return next(name for name, number in LEVELS.items() if number == now)


def set_level(level: str) -> None:
    """Least severe events to log from now on."""
    logging.getLogger().setLevel(LEVELS[level])


def _keep(_logger: object, _name: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    return event


class Seldom:
    """Says whether it is time to log about something again: once per SELDOM_S and key. Bounded."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}

    def __call__(self, key: str) -> bool:
        """True at most once per SELDOM_S for each key."""
        now = time.monotonic()
        if now < self._next.get(key, 0.0):
            return False
        if len(self._next) > 1000:
            self._next.clear()
        self._next[key] = now + SELDOM_S
        return True


class Flood:
    """Processor that lets ``FLOOD`` lines of each event pass in ``FLOOD_S``, and counts the others. Bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, list[float]] = {}
        """Event -> [when its period ends, lines in it, lines left out]."""

    def __call__(self, _logger: object, _name: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        """Raises structlog.DropEvent."""
        now, name = self._clock(), str(event.get("event"))
        if len(self._seen) > 1000:
            self._seen.clear()
        period = self._seen.setdefault(name, [now + FLOOD_S, 0, 0])
        if now >= period[0]:
            if period[2]:
                event["left_out"] = int(period[2])
            period[:] = [now + FLOOD_S, 0, 0]
        if period[1] >= FLOOD:
            period[2] += 1
            raise structlog.DropEvent
        period[1] += 1
        return event


# --- systemd's journal ------------------------------------------------------------------------------------------------


def to_journal(stream: str) -> bool:
    """Whether stderr is the journal. ``stream``: JOURNAL_STREAM, "device:inode" (systemd.exec(5))."""
    try:
        stat = os.fstat(STDERR)
    except OSError:
        return False
    return stream == f"{stat.st_dev}:{stat.st_ino}"


def _prefixed(renderer: structlog.types.Processor) -> structlog.types.Processor:
    """Lines with the priority in front, which the journal takes off (sd-daemon(3))."""

    def render(logger: object, name: str, event: structlog.types.EventDict) -> str:
        priority = PRIORITIES.get(str(event.get("level")), 6)
        return f"<{priority}>{renderer(logger, name, event)!s}"

    return render


class Journalled:
    """Renderer of an event as one datagram of the journal's native protocol.

    https://systemd.io/JOURNAL_NATIVE_PROTOCOL: fields "NAME=value", or those with line breaks as the name, the length
    as 64 bits little-endian, and the value. As text, because that is what formatters return.
    """

    def __init__(self, console: structlog.types.Processor) -> None:
        self._console = console

    def __call__(self, logger: object, name: str, event: structlog.types.EventDict) -> str:
        """See the class."""
        level = str(event.pop("level", "info"))
        values = {k: v for k, v in event.items() if k not in ("event", "exc_info", "stack_info")}
        fields = {
            "MESSAGE": str(self._console(logger, name, event)).strip(),
            "PRIORITY": str(PRIORITIES.get(level, 6)),
            "SYSLOG_IDENTIFIER": "mfsd",
        }
        fields |= {f"MFSD_{re.sub('[^A-Z0-9]', '_', k.upper())}": str(v) for k, v in values.items()}
        return b"".join(_field(k.encode(), v.encode(errors="replace")) for k, v in fields.items()).decode("latin-1")


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" not in value:
        return name + b"=" + value + b"\n"
    return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"


class Journal:
    """Sends what ``Journalled`` has rendered; to stderr, which is the journal as well, where that fails."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __call__(self, text: str) -> None:
        """Write one event."""
        datagram = text.encode("latin-1")
        try:
            self._socket.sendto(datagram, JOURNAL)
        except OSError:  # too long, or the journal restarts
            to_stderr(f"<3>{datagram.decode(errors='replace')[:2000]!r}")


# --- writing ----------------------------------------------------------------------------------------------------------


def to_stderr(text: str) -> None:
    """Write one line. Raises OSError."""
    # Not by sys.stderr, whose lock the interpreter would want at its end from a thread that hangs in here.
    raw = f"{text}\n".encode(errors="backslashreplace")
    while raw:
        raw = raw[os.write(STDERR, raw) :]


class Apart(logging.Handler):
    """Has lines written by a thread of its own, at most ``WAITING`` of them behind."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write
        self._lines: deque[str] = deque()
        self._left_out = 0
        self._over = self._writing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mfsd-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - a line that can't be made must not end what wanted it written
            self.handleError(record)
            return
        with self._changed:
            if len(self._lines) < WAITING:
                self._lines.append(text)
            else:
                self._left_out += 1
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._over)
                if not self._lines:
                    return
                text, self._writing = self._lines.popleft(), True
                left_out, self._left_out = self._left_out, 0
            for line in [text, self._missing(left_out)] if left_out else [text]:
                with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
                    self._write(line)

    def _missing(self, count: int) -> str:
        text = f"{count} lines were left out: they could not be written in time"
        fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
        return self.format(logging.makeLogRecord(fields))

    def flush(self) -> None:
        """Wait for what has been said to be written, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._lines or self._writing), LAST_S)

    def close(self) -> None:
        """See logging.Handler. What waits is written still."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        super().close()
