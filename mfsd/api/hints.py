# SPDX-License-Identifier: Apache-2.0
"""The Hints service: what workers say, handed to the engine one hint at a time.

Everything runs on the daemon's one event loop, together with the engine: there are no threads and no locks around it.
A batch gives way only between hints, when it takes long, and the next one of its stream waits for it, so a stream's
replies and the engine's state are always in the order of the batches. A bad hint costs only itself. A reply is sent
when the kernel obeys what it answers: after the engine's next tick, for which all the batches that have come before it
wait together.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from google.rpc import code_pb2

from mfsd.api import advice, columns, errors
from mfsd.api.access import by_certificate, peer_of
from mfsd.api.answers import SETTLE_S, Answer, Answers, drain
from mfsd.api.turns import LATELY_S, Lines, Turn
from mfsd.api.whole import Large
from mfsd.ground.logs import Seldom
from mfsd.ground.model import HintError, MarkHint, ProgressHint, TransferHint
from mfsd.ground.wire import LASTING, OWN
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
    from typing import Protocol

    import grpc

    from mfsd.api.decode import Decoder
    from mfsd.api.identity import Identities, Peer
    from mfsd.engine.engine import Engine
    from mfsd.engine.records import Session
    from mfsd.ground.model import Address

    Context = grpc.aio.ServicerContext[Any, Any]

    class Ticks(Protocol):
        """When the engine has ticked (mfsd.daemon.ticker.Ticker)."""

        count: int

        def poke(self, *, waiting: bool = False, who: int = ...) -> None:
            """Hints have come: tick soon. ``waiting``: nothing more comes from there before. ``who``: has sent them."""
            ...

        async def ticked(self) -> None:
            """Return after the next tick, or soon anyway."""
            ...


LOOK_S: Final = 0.1
"""A reply waits for a search of open connections no longer than this."""
ROW: Final = -1
"""Instead of a hint's index: it was a row of columns."""

log = structlog.get_logger(__name__)


