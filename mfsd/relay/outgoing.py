# SPDX-License-Identifier: Apache-2.0
"""Handing hints on to the daemons of other hosts, and their events back to the workers.

To each peer there is one link of the client SDK (mfsd.client.link): bounded, never waiting, reconnecting by itself,
saying again what is alive to a daemon that has lost it. What the sessions of all workers say goes over it as one
session, with their ids prefixed. Times are what is left when a message leaves, less what it takes to get there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from mfsd.client.link import Link
from mfsd.client.way import Way
from mfsd.ground.model import (
    INF,
    EndHint,
    Event,
    HintError,
    MarkHint,
    RequestHint,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)
from mfsd.relay.incoming import FULL

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from mfsd.engine.records import Session
    from mfsd.ground.model import Address, Hint, Selector
    from mfsd.relay.table import Peer, Table

QUEUE: Final = 8192
"""Hints that wait for one peer; the oldest go first."""
REMEMBERED: Final = 65_536
"""Transfers, and requests, of one session that are followed; the oldest go first."""
SEPARATOR: Final = "/"
HUNG_UP: Final = ("Socket closed", "Connection reset by peer")
"""What gRPC says of a server that ends the connection in the midst of the handshake, and does not say why."""


@dataclass(slots=True, eq=False)
class _Told:
    """What one session has said about other hosts."""

    session: Session
    prefix: str
    requests: OrderedDict[str, RequestHint] = field(default_factory=OrderedDict)
    """The latest word on each."""
    heard: dict[str, set[Peer]] = field(default_factory=dict)
    """Who has been told of a request."""
    transfers: OrderedDict[str, Peer] = field(default_factory=OrderedDict)
    marks: dict[Selector, tuple[Peer, MarkHint]] = field(default_factory=dict)


class Outgoing:
    """engine.elsewhere.Elsewhere. ``soon`` has the daemon's loop call something, from any thread."""

    def __init__(
        self,
        table: Table,
        name: str,
        credentials: Callable[[], grpc.ChannelCredentials],
        soon: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``name``: of this daemon, unique among those of all hosts. ``clock``: the engine's."""
        self._clock = clock
        self.table = table
        self._name = name
        self._credentials = credentials
        self._soon = soon
        self._links: dict[Peer, Link] = {}
        self._told: dict[Session, _Told] = {}
        self._by_prefix: dict[str, _Told] = {}
        self._next = 0

    # --- engine.elsewhere.Elsewhere -----------------------------------------------------------------------------------

    def sends(self, selector: Selector) -> bool:
        """See Elsewhere."""
        return self._peer(selector) is not None

    def take(self, session: Session, hint: Hint, now: float) -> bool:
        """See Elsewhere. What is said of a request is said here, too: it may have bytes of this host as well."""
        if isinstance(hint, TransferHint):
            return self._transfer(session, hint, now)
        if isinstance(hint, MarkHint):
            return self._mark(session, hint)
        if isinstance(hint, RequestHint):
            self._request(session, hint)
        elif isinstance(hint, EndHint):
            return self._end(session, hint)
        return False

    def ended(self, session: Session) -> None:
        """See Elsewhere."""
        told = self._told.pop(session, None)
        if told is None:
            return
        del self._by_prefix[told.prefix]
        for name, peer in told.transfers.items():
            self._say(peer, EndHint(What.TRANSFER, told.prefix + name, cancelled=True))
        for name, peers in told.heard.items():
            for peer in peers:
                self._say(peer, EndHint(What.REQUEST, told.prefix + name, cancelled=True))
        for selector, (peer, _) in told.marks.items():
            self._say(peer, MarkHint(selector, Stage.NONE))

    def has(self, host: Address, address: Address) -> bool:
        """The host at an address has that other one, too."""
        return self.table.sends(host, address)

    # --- hints --------------------------------------------------------------------------------------------------------

    def _peer(self, selector: Selector) -> Peer | None:
        if not isinstance(selector, TupleSelector) or selector.src is None:
            return None
        return self.table.of(selector.src)

    def _of(self, session: Session) -> _Told:
        told = self._told.get(session)
        if told is None:
            self._next += 1
            told = self._told[session] = _Told(session, f"{self._next:x}{SEPARATOR}")
            self._by_prefix[told.prefix] = told
        return told

    def _request(self, session: Session, hint: RequestHint) -> None:
        told = self._of(session)
        told.requests[hint.id] = hint
        told.requests.move_to_end(hint.id)
        if len(told.requests) > REMEMBERED:
            told.heard.pop(told.requests.popitem(last=False)[0], None)
        for peer in told.heard.get(hint.id, ()):
            self._say(peer, self._renamed(told, hint))

    @staticmethod
    def _renamed(told: _Told, hint: RequestHint) -> RequestHint:
        return replace(hint, id=told.prefix + hint.id, batch_id="")

    def _transfer(self, session: Session, hint: TransferHint, now: float) -> bool:
        peer = self._peer(hint.selector)
        if peer is None:
            return False
        told = self._of(session)
        if hint.id in told.transfers or hint.id in session.transfers:
            raise HintError("transfer.id", f"{hint.id!r} is announced already", "ids are unique within a session")
        request = told.requests.get(hint.request_id)
        if request is None and not hint.stage.ownerless:
            problem = f"no request {hint.request_id!r} in this session"
            raise HintError("transfer.request_id", problem, "announce it before its transfers")
        if min(hint.deadline, INF if request is None else request.deadline) <= now:
            return True  # nothing that the other daemon could do would help any more
        if request is not None and peer not in told.heard.setdefault(request.id, set()):
            told.heard[request.id].add(peer)
            self._say(peer, self._renamed(told, request))
        owner = "" if request is None else told.prefix + request.id
        name = told.prefix + hint.id
        self._say(peer, replace(hint, id=name, request_id=owner, batch_id="", position=0))
        told.transfers[hint.id] = peer
        if len(told.transfers) > REMEMBERED:
            told.transfers.popitem(last=False)
        return True

    def _mark(self, session: Session, hint: MarkHint) -> bool:
        peer = self._peer(hint.selector)
        if peer is None:
            return False
        told = self._of(session)
        if hint.stage is Stage.NONE:
            told.marks.pop(hint.selector, None)
        else:
            told.marks[hint.selector] = peer, hint
        self._say(peer, hint)
        return True

    def _end(self, session: Session, hint: EndHint) -> bool:
        told = self._told.get(session)
        if told is None:
            return False
        renamed = replace(hint, id=told.prefix + hint.id, written=())
        if hint.what is What.TRANSFER:
            peer = told.transfers.pop(hint.id, None)
            if peer is not None:
                self._say(peer, renamed)
            return peer is not None
        if hint.what is What.REQUEST:
            told.requests.pop(hint.id, None)
            for peer in told.heard.pop(hint.id, ()):
                self._say(peer, renamed)
        return False

    # --- links --------------------------------------------------------------------------------------------------------

    def _say(self, peer: Peer, hint: Hint) -> None:
        link = self._links.get(peer)
        if link is None:
            way = Way(self._credentials, peer.options, correct=True, drops=self._late)
            link = self._links[peer] = Link(self._name, peer.target, QUEUE, FULL, self._heard, None, way)
        # Links go by this process's clock, the engine by the kernel's: in a time namespace they differ.
        ahead = time.monotonic() - self._clock()
        if isinstance(hint, TransferHint):
            hint = replace(hint, deadline=hint.deadline + ahead, hold_until=hint.hold_until + ahead)
        elif isinstance(hint, RequestHint):
            hint = replace(hint, deadline=hint.deadline + ahead)
        link.put(hint)

    def _late(self, hint: Hint, now: float) -> bool:
        """It is about a deadline that has passed while it waited. In a link's thread."""
        deadline = hint.deadline if isinstance(hint, TransferHint | RequestHint) else INF
        if isinstance(hint, TransferHint):
            prefix, separator, name = hint.request_id.partition(SEPARATOR)
            told = self._by_prefix.get(prefix + separator)
            request = None if told is None else told.requests.get(name)
            if request is not None and request.deadline <= self._clock():
                return True
        return deadline <= now

    def _heard(self, event: Event) -> None:
        """A peer tells something; in its link's thread."""
        self._soon(lambda: self._tell(event))

    def _tell(self, event: Event) -> None:
        prefix, separator, request = event.request_id.partition(SEPARATOR)
        other, separated, transfer = event.transfer_id.partition(SEPARATOR)
        told = self._by_prefix.get((prefix or other) + (separator or separated))
        if told is not None:
            told.session.tell(replace(event, request_id=request, transfer_id=transfer))

    def connected(self) -> set[Peer]:
        """Those to whom there is a connection."""
        return {peer for peer, link in self._links.items() if link.stats().connected}

    def look_after(self, table: Table) -> list[Link]:
        """Take what names stand for now; returns the links to who is gone, for the caller to close.

        Who comes back hears of marks again, and of requests with their next transfer.
        """
        before, here = {*self.table.peers.values()}, {*table.peers.values()}
        self.table = table
        gone, new = before - here, here - before
        for told in self._told.values() if gone or new else ():
            for peers in told.heard.values():
                peers.difference_update(gone)
            for name in [n for n, peer in told.transfers.items() if peer in gone]:
                del told.transfers[name]
            for peer, hint in told.marks.values():
                if peer in new:
                    self._say(peer, hint)
        return [self._links.pop(p) for p in list(self._links) if p not in here]

    def states(self) -> list[str]:
        """Peers that can't be reached, in words."""
        return [
            f"relay: no connection to {p.name or p.address} ({p.target}){_cause(p, link.why_not)}"
            for p, link in self._links.items()
            if not link.stats().connected
        ]

    def close(self) -> None:
        """Idempotent."""
        for link in self._links.values():
            link.close(0.0)
        self._links.clear()


def _cause(peer: Peer, details: str) -> str:
    """What of gRPC's words on a failure says why; empty: nothing."""
    cause = details.rpartition("last error: ")[2].rpartition(f"{peer.target}: ")[2].removesuffix(": OK")
    if cause.endswith(HUNG_UP):
        cause += "; perhaps since it does not accept our certificate, which may have expired"
    return f": {cause}" if cause else ""
