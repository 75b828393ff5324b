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
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfsd.client.again import Again
from mfsd.client.complaints import Complaints
from mfsd.client.encode import Batch, encode_batch, split, writable
from mfsd.client.events import told
from mfsd.client.introduction import Introduction, NotWelcomeError
from mfsd.client.ledger import Ledger
from mfsd.client.outcome import Rejected, Stats, call_back
from mfsd.client.way import Held, Way, pause
from mfsd.ground.wire import TOKEN
from mfsd.v1 import hints_pb2, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mfsd.ground.model import Event, Hint

WINDOW: Final = 32
"""Batches on the way at most; a daemon that answers slowly makes hints wait here, where deadlines are still exact."""
AWAY_S: Final = 30.0
"""A daemon that can't be reached for so long is worth a warning."""
GATHER: Final = 64
"""Without a daemon so many hints are entered at once: waking a thread for each would cost more than they do."""
TRIPS: Final = 32
"""Round trips of which the shortest counts."""
SLICE: Final = 32
"""Hints that are gone through without letting callers in: what they need takes a fifth of a millisecond at most."""
BREATH_S: Final = 50e-6
"""Between two slices: long enough for who waits to wake up."""

log = logging.getLogger("mfsd.client")


@dataclass(slots=True, eq=False)
class _Stream:
    """One attempt: state that dies with the connection."""

    call: Any = None
    epoch: int = 0
    """From the first reply; 0: not yet."""
    columns: bool = False
    """The daemon takes them."""
    unanswered: dict[int, Batch] = field(default_factory=dict)
    sent: dict[int, float] = field(default_factory=dict)
    """When messages were, by number."""
    over: bool = False
    """The connection is lost, or the client closes."""


