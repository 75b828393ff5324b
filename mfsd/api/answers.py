# SPDX-License-Identifier: Apache-2.0
"""What a caller gets back: replies in the order of its batches, and events as soon as they occur."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.ground.model import Event, HintError
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Protocol

    from mfsd.engine.records import Session, Watch

    class _Stream(Protocol):
        """Part of grpc.aio.ServicerContext that a streaming handler uses; the stubs leave it untyped."""

        async def write(self, message: pb.HintReply) -> None: ...


SETTLE_S: Final = 0.02
"""A reply waits for the engine no longer than this."""
EVENTS_PER_REPLY: Final = 256
"""Bounds the size of a reply; the others follow in the next one."""
AHEAD: Final = 256
"""Batches of one stream that wait to be answered; no more are read meanwhile."""


@dataclass(slots=True)
class Answer:
    """A reply on its way."""

    session: Session
    reply: pb.HintReply
    at: float
    """When the batch was applied."""
    tick: int
    """The engine's count of ticks then."""
    here: bool = False
    """There is something for the engine to decide."""
    fresh: dict[Watch, int] = field(default_factory=dict)
    """Selectors that are marked, or that the session has not used before; index of the first hint that named it."""


class Answers:
    """Writes a stream's replies when they are due, and its session's events as soon as they occur."""

    def __init__(
        self,
        stream: _Stream,
        settle: Callable[[Answer], Awaitable[pb.HintReply]],
        epoch: int,
        clock: Callable[[], float],
    ) -> None:
        """``settle``: makes a reply complete, when it is due. ``epoch``: the engine's."""
        self._stream = stream
        self._settle = settle
        self._epoch = epoch
        self._clock = clock
        self._session: Session | None = None
        self._due: deque[Answer] = deque()
        self._happened = asyncio.Event()
        self._wake = self._happened.set
        self._room = asyncio.Event()
        self._over = False
        self._task = asyncio.create_task(self._run())

    def check(self, name: str) -> None:
        """Raise HintError when a batch is of another session than the batches before it."""
        if self._session is not None and name != self._session.name:
            raise HintError("session", f"{name!r} on the stream of {self._session.name!r}", "open a stream for each")

    async def put(self, answer: Answer) -> None:
        """Answer one more batch, and deliver its session's events from now on: the latest stream of a session does."""
        if self._session is not answer.session:
            self._detach()
            self._session = answer.session
            self._session.attached += 1
            self._session.kept = True
        answer.session.wake = self._wake
        self._due.append(answer)
        self._happened.set()
        while len(self._due) >= AHEAD and not self._task.done():
            self._room.clear()
            await self._room.wait()

    async def _run(self) -> None:
        try:
            while self._due or not self._over:
                await self._happened.wait()
                self._happened.clear()
                while self._due:
                    await self._stream.write(await self._settle(self._due[0]))
                    self._due.popleft()
                    self._room.set()
                session = self._session
                while session is not None and session.events:
                    reply = pb.HintReply(epoch=self._epoch)
                    drain(session, reply)
                    await self._stream.write(reply)
        finally:
            self._room.set()

    async def finish(self) -> None:
        """Answer what has been read."""
        self._over = True
        self._happened.set()
        # The stream may be gone already, which a write in progress reports in gRPC's own ways.
        with contextlib.suppress(Exception):
            await self._task

    async def close(self) -> None:
        """Stop; events that come later wait for the session's next stream or call. Idempotent."""
        self._detach()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._task

    def _detach(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.attached -= 1
        session.seen = self._clock()
        if session.wake is self._wake:
            session.wake = None


def drain(session: Session, reply: pb.HintReply) -> None:
    """Move events from a session into a reply."""
    for _ in range(min(len(session.events), EVENTS_PER_REPLY)):
        event: Event = session.events.popleft()
        reply.events.add(
            kind=event.kind.value,
            request_id=event.request_id,
            transfer_id=event.transfer_id,
            reason=event.reason,
        )
