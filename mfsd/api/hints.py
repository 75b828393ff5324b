# SPDX-License-Identifier: Apache-2.0
"""The Hints service: what workers say, handed to the engine one hint at a time.

Everything runs on the daemon's one event loop, together with the engine: there are no threads and no locks around it.
A batch is applied without giving way, so a stream's replies and the engine's state are always in the order of the
batches. A bad hint costs only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from google.rpc import code_pb2

from mfsd.api import errors
from mfsd.logs import Seldom
from mfsd.model import Event, HintError
from mfsd.v1 import hints_pb2, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable
    from typing import Protocol

    import grpc

    from mfsd.api.decode import Decoder
    from mfsd.engine.books import Session
    from mfsd.engine.engine import Engine

    class _Stream(Protocol):
        """Part of grpc.aio.ServicerContext that a streaming handler uses; the stubs leave it untyped."""

        async def write(self, message: hints_pb2.HintReply) -> None: ...


EVENTS_PER_REPLY: Final = 256
"""Bounds the size of a reply; the others follow in the next one."""

log = structlog.get_logger(__name__)


class HintsService(hints_pb2_grpc.HintsServicer):
    """Serves mfsd.v1.Hints.

    ``on_hints`` is called after each batch that changed something, so that the daemon can tick soon.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        *,
        on_hints: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.decoder = decoder
        self._on_hints = on_hints
        self._clock = clock
        self._seldom = Seldom()

    # --- one batch ----------------------------------------------------------------------------------------------------

    def apply(self, batch: hints_pb2.HintBatch) -> tuple[Session, hints_pb2.HintReply]:
        """Apply a batch. Raises HintError if no part of it can be (session, pid, size)."""
        limit = self.decoder.limits.max_hints_per_batch
        hints = batch.hints
        if len(hints) > limit:
            raise HintError(
                "hints",
                f"{len(hints)} hints in one batch",
                f"send at most {limit} at a time (limits.max_hints_per_batch)",
                exhausted=True,
            )
        engine, decode = self.engine, self.decoder.decode
        now = self._clock()
        session = engine.session(batch.session, batch.pid, now)
        apply = engine.apply
        reply = hints_pb2.HintReply(seq=batch.seq, epoch=engine.epoch)
        accepted = 0
        for index, hint in enumerate(hints):
            try:
                apply(session, decode(hint, now), now)
            except HintError as e:
                reply.rejected.add(index=index).status.CopyFrom(errors.of_hint(e, _full_path(e.field, hint)))
            except Exception:  # what one hint trips over must cost neither the others nor the stream
                if self._seldom("hint"):
                    log.exception("hint failed", session=batch.session, seq=batch.seq, index=index)
                status = errors.violation(code_pb2.INTERNAL, f"hints[{index}]", "mfsd failed; see its log")
                reply.rejected.add(index=index).status.CopyFrom(status)
            else:
                accepted += 1
        reply.accepted = accepted
        counters = engine.books.counters
        counters.hints_accepted += accepted
        counters.hints_rejected += len(hints) - accepted
        if session.events:
            _drain(session, reply)
        if accepted:
            self._on_hints()
        return session, reply

    # --- calls --------------------------------------------------------------------------------------------------------

    async def Send(  # noqa: N802 - named by the proto
        self, request: hints_pb2.HintBatch, context: grpc.aio.ServicerContext[Any, Any]
    ) -> hints_pb2.HintReply:
        """Unary call; see proto/mfsd/v1/hints.proto."""
        try:
            return self.apply(request)[1]
        except HintError as e:
            await errors.abort(context, errors.of_hint(e))

    async def Stream(  # type: ignore[override]  # noqa: N802 - named by the proto; grpc.aio takes writers, too
        self, request_iterator: AsyncIterable[hints_pb2.HintBatch], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Streaming call: one reply per batch, in order, and events in between."""
        feed = _EventFeed(self.engine, context)
        try:
            async for batch in request_iterator:
                feed.check(batch.session)
                session, reply = self.apply(batch)
                feed.follow(session)
                await feed.write(reply)
        except HintError as e:
            await feed.close()
            await errors.abort(context, errors.of_hint(e))
        finally:
            await feed.close()


class _EventFeed:
    """Writes a stream's replies, and its session's events as soon as they occur."""

    def __init__(self, engine: Engine, stream: _Stream) -> None:
        self._engine = engine
        self._stream = stream
        self._session: Session | None = None
        self._happened = asyncio.Event()
        self._wake = self._happened.set
        self._writing = asyncio.Lock()  # gRPC allows one outstanding write per call
        self._task: asyncio.Task[None] | None = None

    def check(self, name: str) -> None:
        """Raise HintError when a batch is of another session than the batches before it."""
        if self._session is not None and name != self._session.name:
            raise HintError("session", f"{name!r} on the stream of {self._session.name!r}", "open a stream for each")

    def follow(self, session: Session) -> None:
        """Deliver this session's events from now on. The latest stream of a session gets them."""
        if session.wake is not self._wake:
            self._session = session
            session.wake = self._wake
        if self._task is None:
            self._task = asyncio.create_task(self._push())

    async def write(self, reply: hints_pb2.HintReply) -> None:
        """Write one reply."""
        async with self._writing:
            await self._stream.write(reply)

    async def _push(self) -> None:
        while True:
            await self._happened.wait()
            self._happened.clear()
            session = self._session
            while session is not None and session.events:
                reply = hints_pb2.HintReply(epoch=self._engine.epoch)
                _drain(session, reply)
                await self.write(reply)

    async def close(self) -> None:
        """Stop; events that come later wait for the session's next stream or call. Idempotent."""
        session, self._session = self._session, None
        if session is not None and session.wake is self._wake:
            session.wake = None
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            # The stream may be gone already, which a write in progress reports in gRPC's own ways.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _drain(session: Session, reply: hints_pb2.HintReply) -> None:
    """Move events from a session into a reply."""
    for _ in range(min(len(session.events), EVENTS_PER_REPLY)):
        event: Event = session.events.popleft()
        reply.events.add(
            kind=event.kind.value,
            request_id=event.request_id,
            transfer_id=event.transfer_id,
            reason=event.reason,
        )


def _full_path(field: str, hint: hints_pb2.Hint) -> str:
    """Path from the hint down; what resolves selectors does not know in which kind of hint they stood."""
    return f"{hint.WhichOneof('body')}.{field}" if field.startswith("selector") else field