class Link:
    """See the module."""

    def __init__(
        self,
        session: str,
        target: str,
        queue: int,
        batch: int,
        on_event: Callable[[Event], None] | None,
        on_rejected: Callable[[Rejected], None] | None,
        way: Way | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """``way``: how to get there; None: over a plain channel, at once. ``ledger``: None: one for ``queue``."""
        if queue < 1 or batch < 1:
            raise ValueError(f"queue = {queue}, batch = {batch}: both must be at least 1")
        self._session, self._target = session, target
        self._introduction = Introduction(target)
        self._way = way or Way()
        self._batch = batch
        self._on_event, self._on_rejected = on_event, on_rejected
        self._queue: deque[Hint] = deque()
        self._queue_max = queue
        self._gather = min(GATHER, (queue + 1) // 2)
        self._stats = Stats()
        self._changed = threading.Condition()  # may be taken again: by a signal's handler, or what a collector deletes
        self._closing = False
        self._ledger = Ledger(queue) if ledger is None else ledger
        self._epoch = 0
        """Of the daemon that has heard what the ledger holds."""
        self._again = Again()
        """Sent but not answered when the stream broke."""
        self._seq = 0
        """Of the last message, of whatever stream."""
        self._stream: _Stream | None = None
        self._took: deque[float] = deque(maxlen=TRIPS)
        self._transit = 0.0
        """Seconds that messages are on their way."""
        self._complaints = Complaints()
        self.why_not = ""
        """Why there is no connection, as gRPC puts it; of the last attempt that failed."""
        self._thread = threading.Thread(target=self._run, name="mfsd-client", daemon=True)
        self._thread.start()

    # --- the caller's threads -----------------------------------------------------------------------------------------

    def put(self, *hints: Hint) -> None:
        """Queue hints."""
        with self._changed:
            if self._closing:
                return
            queue = self._queue
            before = len(queue)
            queue.extend(hints)
            while len(queue) > self._queue_max:
                queue.popleft()
                self._stats.dropped += 1
            if not before or before < self._gather <= len(queue):
                self._changed.notify_all()

    def refuse(self, hint: Hint, why: str) -> None:
        """A hint that no daemon could obey."""
        with self._changed:
            self._stats.rejected += 1
        self._complaints.once(why.partition(":")[0], "mfsd can't take a hint: %s", why)
        call_back(self._on_rejected, Rejected(hint, why))

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
        self._introduction.close()
        if self._thread is not threading.current_thread():
            self._thread.join(max(deadline - time.monotonic(), 0.05))

    def forked(self) -> None:
        """In the child of a fork, which has none of our threads: the parent's connection must not live on here."""
        self._introduction.close()

    # --- our thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        held = Held(self._way, self._target)
        reached = time.monotonic()
        try:
            while not self._closing:
                stream = _Stream()
                try:
                    self._attempt(stream, held)
                except Exception as e:  # noqa: BLE001 - whatever it is: a thread that ended would send nothing any more
                    self._complaints.once(f"{e!r}", "no hints are sent: %r; trying on", e)
                if stream.epoch:
                    reached = time.monotonic()
                elif time.monotonic() - reached > AWAY_S:
                    self._complaints.once(
                        "away", "no mfsd at %s for %.0f s; hints are kept for it", self._target, AWAY_S
                    )
                longest = pause(time.monotonic() - reached)
                self._idle(longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects, hides nothing
        finally:
            self._introduction.close()
            held.close()

    def _attempt(self, stream: _Stream, held: Held) -> None:
        if (token := self._introduce()) is not None:
            self._converse(hints_pb2_grpc.HintsStub(held.channel()), stream, token)

    def _introduce(self) -> str | None:
        """Our token, empty without one; None: there is no daemon to talk to."""
        try:
            token = self._introduction.token()
        except NotWelcomeError as e:
            self._complaints.once("welcome", "no hints are sent: %s", e.strerror)
            return None
        except OSError:
            return None
        if self._introduction.absent:
            text = "%s is there, but not the same with .id appended: hints end by expiry; mount their folder as a whole"
            self._complaints.once("absent", text, self._target)
        return token

    def _converse(self, stub: hints_pb2_grpc.HintsStub, stream: _Stream, token: str) -> None:
        """One stream from its beginning to its end."""
        try:
            call = stub.Stream(self._outgoing(stream), metadata=((TOKEN, token),) if token else ())
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
                self._again.put_back(stream.unanswered)
                stream.unanswered = {}
                self._stream = None
                self._changed.notify_all()
            if stream.call is not None:
                stream.call.cancel()

    def _idle(self, seconds: float) -> None:
        """Wait before the next attempt; what is said meanwhile goes to the ledger."""
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            with self._changed:
                if not self._closing and len(self._queue) < self._gather:
                    self._changed.wait(left)
            if len(self._queue) >= self._gather:
                self._absorb()
        self._absorb()

    def _absorb(self) -> None:
        """Enter what is queued now. What comes meanwhile stays, and is sent after it."""
        for _ in range(0, len(self._queue), SLICE):
            with self._changed:
                self._absorb_some()
            time.sleep(BREATH_S)

    def _absorb_some(self) -> None:
        # Only a daemon that knows nothing can be told from the ledger alone; the same one also needs the ends.
        now = time.monotonic()
        for _ in range(min(len(self._queue), SLICE)):
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
            batch = stream.unanswered.pop(reply.seq, None)
            sent = stream.sent.pop(reply.seq, None)
            if sent is not None and self._way.correct:
                self._took.append(time.monotonic() - sent)
                self._transit = min(self._took) / 2
            if not stream.epoch:
                if reply.epoch == self._epoch:
                    self._again.drop(reply.heard)
                stream.epoch, stream.columns = reply.epoch, reply.takes_columns
                self._complaints.forget()
                self._stats.connected = True
                self._stats.connects += 1
            self._stats.accepted += reply.accepted
            if batch is not None:
                rejected = [Rejected(hint, r.status.message) for r in reply.rejected for hint in batch.meant(r)]
            self._stats.rejected += len(rejected)
            events, now = list(told(reply)), time.monotonic()
            for event in events if stream.epoch == self._epoch else ():  # else the ledger is being read
                self._ledger.hear(event, now)
            self._changed.notify_all()
        for r in rejected:
            self._complaints.seldom("mfsd rejects a hint: %s", r.message)
            call_back(self._on_rejected, r, BaseException)
        for event in events:
            call_back(self._on_event, event, BaseException)

    def _broken(self, stream: _Stream, error: grpc.RpcError) -> None:
        # What a call raises is an RpcError and a Call at the same time, which the stubs can't express.
        code: grpc.StatusCode | None = getattr(error, "code", lambda: None)()
        details: str = getattr(error, "details", lambda: "")() or str(error)
        self.why_not = details
        if self._closing or code is grpc.StatusCode.CANCELLED:
            return
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and stream.epoch:
            self._smaller(stream)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            self._introduction.close()  # and again
        elif code is not grpc.StatusCode.UNAVAILABLE:
            self._complaints.once(f"{code}{details}", "mfsd ends the stream: %s", details)

    def _smaller(self, stream: _Stream) -> None:
        """A batch was too large for the daemon (limits.max_hints_per_batch) or for gRPC (bytes per message)."""
        with self._changed:
            if self._batch > 1:
                self._batch //= 2
            elif stream.unanswered:
                stream.unanswered.pop(next(iter(stream.unanswered)))
                self._stats.dropped += 1  # batches are of one hint by now

    # --- gRPC's sending thread ----------------------------------------------------------------------------------------

    def _outgoing(self, stream: _Stream) -> Iterator[hints_pb2.HintBatch]:
        yield self._message(stream, Batch([], 0))
        with self._changed:
            self._changed.wait_for(lambda: stream.epoch or stream.over)
        self._catch_up(stream)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: stream.over or ((self._again or self._queue) and len(stream.unanswered) < WINDOW)
                )
                if stream.over:
                    return
                batch = self._take(stream)
                out = self._message(stream, batch)
                now = stream.sent[out.seq] + self._transit
            try:
                encode_batch(batch, now, out)  # takes long, and callers need the lock
            except Exception:  # a hint that ``fault`` should have found: the stream, and all who come after, go on
                log.exception("a hint can't be sent")
                out = self._message_again(stream, batch, out.seq, now)
            yield out

    def _catch_up(self, stream: _Stream) -> None:
        """Find out what this daemon has not heard yet."""
        if stream.epoch == self._epoch:
            return  # what it has not answered is in _again
        alive = self._ledger.again(time.monotonic())  # which changes only when the stream is over, and by us
        found = Again()
        while True:
            with self._changed:
                if stream.over:
                    return
                before = len(found)
                found.extend(islice(alive, SLICE))
                if len(found) == before:
                    self._epoch, self._again = stream.epoch, found
                    self._stats.announced_again += len(found) if self._stats.connects > 1 else 0
                    self._changed.notify_all()
                    return
            time.sleep(BREATH_S)

    def _take(self, stream: _Stream) -> Batch:
        """The next hints to send, oldest first. The lock is held."""
        source = self._again or self._queue
        hints = [source.popleft() for _ in range(min(len(source), self._batch))]
        if self._way.drops is not None:
            now = time.monotonic()
            kept = [hint for hint in hints if not self._way.drops(hint, now)]
            self._stats.dropped += len(hints) - len(kept)
            hints = kept
        batch = split(hints) if stream.columns else Batch(hints, len(hints))
        source.extendleft(reversed(hints[len(batch.hints) :]))
        if source is self._queue:
            now = time.monotonic()
            for hint in batch.hints:
                self._ledger.enter(hint, now)
        return batch

    def _message(self, stream: _Stream, batch: Batch) -> hints_pb2.HintBatch:
        """What the batch is to be written into, on the books as sent. The lock is held, but for the first one."""
        self._seq += 1
        if batch.hints:
            stream.unanswered[self._seq] = batch
            self._stats.sent += len(batch.hints)
        out = hints_pb2.HintBatch(session=self._session, seq=self._seq)
        stream.sent[self._seq] = time.monotonic()
        return out

    def _message_again(self, stream: _Stream, batch: Batch, seq: int, now: float) -> hints_pb2.HintBatch:
        """The same message with those of its hints that can be written."""
        kept = Batch(writable(batch.hints), len(batch.hints))
        with self._changed:
            stream.unanswered[seq] = kept
            self._stats.dropped += len(batch.hints) - len(kept.hints)
        out = hints_pb2.HintBatch(session=self._session, seq=seq)
        encode_batch(kept, now, out)
        return out
