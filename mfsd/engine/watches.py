# SPDX-License-Identifier: Apache-2.0
"""Selectors that stay true: what a session named by addresses, ports or process, for every connection that matches.

A watch lives until its session ends or nothing has used it for its time to live. The kernel is told of it, so that a
new connection is in its band from the first packet on; the ones that are open already are looked for once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.engine.records import Watch
from mfsd.engine.slots import NS
from mfsd.ground.model import (
    CookieSelector,
    Endpoints,
    HintError,
    ProcessSelector,
    RuleSelector,
    Selector,
    TupleSelector,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.records import Session
    from mfsd.engine.settings import LimitsConfig
    from mfsd.engine.sockets import Socket, Sockets
    from mfsd.ground.model import Address

UNSEEN_S: Final = 1.0
"""A watch that has matched nothing for so long is worth a notice."""
FALLBACK_S: Final = 0.25
"""How often sockets are searched where the kernel doesn't tell of them."""


class Watches:
    """All watches, arranged so that a new connection finds those that mean it without trying all."""

    def __init__(self, books: Books, sockets: Sockets, lanes: int, limits: LimitsConfig) -> None:
        self._books = books
        self.limits = limits
        self._sockets = sockets
        self._lanes = lanes
        self._by_peer: dict[Address | None, dict[Watch, None]] = {}
        """By exact remote address; None: those that name none."""
        self._same: dict[Selector, list[Watch]] = {}
        """Several sessions may name the same; those of one user the kernel can't tell apart."""
        self._to_look: dict[Selector, None] = {}
        """Selectors whose open connections are to be searched for."""
        self._looking: set[Selector] = set()
        self._next_look = 0.0
        self._not_before = 0.0

    def __len__(self) -> int:
        return sum(len(w) for w in self._by_peer.values())

    @property
    def looking(self) -> bool:
        """Answers to searches are still to come."""
        return bool(self._to_look or self._looking)

    # --- life ---------------------------------------------------------------------------------------------------------

    def get(self, session: Session, selector: Selector, band: int, expires: float, now: float) -> Watch:
        """The session's watch on a selector, opened if need be; new connections begin in ``band``.

        Raises HintError when there are too many.
        """
        watch = session.watches.get(selector)
        if watch is None:
            self._bound(session)
            session.user.selectors += 1
            self._books.everybody.selectors += 1
            watch = session.watches[selector] = Watch(session, selector, since=now, band=-1)
            self._by_peer.setdefault(_peer(selector), {})[watch] = None
            self._same.setdefault(selector, []).append(watch)
            self._to_look[selector] = None
        if watch.band != band or watch.expires < expires:
            # Told well ahead of time, so that a watch in constant use is not told again and again.
            watch.band, watch.expires = band, expires + (expires - now)
            self._tell(selector, session.only)
        return watch

    def _tell(self, selector: Selector, only: int) -> None:
        """The kernel does what is best for those who share a selector, for as long as any of them wants it."""
        same = [w for w in self._same[selector] if w.session.only == only]
        band, expires = min(w.band for w in same), max(w.expires for w in same)
        self._sockets.watch(selector, only, band, self._lanes, int(expires * NS))

    def _bound(self, session: Session) -> None:
        user, everybody = session.user, self._books.everybody
        for whose, have, limit in (
            (f"user {user.uid} has", user.selectors, "max_selectors_per_user"),
            ("all users together have", everybody.selectors, "max_selectors"),
        ):
            if have >= getattr(self.limits, limit):
                raise HintError(
                    "selector",
                    f"{whose} {have} selectors already",
                    f"name connections by cookie, or ranges of ports; or raise limits.{limit}",
                    exhausted=True,
                )

    def end(self, watch: Watch) -> None:
        """Nobody wants it any more. Its connections are no business of this class."""
        del watch.session.watches[watch.selector]
        watch.session.user.selectors -= 1
        self._books.everybody.selectors -= 1
        peer = _peer(watch.selector)
        del self._by_peer[peer][watch]
        if not self._by_peer[peer]:
            del self._by_peer[peer]
        self._to_look.pop(watch.selector, None)
        selector, only = watch.selector, watch.session.only
        same = self._same[selector]
        same.remove(watch)
        if any(w.session.only == only for w in same):
            self._tell(selector, only)
        else:
            self._sockets.unwatch(selector, only)
        if not same:
            del self._same[selector]

    def expired(self, now: float) -> list[Watch]:
        """Those that nothing has used for their time to live, and that no mark holds."""
        return [
            w for ws in self._by_peer.values() for w in ws if w.expires < now and w.mark is None and not w.stream_in_use
        ]

    def unseen(self, now: float) -> list[Watch]:
        """Those that have not matched anything since they were opened, though they had time to."""
        return [w for ws in self._by_peer.values() for w in ws if not w.seen and w.since + UNSEEN_S < now]

    # --- matching -----------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Have the open connections of new watches searched for; where the kernel tells of none, of all again."""
        if not self._sockets.tells and now >= self._next_look and not self._looking:
            self._next_look = now + FALLBACK_S
            self._to_look.update((w.selector, None) for ws in self._by_peer.values() for w in ws)
        if self._to_look and not self._looking and now >= self._not_before:
            wanted, self._to_look = list(self._to_look), {}
            self._looking.update(wanted)
            self._sockets.look(wanted)

    def failed(self, selector: Selector, now: float) -> None:
        """A search has failed: try again a little later, if anybody still wants to know."""
        self._looking.discard(selector)
        self._not_before = now + FALLBACK_S
        if selector in self._same:
            self._to_look[selector] = None

    def named(self, selector: Selector) -> Sequence[Watch]:
        """The watches that want an answer to a search."""
        return tuple(self._same.get(selector, ()))

    def answered(self, selector: Selector) -> None:
        """They have it."""
        self._looking.discard(selector)
        if selector not in self._to_look:  # else one of them was opened after the search had begun
            for watch in self._same.get(selector, ()):
                watch.looked = True

    @staticmethod
    def may(watch: Watch, socket: Socket) -> bool:
        """A session's selectors mean its user's sockets only, unless it may speak for all; nobody's once it is over."""
        return watch.session.only in (-1, socket.uid) and not watch.session.over

    def to_try(self, socket: Socket) -> int:
        """How many selectors ``matching`` tries."""
        return sum(len(self._by_peer.get(peer, ())) for peer in (socket.endpoints.dst, None))

    def matching(self, socket: Socket) -> Iterable[Watch]:
        """The watches that mean a connection."""
        for peer in (socket.endpoints.dst, None):
            for watch in self._by_peer.get(peer, ()):
                if self.means(watch, socket):
                    yield watch

    def means(self, watch: Watch, socket: Socket) -> bool:
        """Whether a watch means a connection."""
        selector, e = watch.selector, socket.endpoints
        if not self.may(watch, socket):
            return False
        if isinstance(selector, TupleSelector):
            return selector.covers(e)
        if isinstance(selector, ProcessSelector):
            return selector.covers(e) and self._sockets.descends(socket.pid, selector.pid)
        if isinstance(selector, RuleSelector):
            return selector.covers(e) and self._sockets.made_by(socket, selector.maker)
        return isinstance(selector, CookieSelector) and selector.cookie == socket.cookie


def _peer(selector: Selector) -> Address | None:
    return selector.dst if isinstance(selector, TupleSelector) else None


def exact_endpoints(selector: Selector) -> Endpoints | None:
    """What an exact selector names; None for every other."""
    if isinstance(selector, TupleSelector) and selector.exact and selector.src is not None:
        return Endpoints(selector.src, selector.sport.first, selector.dst, selector.dport.first, selector.protocol)
    return None
