# SPDX-License-Identifier: Apache-2.0
"""The background half of the client: one stream to the daemon, kept up for as long as the client lives.

Two threads share the state below under one lock: ours reads replies and reconnects; gRPC's own consumes ``_outgoing``,
which turns queued hints into batches. On each new stream an empty batch is sent first, and the epoch in its reply
decides what follows: the same daemon gets again what it has not answered, another one gets what is alive.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfsd.client.encode import encode
from mfsd.client.ledger import Ledger
from mfsd.model import Event, EventKind, Hint
from mfsd.v1 import hints_pb2, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WINDOW: Final = 32
"""Batches on the way at most; a daemon that answers slowly makes hints wait here, where deadlines are still exact."""
BACKOFF_S: Final = (0.05, 5.0)
"""First and longest time between attempts to connect."""
WARN_S: Final = 10.0

log = logging.getLogger("mfsd.client")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A hint that the daemon did not take, and why (field, problem, fix)."""

    hint: Hint
    message: str


@dataclass(slots=True)
class Stats:
    """Counts since the client was made."""

    connected: bool = False
    queued: int = 0
    """Waiting now."""
    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    dropped: int = 0
    """Gave way to newer ones because the queue (or the list of what is alive) was full."""
    announced_again: int = 0
    """Said to a daemon that had lost them."""
    connects: int = 0


@dataclass(slots=True, eq=False)
class _Stream:
    """One attempt: state that dies with the connection."""

    call: Any = None
    epoch: int = 0
    """From the first reply; 0: not yet."""
    seq: int = 0
    unanswered: dict[int, list[Hint]] = field(default_factory=dict)
    over: bool = False

    def ended(self) -> bool:
        """Whether the connection is lost or the client closes."""
        return self.over


