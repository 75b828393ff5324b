# SPDX-License-Identifier: Apache-2.0
"""Plain TCP as a transport: framed bytes over kept connections, whose sockets hints name by their cookies.

``Conduits`` plays all ranks of an instance in one process, so what they have to agree upon is known. ``Sockets`` plays
one rank, or one store, in a process of its own: who is to send cached KV and when a pass begins goes over unix sockets,
which stand for the management network.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.ground.model import Stage
from mfsd.lab.arms import arm_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from mfsd.lab.requests import Request
    from mfsd.lab.serving.forward import Inbox, Log
    from mfsd.lab.serving.hinter import Hinter
    from mfsd.lab.serving.management import Management
    from mfsd.lab.serving.wire import Ends, Sender
    from mfsd.lab.settings import Settings

CROSS: Final = 65_536
"""Bytes of cross traffic at a time."""


@dataclass(slots=True)
class _Awaited:
    """So many frames, some of which may come before anybody waits."""

    come: int = 0
    last: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def frame(self, at: float, wanted: int) -> None:
        """One more."""
        self.come += 1
        self.last = at
        if self.come == wanted:
            self.over.set()


def least(senders: Sequence[Sender]) -> Sender:
    """The one with the fewest bytes on their way."""
    return min(senders, key=lambda s: s.queued)


def receive_kv(settings: Settings, work: Sequence[Request], ends: Ends, log: Log) -> None:
    """Be the decode hosts: a request has its first token when all of its KV is here."""
    left = {r.id: settings.scaled.rounds * len(r.ranks(settings)) for r in work}

    def on_frame(request: int, _step: int, at: float) -> None:
        left[request] -= 1
        if not left[request]:
            log.done[request] = at

    ends.deliver |= {(Stage.P2D, i): on_frame for i in range(settings.instances)}


async def cross_traffic(settings: Settings, ends: Ends) -> None:
    """Unhinted bytes at a steady rate, if the arm has any, until cancelled; what does not fit waits."""
    share, senders = arm_of(settings.arm).background, ends.group(Stage.NONE, 0)
    while senders:
        for sender in senders:
            if sender.queued < 8 * CROSS:
                sender.put(0, 0, CROSS)
        await asyncio.sleep(CROSS * settings.prefill / (share * settings.rate_of("d0").bytes_per_s))


class Conduits:
    """One instance, with all its ranks and the hosts from which it fetches. See Transport."""

    def __init__(
        self, index: int, settings: Settings, local: Collection[str], ends: Ends, hinter: Hinter, log: Log
    ) -> None:
        """``ends`` are connected; ``local`` hosts are played here."""
        self._index, self._settings, self._local = index, settings, local
        self._ends, self._hinter, self._log = ends, hinter, log
        self._scaled = settings.scaled
        self._group = ends.group(Stage.COLLECTIVE, index)
        for sender in self._group:
            hinter.collective(sender.conduit.src, sender.cookie)
        ends.deliver |= {(Stage.KV_REUSE, index): self._on_kv, (Stage.COLLECTIVE, index): self._on_exchange}
        self._fetches: dict[int, int] = {}
        """Request -> pieces per step: one from each holder to each rank."""
        self._cached: dict[tuple[int, int], _Awaited] = collections.defaultdict(_Awaited)
        """By request and step."""
        self._exchanged: dict[int, _Awaited] = collections.defaultdict(_Awaited)
        self._exchanges = 0
        self._p2d: dict[int, list[Sender]] = {}
        """Request -> what takes its KV to the decode host, from each of its ranks: its bytes keep their order."""

    def _on_kv(self, request: int, step: int, at: float) -> None:
        self._cached[request, step].frame(at, self._fetches[request])

    def _on_exchange(self, number: int, _step: int, at: float) -> None:
        # As many come as are sent: every rank here hears of every other one.
        self._exchanged[number].frame(at, len(self._group))

    async def agree(self, inbox: Inbox) -> tuple[list[Request], int]:
        """See Transport."""
        await inbox.until(lambda: len(inbox))
        batch = inbox.take()
        return batch, sum(r.new for r in batch)

    def fetch(self, request: Request) -> None:
        """See Transport."""
        self._fetches[request.id] = len(request.held) * len(request.ranks(self._settings))
        for holder in request.held:
            self._ask(holder, request)

    def _ask(self, holder: str, request: Request) -> None:
        self.serve(holder, request)

    def serve(self, holder: str, request: Request) -> None:
        """Send what a host has of a request's cached KV, step by step."""
        ranks = request.ranks(self._settings)
        senders = [least(self._ends.of(Stage.KV_REUSE, self._index, holder, rank)) for rank in ranks]
        size = max(self._scaled.kv(request.held[holder]) // len(ranks), 1)
        over = _after(len(senders), functools.partial(self._hinter.sent, holder, request))
        for step in range(self._scaled.rounds):
            for sender in senders:
                self._send(sender, request, step, size, over)

    async def fetched(self, request: Request, step: int) -> None:
        """See Transport."""
        await self._cached[request.id, step].over.wait()
        del self._cached[request.id, step]

    async def exchange(self, size: int) -> float:
        """See Transport."""
        number = self._exchanges
        self._exchanges += 1
        for sender in self._group:
            sender.put(number, 0, size)
        await self._exchanged[number].over.wait()
        return self._exchanged.pop(number).last

    def hand_over(self, request: Request, step: int) -> None:
        """See Transport."""
        senders = self._p2d.get(request.id)
        if senders is None:
            ranks, decode = request.ranks(self._settings), f"d{request.decode}"
            senders = [least(self._ends.of(Stage.P2D, self._index, rank, decode)) for rank in ranks]
            self._p2d[request.id] = senders
            self._log.conduit[request.id] = senders[0].conduit.number
        size = max(self._scaled.kv(request.tokens) // len(senders), 1)
        for sender in senders:
            self._send(sender, request, step, size, functools.partial(self._hinter.sent, sender.conduit.src, request))

    def _send(self, sender: Sender, request: Request, step: int, size: int, over: Callable[[], None]) -> None:
        """Announce a step's KV and send it; ``over`` is called after the last step's."""
        last = step == self._scaled.rounds - 1
        self._hinter.send(sender.conduit, sender.cookie, request, step, size)
        # Bytes retire transfers by themselves; only the last one of a request is worth a message.
        sender.put(request.id, step, size, over if last else None)


class Sockets(Conduits):
    """The ``local`` rank of an instance (or a store), others being played by other processes."""

    def __init__(self, *args: Any, management: Management, due: Callable[[Request], float]) -> None:
        """``due``: monotonic time of a request's deadline."""
        super().__init__(*args)
        self._management, self._due = management, due
        self._passes = 0
        self._begun: dict[int, list[int]] = collections.defaultdict(list)
        """Pass -> new tokens of each other rank that has begun it."""
        self.inbox: Inbox | None = None

    def _ask(self, holder: str, request: Request) -> None:
        self._management.send(holder, {"fetch": request.id, "instance": self._index})

    def asked(self, request: Request) -> None:
        """Another process wants cached KV from here: its deadline is news to the daemon of this host."""
        (here,) = self._local
        self._hinter.request([here], request, self._due(request) - time.monotonic())
        self.serve(here, request)

    def begun(self, number: int, tokens: int) -> None:
        """Another rank has begun a pass."""
        self._begun[number].append(tokens)
        if self.inbox is not None:
            self.inbox.stir()

    async def agree(self, inbox: Inbox) -> tuple[list[Request], int]:
        """See Transport. Who has requests begins; the others join with what they have by then."""
        self.inbox = inbox
        number = self._passes
        self._passes += 1
        await inbox.until(lambda: len(inbox) or self._begun[number])
        batch = inbox.take()
        mine = sum(r.new for r in batch)
        others = [rank for rank in self._settings.ranks if rank not in self._local]
        for rank in others:
            self._management.send(rank, {"begin": number, "tokens": mine, "instance": self._index})
        await inbox.until(lambda: len(self._begun[number]) == len(others))
        return batch, mine + sum(self._begun.pop(number))


def _after(times: int, then: Callable[[], None]) -> Callable[[], None]:
    """What calls ``then`` when it has been called so often."""
    left = times

    def one() -> None:
        nonlocal left
        left -= 1
        if not left:
            then()

    return one
