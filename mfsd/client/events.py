# SPDX-License-Identifier: Apache-2.0
"""Events of a client, for those who wait for them in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mfsd.ground.model import Event

KEPT: Final = 1024
"""Events that wait for a slow listener; the oldest go first, since a late warning is worth least."""


class Events:
    """Hands every event to a callback and to all listeners. Thread-safe."""

    def __init__(self, callback: Callable[[Event], None] | None) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._listeners: set[_Listener] = set()
        self._over = False

    def tell(self, event: Event) -> None:
        """Something has happened."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.put(event)
        if self._callback is not None:
            self._callback(event)

    async def listen(self) -> AsyncIterator[Event]:
        """Events from now on, until ``close``."""
        listener = _Listener()
        with self._lock:
            if self._over:
                return
            self._listeners.add(listener)
        try:
            while not (listener.over and not listener.waiting):
                await listener.happened.wait()
                listener.happened.clear()
                while listener.waiting:
                    yield listener.waiting.popleft()
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def close(self) -> None:
        """End all listening. Idempotent."""
        with self._lock:
            self._over = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.over = True
            listener.wake()


class _Listener:
    """One who waits, in the loop that runs where it is made."""

    def __init__(self) -> None:
        self.waiting: deque[Event] = deque(maxlen=KEPT)
        self.happened = asyncio.Event()
        self.over = False
        self._loop = asyncio.get_running_loop()

    def put(self, event: Event) -> None:
        """From any thread."""
        self.waiting.append(event)
        self.wake()

    def wake(self) -> None:
        """From any thread; nothing when the loop is over."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.happened.set)
