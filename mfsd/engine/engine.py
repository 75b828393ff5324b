# SPDX-License-Identifier: Apache-2.0
"""The engine: hints come in (ledger.py), levels go out (steering.py), and time passes (here).

``tick`` keeps house - expiry, selectors that wait for their sockets, delivery, sockets that are gone - and then steers.
One thread, no locks, no clock of its own: every call is given ``now`` (CLOCK_MONOTONIC seconds), so tests run it on a
fake clock.
"""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np

from mfsd.engine.books import Mark
from mfsd.engine.columns import Dense, HasRow
from mfsd.engine.ledger import Ledger
from mfsd.model import INF, Event, EventKind, Mode

R = TypeVar("R", bound=HasRow)

HOUSEKEEPING_S: Final = 0.1
"""How often expiry is looked at."""
SWEEP_S: Final = 1.0
"""How often idle connections are checked for sockets that are gone."""
SWEEP_BATCH: Final = 256
PENDING_S: Final = 0.02
"""How often selectors without a socket are tried again while one of them is young."""
PENDING_YOUNG_S: Final = 1.0
PENDING_OLD_S: Final = 0.25
"""How often when all are older: a look at all sockets of a busy host takes milliseconds."""
LINGER_S: Final = 5.0
"""A connection without transfers keeps its slot this long, since the next transfer usually follows."""


class Engine(Ledger):
    """The ledger with a sense of time, and what operators may ask of it."""

    _next_house = _next_sweep = 0.0
    _sweep_from = 0

    # --- time ---------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing to schedule: the daemon may tick slowly."""
        return not self.transfers.n and not self._pending and not self._dead

    @property
    def pending_selectors(self) -> int:
        """Rules that wait for their sockets."""
        return len(self._pending)

    def tick(self, now: float) -> None:
        """Do everything that time brings: house-keeping, delivery, levels, rescue."""
        for session in self._dead:
            self.end_session(session)
        self._dead.clear()
        if self._pending and now >= self._next_pending:
            young = now < self._pending_since + PENDING_YOUNG_S
            self._next_pending = now + (PENDING_S if young else PENDING_OLD_S)
            self._try_pending(now)
        for conn in self.connections.locate(now):
            self._drop_connection(conn, f"no socket has cookie {conn.cookie}")
        for transfer in self.steering.delivered(self.transfers, now):
            self._end_transfer(transfer, now, delivered=True)
        for conn in self.steering.take_gone():
            if conn.slot in self.connections.by_slot:
                self._drop_connection(conn, "its socket is gone")
        if now >= self._next_house:
            self._next_house = now + HOUSEKEEPING_S
            self._expire(now)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_S
            self._sweep()
        self.steering.steer(self, now)

    def _try_pending(self, now: float) -> None:
        expires = now + self.limits.default_ttl_s
        for selector, conns in self.connections.match_pending(self._pending, expires).items():
            for waiting in self._pending.pop(selector):
                if isinstance(waiting, Mark):
                    for conn in conns:
                        self._put_mark(waiting, conn)
                else:
                    self._found(waiting, conns)

    def _expire(self, now: float) -> None:
        """Forget what nobody completed, cancelled or renewed in time."""
        for transfer in self._expired(self.transfers, now):
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(EventKind.EXPIRED, owner, transfer.id, "not completed in its time to live"))
            self._end_transfer(transfer, now, delivered=False)
            self.counters.transfers_expired += 1
        for request in self._expired(self.requests, now):
            self._finish_request(request, request.delivered_at or INF, cancelled=False)
        for batch in self._expired(self.batches, now):
            if not batch.requests and not batch.transfers:
                self._forget_batch(batch)
        self._expire_sessions(now)
        for conn in self.connections.idle(now, LINGER_S):
            self._drop_connection(conn, "idle")

    def _expire_sessions(self, now: float) -> None:
        """Renew what marks hold; end sessions without a process that have nothing left."""
        for session in list(self.sessions.values()):
            for mark in session.marks.values():
                self.connections.renew(mark.conns, now + self.limits.max_ttl_s)
            said = session.requests or session.batches or session.transfers or session.marks
            if not session.pid and not said and session.seen + self.limits.default_ttl_s < now:
                self.end_session(session)

    @staticmethod
    def _expired(store: Dense[R], now: float) -> list[R]:
        expires = store.live("expires")
        return [store.objects[row] for row in np.flatnonzero(expires < now)] if store.n else []

    def _sweep(self) -> None:
        """Look whether idle connections still exist; busy ones are asked anyway when they near their end."""
        slots = sorted(self.connections.by_slot)
        if not slots:
            return
        window = [s for s in slots if s >= self._sweep_from][:SWEEP_BATCH] or slots[:SWEEP_BATCH]
        self._sweep_from = window[-1] + 1
        conns = [self.connections.by_slot[s] for s in window]
        for conn, position in self.connections.ask([c for c in conns if c.local]).items():
            if position is None:
                self._drop_connection(conn, "its socket is gone")
        self.connections.adopt(SWEEP_BATCH)

    # --- operators ----------------------------------------------------------------------------------------------------

    def set_mode(self, mode: Mode) -> None:
        """Observe or enforce. The daemon copies ``steers`` into the kernel's flags."""
        self.mode = mode

    def pause(self) -> None:
        """Stop steering, keep hints."""
        self.paused = True

    def resume(self) -> None:
        """Undo pause."""
        self.paused = False

    @property
    def steers(self) -> bool:
        """True when packets are to follow the levels."""
        return self.mode is Mode.ENFORCE and not self.paused
