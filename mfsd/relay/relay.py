# SPDX-License-Identifier: Apache-2.0
"""Both directions together, with what they need: certificates, who the peers are, and room on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Final

import grpc
import structlog

from mfsd.api import pem
from mfsd.ground.logs import Seldom
from mfsd.ground.model import Maker, MarkHint, PortRange, RuleSelector, Stage
from mfsd.ground.units import host_port
from mfsd.relay.incoming import Incoming, RelayError
from mfsd.relay.outgoing import Outgoing
from mfsd.relay.papers import Papers
from mfsd.relay.table import LOOK_UP_S, Table
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.api.decode import Decoder
    from mfsd.engine.engine import Engine
    from mfsd.ground.model import Address
    from mfsd.relay.incoming import Poke
    from mfsd.relay.settings import RelayConfig
    from mfsd.relay.table import Peer

SESSION: Final = "mfsd:relay"
"""The session whose marks let hints between hosts go before KV."""
ADVICE_S: Final = 0.3
"""How long a peer's advice is waited for."""
ADVICE_KEPT_S: Final = 0.05

log = structlog.get_logger(__name__)


class Relay:
    """Made in the running loop; ``start`` it, and ``stop`` it."""

    def __init__(
        self,
        config: RelayConfig,
        engine: Engine,
        decoder: Decoder,
        poke: Poke,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock``: the engine's."""
        self._clock = clock
        self.config = config
        self._engine = engine
        loop = asyncio.get_running_loop()

        def soon(call: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call)

        table = Table(config.peers)
        name = f"{socket.gethostname()}:{engine.epoch:x}"
        self.outgoing = Outgoing(table, name, self._credentials, soon, clock)
        self.incoming = Incoming(engine, decoder, poke, self.outgoing.has, clock=clock)
        self.incoming.allow = config.allow
        self._task: asyncio.Task[None] | None = None
        self._seldom = Seldom()
        self._papers: Papers
        """From ``start`` on."""
        self._shown: grpc.ChannelCredentials
        """By the channels below; the same."""
        self._channels: dict[Peer, grpc.aio.Channel] = {}
        self._advice: dict[tuple[Address, Address], tuple[float, pb.Advice]] = {}
        self.port = 0
        """Where hints are taken; 0: nowhere."""

    def _credentials(self) -> grpc.ChannelCredentials:
        return self._papers.for_channels()

    async def start(self) -> None:
        """Look peers up, and open the endpoint. Raises RelayError."""
        c = self.config
        try:
            self._papers = Papers(*((f"relay.{name}", getattr(c, name)) for name in ("cert", "key", "ca")))
        except pem.PemError as e:
            raise RelayError(str(e)) from e
        self._shown = self._credentials()
        if self.config.listen is not None:
            self.port = await self.incoming.serve(self.config.listen, self._papers.for_server())
            log.info("relay", listen=self.config.listen, allow=list(self.config.allow))
        if self.config.peers:
            await self._look_up()
            self._engine.elsewhere = self.outgoing
            self._task = asyncio.create_task(self._keep_looking_up())
        self._make_room()

    def _make_room(self) -> None:
        """Hints and answers between hosts are small, and worth nothing if they wait behind what they are about."""
        ports = {host_port(p.split()[0])[1] for p in self.config.peers}
        selectors = [RuleSelector(Maker(), dport=PortRange(p, p)) for p in ports]
        if self.port:
            selectors.append(RuleSelector(Maker(), sport=PortRange(self.port, self.port)))
        now = self._clock()
        session = self._engine.session(SESSION, now, maker=self)
        for selector in selectors:
            self._engine.apply(session, MarkHint(selector, Stage.COLLECTIVE, gives_way=True), now)

    async def _look_up(self) -> None:
        connected, now = self.outgoing.connected(), time.monotonic()
        table = await asyncio.to_thread(self.outgoing.table.look_up, now, connected)
        before, self._shown = self._shown, await asyncio.to_thread(self._credentials)
        for problem in table.problems:
            if self._seldom(problem):
                log.warning("relay", problem=problem)
        gone = self.outgoing.look_after(table)
        for link in gone:
            await asyncio.to_thread(link.close, 0.0)  # joins its thread
        here = {*table.peers.values()}
        for peer in [p for p in self._channels if p not in here or self._shown is not before]:
            await self._channels.pop(peer).close(ADVICE_S)  # somebody may be asking

    async def _keep_looking_up(self) -> None:
        while True:
            await asyncio.sleep(LOOK_UP_S)
            try:
                await self._look_up()
            except Exception:  # and again
                if self._seldom("look up"):
                    log.exception("looking up peers failed")

    async def advice(self, dst: Address, src: Address) -> pb.Advice:
        """What another host's daemon says of its way to an address; unknown where it does not say so soon."""
        at, known = self._advice.get((dst, src), (0.0, pb.Advice()))
        peer, now = self.outgoing.table.of(src), time.monotonic()
        if peer is None or now - at < ADVICE_KEPT_S:
            return known if peer is not None else pb.Advice()
        channel = self._channels.get(peer)
        if channel is None:
            channel = grpc.aio.secure_channel(peer.target, self._shown, peer.options)
            self._channels[peer] = channel
        try:
            request = pb.AdviseRequest(paths=[pb.Path(dst=str(dst))])
            reply = await hints_pb2_grpc.HintsStub(channel).Advise(request, timeout=ADVICE_S)
        except grpc.RpcError:
            return pb.Advice()
        if len(self._advice) > len(self.outgoing.table.peers) * 256:
            self._advice.clear()
        found: pb.Advice = reply.advice[0] if reply.advice else pb.Advice()
        self._advice[dst, src] = now, found
        return found

    def notices(self) -> list[str]:
        """What an operator should know."""
        return [*self.outgoing.table.problems, *self.outgoing.states()]

    async def stop(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
        self._engine.elsewhere = None
        await self.incoming.stop()
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
        await asyncio.to_thread(self.outgoing.close)
