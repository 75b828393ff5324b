# SPDX-License-Identifier: Apache-2.0
"""Hints that the daemons of other hosts bring: who may, about what, and how they reach the engine.

The service is mfsd.v1.Hints on an endpoint of its own. Nobody is heard there whose certificate is not signed by our CA
(TLS sees to that), or does not name somebody on the list. A peer may speak only of bytes that go to itself. It can
not use up more than SESSIONS may (limits), and what it says ends by expiry, or when it has been gone for GRACE_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import grpc
import structlog
from google.rpc import code_pb2

from mfsd.api import advice, errors
from mfsd.api.answers import drain
from mfsd.ground.logs import Seldom
from mfsd.ground.model import EndHint, HintError, MarkHint, RequestHint, TransferHint, TupleSelector, on_the_wire
from mfsd.ground.wire import RELAYED
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Protocol

    from mfsd.api.decode import Decoder
    from mfsd.engine.engine import Engine
    from mfsd.engine.records import Session
    from mfsd.ground.model import Address, Hint

    Context = grpc.aio.ServicerContext[Any, Any]

    class Poke(Protocol):
        """Hints have come."""

        def __call__(self, *, waiting: bool = False) -> None:
            """Tick soon. ``waiting``: nothing more comes from there before."""
            ...


FULL: Final = 64
"""Hints in a message that is full: others wait behind it. After any other one its daemon has nothing more to say."""
GRACE_S: Final = 10.0
"""What a peer has said is kept for so long after its stream has ended: it says only what is new when it comes back."""
SESSIONS: Final = 4
"""Of one peer at a time, those that it has left lately included: a daemon has one, and another one when it restarts."""
STOP_S: Final = 0.2

log = structlog.get_logger(__name__)


class RelayError(RuntimeError):
    """The endpoint can't be opened."""


