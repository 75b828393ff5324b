# SPDX-License-Identifier: Apache-2.0
"""Tells promoted connections that sleep of their promotion (bpf/yield.bpf.c, mfsd_wake), in a thread of its own.

That takes a look at all connections of the namespace, so it never happens on the event loop, and never for more than
SHARE of a processor.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

SHARE: Final = 0.1
"""Of a processor, at most."""

log = structlog.get_logger(__name__)


class Waker:
    """Calls ``wake`` soon after each ``call``, once for all that come meanwhile. Threads: ``call`` may be any."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """``wake`` may raise OSError, which is logged when it begins."""
        self._wake = wake
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="mfsd-wake", daemon=True)
        self._thread.start()

    def call(self) -> None:
        """Somebody may have been promoted. Returns at once."""
        self._wanted.set()

    def close(self) -> None:
        """Idempotent; returns when ``wake`` will not be called any more."""
        self._closed.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed.is_set():
                return
            begin = time.monotonic()
            try:
                self._wake()
                self._failed = False
            except OSError as e:
                if not self._failed:
                    log.warning("promoted connections that sleep are not woken", error=str(e))
                self._failed = True
            self._closed.wait((time.monotonic() - begin) * (1 / SHARE - 1))