class HintsService(hints_pb2_grpc.HintsServicer):
    """Serves mfsd.v1.Hints."""

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        identities: Identities,
        ticks: Ticks,
        *,
        anonymous: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``anonymous``: who has no token is believed."""
        self.engine = engine
        self.anonymous = anonymous
        self.decoder = decoder
        self._identities = identities
        identities.ended = self._gone
        self._ticks = ticks
        self.clock = clock
        self._seldom = Seldom()
        self.elsewhere: Callable[[Address, Address], Awaitable[pb.Advice]] | None = None
        """What another host's daemon says of its way to an address: (there, that host)."""
        self._latest = self._before = ("", 0.0)
        """The session that has sent something last, the one before it, and when."""
        self._lines = Lines()

    # --- one batch ----------------------------------------------------------------------------------------------------

    async def apply(
        self, batch: pb.HintBatch, peer: Peer | None, *, alone: bool = False, lasting: bool = False
    ) -> Answer:
        """Apply a batch when it is the turn of the peer's user; see _apply."""
        async with self._lines.turn(-1 if peer is None else peer.uid) as turn:
            return await self._apply(batch, peer, turn, alone=alone, lasting=lasting)

    async def _apply(self, batch: pb.HintBatch, peer: Peer | None, turn: Turn, *, alone: bool, lasting: bool) -> Answer:
        """Apply a batch that ``peer`` says. Raises HintError or errors.Refused if no part of it can be.

        ``alone``: the peer waits for the answer before it says more. Others have their turn when it takes long.
        ``lasting``: its session is to outlive the peer.
        """
        rows, steps = len(batch.transfers.ids), len(batch.progress.batch_ids)
        size = len(batch.hints) + rows + steps
        self.decoder.check(size)
        engine, now = self.engine, self.clock()
        session = self._session(batch.session, peer, now, lasting=lasting)
        self._heard(session.name)
        engine.hear(now)
        if batch.seq == 1 and not alone:
            session.heard = 0  # what is counted is another client's, or another stream's of one that begins anew
        reply = pb.HintReply(seq=batch.seq, epoch=engine.epoch, takes_columns=True, heard=session.heard)
        answer, rejected = Answer(session, reply, now, self._ticks.count), 0
        if batch.hints:
            rejected += await self._singly(batch, answer, turn, now)
        if steps:
            rejected += await self._progress(batch.progress, answer, turn, now)
        if rows:
            rejected += await self._transfers(batch.transfers, answer, turn, now)
        answer.here |= bool(steps or rows)
        if size and not alone:
            session.heard = batch.seq
        reply.accepted = size - rejected
        counters = engine.books.counters
        counters.hints_accepted += size - rejected
        counters.hints_rejected += rejected
        if session.events:
            drain(session, reply)
        if reply.accepted and answer.here:
            self._ticks.poke(waiting=alone, who=session.uid)
        return answer

    async def Advise(self, request: pb.AdviseRequest, context: Context) -> pb.AdviseReply:
        """What paths can bear."""
        try:
            peer = self._peer(context)
            uid = -1 if peer is None else peer.uid
            async with self._lines.turn(uid) as turn:
                ways, here = advice.ways(request), {}
                for i, (dst, src) in enumerate(ways):
                    if time.perf_counter() > turn.until:
                        await turn.give(contended=self._lines.contended(uid))
                    if src is None or advice.ours(src):
                        here[i] = dst
                said = dict(zip(here, advice.answers(self.engine, here.values(), self.clock()), strict=True))
        except (HintError, errors.Refused) as e:
            await errors.abort(context, e)
        far = [i for i in range(len(ways)) if i not in here]
        said |= zip(far, await asyncio.gather(*(self._elsewhere(*ways[i]) for i in far)), strict=True)
        return pb.AdviseReply(advice=[said[i] for i in range(len(ways))])

    async def _elsewhere(self, dst: Address, src: Address | None) -> pb.Advice:
        """What another host says of a path from it."""
        if self.elsewhere is None or src is None:
            return pb.Advice()
        return await self.elsewhere(dst, src)

    def _session(self, name: str, peer: Peer | None, now: float, *, lasting: bool) -> Session:
        """The session of that name, if it is the peer's. Raises HintError or errors.Refused."""
        if peer is not None and peer.gone:
            raise errors.Refused(code_pb2.UNAUTHENTICATED, "the connection that its token was given on is closed")
        if name.startswith(OWN):
            raise errors.Refused(
                code_pb2.PERMISSION_DENIED,
                f"session {name!r} would be mfsd's own, as all that begin with {' or '.join(OWN)}; choose another name",
            )
        known = self.engine.books.sessions.get(name)
        if known is not None and known.lasting and lasting:
            known.maker = peer  # one operator after the other
        if known is not None and known.maker is not peer:
            whose = "somebody without a token" if known.maker is None else f"process {known.pid} of user {known.uid}"
            raise errors.Refused(
                code_pb2.PERMISSION_DENIED, f"session {name!r} is that of {whose}; choose another name"
            )
        if peer is None:
            return self.engine.session(name, now)
        session = self.engine.session(name, now, pid=peer.pid, uid=peer.uid, only=peer.only, maker=peer)
        if known is None and lasting:
            session.lasting = True
        elif known is None:
            sessions = self.engine.books.sessions
            peer.sessions = [s for s in peer.sessions if sessions.get(s.name) is s] + [session]
        return session

    async def _singly(self, batch: pb.HintBatch, answer: Answer, turn: Turn, now: float) -> int:
        """Apply hints one by one; how many were rejected."""
        engine, index, hints = self.engine, 0, batch.hints
        while index < len(hints):
            if answer.session.over:
                raise _ended(answer.session)
            engine.gather(now, on=True)
            try:
                index = self._some(hints, index, turn.until, answer, now)
            finally:
                engine.gather(now, on=False)
            if index < len(hints):
                await turn.give(contended=self._contended(answer.session.name))
        return len(answer.reply.rejected)

    def _some(self, hints: Sequence[pb.Hint], index: int, until: float, answer: Answer, now: float) -> int:
        """Apply hints from this index on, for a turn; returns the index of the next one."""
        session, reply, clock = answer.session, answer.reply, time.perf_counter
        decode, apply, watches = self.decoder.decode, self.engine.apply, session.watches
        while index < len(hints) and clock() < until:
            message = hints[index]
            try:
                hint = decode(message, now)
                answer.here |= apply(session, hint, now)
            except HintError as e:
                reply.rejected.add(index=index, status=errors.rejection(e, _full_path(e.field, message)))
            except Exception as e:  # noqa: BLE001 - what one hint trips over must cost neither the others nor the stream
                reply.rejected.add(index=index, status=self._failed(f"hints[{index}]", answer, e))
            else:
                if watches and isinstance(hint, (TransferHint, MarkHint)):
                    self._note(answer, index, hint, now)
            index += 1
        return index

    def _contended(self, name: str) -> bool:
        """Another session has sent something lately."""
        other, at = self._latest if self._latest[0] != name else self._before
        return other != "" and time.perf_counter() - at < LATELY_S

    def _heard(self, name: str) -> None:
        if self._latest[0] != name:
            self._before = self._latest
        self._latest = name, time.perf_counter()

    @staticmethod
    def _note(answer: Answer, index: int, hint: TransferHint | MarkHint, now: float) -> None:
        watch = answer.session.watches.get(hint.selector)
        if watch is not None and (isinstance(hint, MarkHint) or (watch.since == now and not watch.looked)):
            answer.fresh.setdefault(watch, index)

    async def _progress(self, message: pb.ProgressColumns, answer: Answer, turn: Turn, now: float) -> int:
        """Apply progress by columns; how many rows were rejected."""
        part, rejected = pb.Rejection.PROGRESS, 0
        try:
            hints = list(columns.progress(self.decoder, message, now))
        except HintError as e:
            return _whole(answer.reply, part, len(message.batch_ids), e)
        for row, hint in enumerate(hints):
            if time.perf_counter() > turn.until:
                await turn.give(contended=self._contended(answer.session.name))
            if answer.session.over:
                raise _ended(answer.session)
            error = errors.rejection(hint) if isinstance(hint, HintError) else self._step(answer, hint, row, now)
            if error is not None:
                rejected += 1
                answer.reply.rejected.add(index=row, part=part, status=error)
        return rejected

    def _step(self, answer: Answer, hint: ProgressHint, row: int, now: float) -> pb.Error | None:
        try:
            self.engine.apply(answer.session, hint, now)
        except HintError as e:
            return errors.rejection(columns.of_progress_row(e, row))
        except Exception as e:  # noqa: BLE001 - as above
            return self._failed(f"progress[{row}]", answer, e)
        return None

    async def _transfers(self, message: pb.TransferColumns, answer: Answer, turn: Turn, now: float) -> int:
        """Apply transfers by columns; how many rows were rejected."""
        part, session = pb.Rejection.TRANSFERS, answer.session
        try:
            decoded, bad = columns.transfers(self.decoder, message, now)
            refused = self.engine.transfers(session, decoded, now)
        except HintError as e:
            return _whole(answer.reply, part, len(message.ids), e)
        except Exception as e:  # noqa: BLE001 - as above
            answer.reply.rejected.add(part=part, rows=len(message.ids), status=self._failed("transfers", answer, e))
            return len(message.ids)
        bad += [(row, columns.of_transfer_row(e, row)) for row, e in refused]
        for row, error in sorted(bad, key=lambda one: one[0]):
            if time.perf_counter() > turn.until:
                await turn.give(contended=self._contended(session.name))
            answer.reply.rejected.add(index=row, part=part, status=errors.rejection(error))
        for selector in decoded.selectors:
            watch = None if selector is None else session.watches.get(selector)
            if watch is not None and watch.since == now and not watch.looked:
                answer.fresh.setdefault(watch, ROW)
        return len(bad)

    def _failed(self, what: str, answer: Answer, error: Exception) -> pb.Error:
        """Log a fault of ours; what the worker is told."""
        if self._seldom("hint"):
            log.error("hint failed", what=what, session=answer.session.name, seq=answer.reply.seq, exc_info=error)
        return errors.failure(what)

    # --- when the kernel obeys ----------------------------------------------------------------------------------------

    async def settle(self, answer: Answer) -> pb.HintReply:
        """The reply, complete, once the kernel obeys what it answers; or when that takes too long."""
        if answer.reply.accepted and answer.here:
            fresh = answer.fresh
            until = answer.at + (LOOK_S if fresh else SETTLE_S)
            while self._ticks.count <= answer.tick or not all(watch.looked for watch in fresh):
                if self.clock() >= until:
                    break
                await self._ticks.ticked()
            for watch, index in fresh.items():
                if watch.looked and index != ROW:
                    answer.reply.matched.add(index=index, connections=len(watch.conns))
        return answer.reply

    # --- calls --------------------------------------------------------------------------------------------------------

    def _gone(self, peer: Peer) -> None:
        """A client has closed its connection, or has ended."""
        now = self.clock()
        for session in peer.sessions:
            self.engine.end_session(session, now)
        peer.sessions.clear()
        self._ticks.poke()

    def _peer(self, context: Context) -> Peer | None:
        """Who calls; None: somebody who may say what he likes without telling who he is. Raises errors.Refused."""
        found = peer_of(self._identities, context)
        if found is None and not self.anonymous and not by_certificate(context):
            raise errors.Refused(
                code_pb2.UNAUTHENTICATED,
                "it does not know who speaks: connect to the socket ending in .id first (the client library does; both "
                "sockets must be in reach, so give containers the folder), or set daemon.anonymous to believe anybody",
            )
        return found

    async def _whole(self, request: pb.HintBatch | Large, peer: Peer | None) -> pb.HintBatch:
        """A batch that has been parsed; a large one is when it is the turn of the peer's user."""
        if not isinstance(request, Large):
            return request
        uid = -1 if peer is None else peer.uid
        async with self._lines.turn(uid) as turn:
            return await request.parsed(self.decoder.limits, turn, lambda: self._lines.contended(uid))

    async def Send(self, request: pb.HintBatch | Large, context: Context) -> pb.HintReply:
        """Unary call; see proto/mfsd/v1/hints.proto."""
        try:
            peer = self._peer(context)
            asked = any(key == LASTING for key, _ in context.invocation_metadata() or ())
            lasting = asked and peer is not None and peer.operator
            batch = await self._whole(request, peer)
            return await self.settle(await self.apply(batch, peer, alone=True, lasting=lasting))
        except (HintError, errors.Refused) as e:
            await errors.abort(context, e)

    async def Stream(  # type: ignore[override]  # grpc.aio takes writers, too
        self, request_iterator: AsyncIterable[pb.HintBatch | Large], context: Context
    ) -> None:
        """Streaming call: one reply per batch, in order, and events in between."""
        answers = Answers(context, self.settle, self.engine.epoch, self.clock)
        try:
            peer = self._peer(context)
            async for request in request_iterator:
                batch = await self._whole(request, peer)
                answers.check(batch.session)
                await answers.put(await self.apply(batch, peer))
            await answers.finish()
        except (HintError, errors.Refused) as e:
            await answers.finish()
            await errors.abort(context, e)
        finally:
            await answers.close()


def _ended(session: Session) -> errors.Refused:
    return errors.Refused(code_pb2.UNAUTHENTICATED, f"session {session.name!r} has ended meanwhile")


def _whole(reply: pb.HintReply, part: pb.Rejection.Part.ValueType, rows: int, error: HintError) -> int:
    """Reject all rows of columns for one reason; how many they are."""
    reply.rejected.add(part=part, rows=rows, status=errors.rejection(error))
    return rows


def _full_path(field: str, hint: pb.Hint) -> str:
    """Path from the hint down; what resolves selectors does not know in which kind of hint they stood."""
    return f"{hint.WhichOneof('body')}.{field}" if field.startswith("selector") else field