class Link:
    """See the module."""

    def __init__(
        self,
        session: str,
        pid: int,
        target: str,
        queue: int,
        batch: int,
        on_event: Callable[[Event], None] | None,
        on_rejected: Callable[[Rejected], None] | None,
    ) -> None:
        if queue < 1 or batch < 1:
            raise ValueError(f"queue = {queue}, batch = {batch}: both must be at least 1")
        self._session, self._pid, self._target = session, pid, target
        self._batch = batch
        self._on_event, self._on_rejected = on_event, on_rejected
        self._queue: deque[Hint] = deque()
        self._queue_max = queue
        self._stats = Stats()
        self._changed = threading.Condition(threading.Lock())
        self._closing = False
        self._ledger = Ledger(queue)
        self._epoch = 0
        """Of the daemon that has heard what the ledger holds."""
        self._again: deque[Hint] = deque()
        """Sent but not answered when the stream broke."""
        self._stream: _Stream | None = None
        self._warned = 0.0
        self._thread = threading.Thread(target=self._run, name="mfsd-client", daemon=True)
        self._thread.start()

    # --- the caller's threads -----------------------------------------------------------------------------------------

    def put(self, hint: Hint) -> None:
        """Queue a hint."""
        with self._changed:
            if self._closing:
                return
            queue = self._queue
            if len(queue) >= self._queue_max:
                queue.popleft()
                self._stats.dropped += 1
            queue.append(hint)
            if len(queue) == 1:
                self._changed.notify_all()

    def stats(self) -> Stats:
        """A copy."""
        with self._changed:
            return replace(self._stats, queued=len(self._queue), dropped=self._stats.dropped + self._ledger.forgotten)

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued has been answered."""
        with self._changed:
            return self._changed.wait_for(self._answered, timeout)

    def _answered(self) -> bool:
        stream = self._stream
        # The epochs differ until it has been settled what a new daemon must hear.
        heard = stream is not None and stream.epoch == self._epoch != 0 and not stream.unanswered
        return heard and not self._queue and not self._again

    def close(self, timeout: float) -> None:
        """Flush, then stop the thread."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._stream is not None and self._stream.epoch:
                self._changed.wait_for(self._answered, timeout)
            self._closing = True
            self._changed.notify_all()
            call = self._stream.call if self._stream is not None else None
        if call is not None:
            call.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(max(deadline - time.monotonic(), 0.05))

    # --- our thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        channel = grpc.insecure_channel(
            self._target,
            options=[
                ("grpc.initial_reconnect_backoff_ms", int(BACKOFF_S[0] * 1000)),
                ("grpc.min_reconnect_backoff_ms", int(BACKOFF_S[0] * 1000)),
                ("grpc.max_reconnect_backoff_ms", int(BACKOFF_S[1] * 1000)),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        stub = hints_pb2_grpc.HintsStub(channel)
        backoff = BACKOFF_S[0]
        try:
            while not self._closing:
                stream = _Stream()
                self._converse(stub, stream)
                backoff = BACKOFF_S[0] if stream.epoch else min(backoff * 2, BACKOFF_S[1])
                self._idle(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects, hides nothing
        finally:
            channel.close()

    def _converse(self, stub: hints_pb2_grpc.HintsStub, stream: _Stream) -> None:
        """One stream from its beginning to its end."""
        try:
            call = stub.Stream(self._outgoing(stream))
            with self._changed:
                stream.call = call
                self._stream = stream
                if self._closing:
                    return
            for reply in call:
                self._answer(stream, reply)
        except grpc.RpcError as e:
            self._broken(stream, e)
        finally:
            with self._changed:
                stream.over = True
                self._stats.connected = False
                self._again.extendleft(h for hints in reversed(stream.unanswered.values()) for h in reversed(hints))
                stream.unanswered = {}
                self._stream = None
                self._changed.notify_all()
            if stream.call is not None:
                stream.call.cancel()

    def _idle(self, seconds: float) -> None:
        """Wait before the next attempt; what is said meanwhile goes to the ledger."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._absorb()
                self._changed.wait(left)

    def _absorb(self) -> None:
        # Only a daemon that knows nothing can be told from the ledger alone; the same one also needs the ends.
        now = time.monotonic()
        while self._queue:
            hint = self._queue.popleft()
            self._ledger.enter(hint, now)
            if self._epoch:
                self._again.append(hint)
        if len(self._again) > self._queue_max:
            # The daemon has been away for long: it gets the ledger, as if it were new.
            self._again.clear()
            self._epoch = 0

    def _answer(self, stream: _Stream, reply: hints_pb2.HintReply) -> None:
        rejected: list[Rejected] = []
        with self._changed:
            hints = stream.unanswered.pop(reply.seq, [])
            if not stream.epoch:
                stream.epoch = reply.epoch
                self._stats.connected = True
                self._stats.connects += 1
            self._stats.accepted += reply.accepted
            self._stats.rejected += len(reply.rejected)
            rejected = [Rejected(hints[r.index], r.status.message) for r in reply.rejected if r.index < len(hints)]
            self._changed.notify_all()
        for r in rejected:
            self._warn("mfsd rejects a hint: %s", r.message)
            _call(self._on_rejected, r)
        for e in reply.events:
            kind = EventKind(e.kind) if e.kind in _KINDS else None
            if kind is not None:  # a newer daemon may know kinds that we don't
                _call(self._on_event, Event(kind, e.request_id, e.transfer_id, e.reason))

    def _broken(self, stream: _Stream, error: grpc.RpcError) -> None:
        # What a call raises is an RpcError and a Call at the same time, which the stubs can't express.
        code: grpc.StatusCode | None = getattr(error, "code", lambda: None)()
        if self._closing or code is grpc.StatusCode.CANCELLED:
            return
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and stream.epoch:
            self._smaller(stream)
        if code is not grpc.StatusCode.UNAVAILABLE:
            self._warn("mfsd ends the stream: %s", error)

    def _smaller(self, stream: _Stream) -> None:
        """A batch was too large for the daemon (limits.max_hints_per_batch) or for gRPC (bytes per message)."""
        with self._changed:
            if self._batch > 1:
                self._batch //= 2
            elif stream.unanswered:
                stream.unanswered.pop(next(iter(stream.unanswered)))
                self._stats.dropped += 1

    def _warn(self, text: str, *args: object) -> None:
        now = time.monotonic()
        if now >= self._warned:
            self._warned = now + WARN_S
            log.warning(text, *args)

    # --- gRPC's sending thread ----------------------------------------------------------------------------------------

    def _outgoing(self, stream: _Stream) -> Iterator[hints_pb2.HintBatch]:
        yield self._encode(stream, [])
        with self._changed:
            self._changed.wait_for(lambda: stream.epoch or stream.over)
            if not stream.ended():
                self._catch_up(stream.epoch)
                self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: stream.over or ((self._again or self._queue) and len(stream.unanswered) < WINDOW)
                )
                if stream.ended():
                    return
                batch = self._encode(stream, self._take())
            yield batch

    def _catch_up(self, epoch: int) -> None:
        """Find out what this daemon has not heard yet. The lock is held."""
        if epoch == self._epoch:
            return  # what it has not answered is in _again
        self._epoch = epoch
        self._again = deque(self._ledger.alive(time.monotonic()))
        if self._stats.connects > 1:
            self._stats.announced_again += len(self._again)

    def _take(self) -> list[Hint]:
        """The next hints to send, oldest first. The lock is held."""
        if self._again:
            return [self._again.popleft() for _ in range(min(len(self._again), self._batch))]
        hints = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch))]
        now = time.monotonic()
        for hint in hints:
            self._ledger.enter(hint, now)
        return hints

    def _encode(self, stream: _Stream, hints: list[Hint]) -> hints_pb2.HintBatch:
        stream.seq += 1
        batch = hints_pb2.HintBatch(session=self._session, pid=self._pid, seq=stream.seq)
        now = time.monotonic()
        for hint in hints:
            encode(hint, now, batch.hints.add())
        if hints:
            stream.unanswered[stream.seq] = hints
            self._stats.sent += len(hints)
        return batch


_KINDS: Final = {int(k) for k in EventKind}


def _call(callback: Callable[[Any], None] | None, argument: object) -> None:
    """A faulty callback must not end the thread."""
    if callback is not None:
        try:
            callback(argument)
        except Exception:
            log.exception("callback of the mfsd client failed")
