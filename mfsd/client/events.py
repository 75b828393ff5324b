# SPDX-License-Identifier: Apache-2.0
"""Events of a client, for those who wait for them in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from mfsd.ground.model import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from mfsd.v1 import hints_pb2

KEPT: Final = 1024
"""Events that wait for a slow listener; the oldest go first, since a late warning is worth least."""
_KINDS: Final = {int(k) for k in EventKind}


def told(reply: hints_pb2.HintReply) -> Iterator[Event]:
    """What a daemon tells with a reply. A newer one may know kinds that we don't."""
    for e in reply.events:
        if e.kind in _KINDS:
            yield Event(EventKind(e.kind), e.request_id, e.transfer_id, e.reason)


class Events:
    """Hands every event to a callback and to all listeners. Thread-safe."""

    def __init__(self, callback: Callable[[Event], None] | None) -> None:
        self._callback = callback
        self._lock = threading.RLock()  # may be taken again, by a signal's handler
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._over = False

    def tell(self, event: Event) -> None:
        """Something has happened."""
        if event.kind is EventKind.OVERTIME:
            return  # the ledger has heard it, and nobody else has to do anything about it
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.put(event)
        if self._callback is not None:
            self._callback(event)

    def listen(self) -> Listener:
        """Events from now on, until ``close``."""
        listener = Listener()
        with self._lock:
            listener.over = self._over
            self._listeners.add(listener)
        return listener

    def close(self) -> None:
        """End all listening. Idempotent."""
        with self._lock:
            self._over = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.end()


class Listener:
    """An iterator of what has happened since it was made, for one task; it stops when the client is closed."""

    def __init__(self) -> None:
        self.over = False
        self._waiting: deque[Event] = deque(maxlen=KEPT)
        self._wanted: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        """Who waits for the next one, if somebody does."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        happened = asyncio.Event()
        self._wanted = asyncio.get_running_loop(), happened
        while not self._waiting:
            if self.over and not self._waiting:  # in this order: nothing is put once it is over
                raise StopAsyncIteration
            await happened.wait()
            happened.clear()
        return self._waiting.popleft()

    async def aclose(self) -> None:
        """Stop. Idempotent."""
        self._waiting.clear()
        self.end()

    def put(self, event: Event) -> None:
        """From any thread."""
        if not self.over:
            self._waiting.append(event)
            self._wake()

    def end(self) -> None:
        """From any thread: what waits is told still, and nothing else. Idempotent."""
        self.over = True
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None:
            loop, happened = self._wanted
            with contextlib.suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(happened.set)