class Incoming(hints_pb2_grpc.HintsServicer):
    """See the module. ``owns(host, address)``: the host at an address has that other one, too."""

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        poke: Poke,
        owns: Callable[[Address, Address], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.allow: tuple[str, ...] = ()
        self._engine, self._decoder, self._poke, self._owns, self._clock = engine, decoder, poke, owns, clock
        self._seldom = Seldom()
        self._server: grpc.aio.Server | None = None
        self._gone: dict[str, asyncio.TimerHandle] = {}
        self._open: dict[str, int] = {}
        """Streams by session."""

    async def serve(self, listen: str, credentials: grpc.ServerCredentials) -> int:
        """Open the endpoint; its port. Raises RelayError."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        hints_pb2_grpc.add_HintsServicer_to_server(self, self._server)
        try:
            port = self._server.add_secure_port(listen, credentials)
        except RuntimeError as e:
            raise RelayError(f'relay.listen = "{listen}": can\'t be opened: {e}') from e
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Idempotent."""
        for timer in self._gone.values():
            timer.cancel()
        if self._server is not None:
            await self._server.stop(STOP_S)
            self._server = None

    # --- calls --------------------------------------------------------------------------------------------------------

    async def Stream(  # type: ignore[override]  # grpc.aio takes writers, too
        self, request_iterator: AsyncIterator[pb.HintBatch], context: Context
    ) -> None:
        """See the proto. A batch is answered when it has been applied, so that the peer knows how long it took."""
        name, host = await self._who(context)
        session: Session | None = None
        teller: asyncio.Task[None] | None = None
        lock = asyncio.Lock()
        try:
            async for batch in request_iterator:
                if session is None:
                    session = await self._session(name, batch.session, context)
                    teller = asyncio.create_task(self._tell(session, context, lock))
                reply = self._apply(session, host, batch)
                async with lock:
                    await context.write(reply)
        except HintError as e:
            await errors.abort(context, e)
        finally:
            if teller is not None:
                teller.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await teller
            if session is not None:
                self._left(session)

    async def Send(self, request: pb.HintBatch, context: Context) -> pb.HintReply:
        """One batch; the session ends when it has been silent for GRACE_S."""
        name, host = await self._who(context)
        session = await self._session(name, request.session, context)
        try:
            return self._apply(session, host, request)
        except HintError as e:
            await errors.abort(context, e)
        finally:
            self._left(session)

    async def Advise(self, request: pb.AdviseRequest, context: Context) -> pb.AdviseReply:
        """What our paths can bear."""
        await self._who(context)
        try:
            ways = advice.ways(request)
        except HintError as e:
            await errors.abort(context, e)
        return pb.AdviseReply(advice=advice.answers(self._engine, [dst for dst, _ in ways], self._clock()))

    # --- who ----------------------------------------------------------------------------------------------------------

    async def _who(self, context: Context) -> tuple[str, Address]:
        """Name and address of who calls, if it may; else the call ends."""
        names = _names(context.auth_context())
        name = next((n for n in names if any(_matches(n, a) for a in self.allow)), "")
        host = _host(context.peer())
        if not name or host is None:
            shown = ", ".join(names) or "nobody"
            if self._seldom(f"refused {shown}"):
                log.warning("relay: refused", certificate=names, peer=context.peer())
            why = f"{shown} may not bring hints here; relay.allow names who may"
            await errors.abort(context, errors.Refused(code_pb2.PERMISSION_DENIED, why))
        return name, host

    async def _session(self, name: str, said: str, context: Context) -> Session:
        theirs = f"{RELAYED}{name}:"
        full = f"{theirs}{said}"
        timer = self._gone.pop(full, None)
        if timer is not None:
            timer.cancel()
        elif full not in self._open and not self._make_room(theirs):
            have = HintError("session", f"{name} has {SESSIONS} open already", "end one of them", exhausted=True)
            await errors.abort(context, have)
        try:
            session = self._engine.session(full, self._clock(), maker=self)
        except HintError as e:
            await errors.abort(context, e)
        self._open[full] = self._open.get(full, 0) + 1
        return session

    def _make_room(self, theirs: str) -> bool:
        """For one more of a peer's sessions: of those that have been left the oldest go. False: there is none."""
        gone, open_now = ([one for one in some if one.startswith(theirs)] for some in (self._gone, self._open))
        for one in gone[: max(len(gone) + len(open_now) - SESSIONS + 1, 0)]:
            self._gone.pop(one).cancel()
            if (session := self._engine.books.sessions.get(one)) is not None:
                self._end(session)
        return len(open_now) < SESSIONS

    def _left(self, session: Session) -> None:
        self._open[session.name] -= 1
        if self._open[session.name]:
            return
        del self._open[session.name]
        self._gone[session.name] = asyncio.get_running_loop().call_later(GRACE_S, self._end, session)

    def _end(self, session: Session) -> None:
        self._gone.pop(session.name, None)
        self._engine.end_session(session, self._clock())

    # --- what ---------------------------------------------------------------------------------------------------------

    def _apply(self, session: Session, host: Address, batch: pb.HintBatch) -> pb.HintReply:
        """Raises HintError for a batch that is too large."""
        self._decoder.check(len(batch.hints))
        now = self._clock()
        if batch.seq == 1:
            session.heard = 0  # another link's
        reply = pb.HintReply(seq=batch.seq, epoch=self._engine.epoch, heard=session.heard)
        for index, message in enumerate(batch.hints):
            try:
                hint = self._decoder.decode(message, now)
                self._permit(hint, host)
                self._engine.ledger.apply(session, hint, now)  # never handed on again: it was for us
            except HintError as e:
                reply.rejected.add(index=index, status=errors.rejection(e))
            except Exception:  # what one hint trips over must cost neither the others nor the stream
                if self._seldom("failed"):
                    log.exception("relay: a hint failed")
                reply.rejected.add(index=index, status=errors.failure(f"hints[{index}]"))
            else:
                reply.accepted += 1
        session.seen = now
        if batch.hints:
            session.heard = batch.seq
        counters = self._engine.books.counters
        counters.hints_accepted += reply.accepted
        counters.hints_rejected += len(reply.rejected)
        drain(session, reply)
        if reply.accepted:
            self._poke(waiting=len(batch.hints) < FULL)
        return reply

    def _permit(self, hint: Hint, host: Address) -> None:
        """Raise HintError for what a peer may not say."""
        if isinstance(hint, RequestHint | EndHint):
            return
        if not isinstance(hint, TransferHint | MarkHint):
            raise HintError("hint", "is of a kind that does not cross hosts", "send requests, transfers and marks")
        where = "transfer.selector" if isinstance(hint, TransferHint) else "connection.selector"
        selector = hint.selector
        if not isinstance(selector, TupleSelector):
            raise HintError(where, "names no addresses", "name the connection by tuple: nothing else crosses hosts")
        if not self._owns(host, selector.dst):
            raise HintError(
                f"{where}.tuple.dst_addr",
                f"{selector.dst} is not {host}, which says so",
                "speak of bytes that go to yourself; name your other networks in relay.peers of this host",
            )

    async def _tell(self, session: Session, context: Context, lock: asyncio.Lock) -> None:
        """Write events as they come; those of a session that has several streams go to the latest."""
        told = asyncio.Event()
        told.set()  # some may wait already
        session.wake = told.set
        try:
            while await told.wait():
                told.clear()
                while session.events:
                    reply = pb.HintReply(epoch=self._engine.epoch)
                    drain(session, reply)
                    async with lock:
                        await context.write(reply)
        finally:
            if session.wake == told.set:
                session.wake = None


def _names(auth: Any) -> list[str]:
    """Names of a certificate: those it is for, else that of its subject."""
    found = [v.decode(errors="replace") for v in auth.get("x509_subject_alternative_name", ())]
    return found or [v.decode(errors="replace") for v in auth.get("x509_common_name", ())]


def _matches(name: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return name.partition(".")[2] == allowed[2:]
    return name == allowed


def _host(peer: str) -> Address | None:
    """Address of a gRPC peer: "ipv4:10.0.0.1:4711", "ipv6:%5Bfd00::1%5D:4711"."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return on_the_wire(ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0]))
