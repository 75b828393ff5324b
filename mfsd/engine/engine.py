# SPDX-License-Identifier: Apache-2.0
"""The engine: hints come in (ledger.py), bytes go out (delivery.py), levels follow (steering.py), time passes (here).

``tick`` hears what the kernel tells of sockets, keeps house (delivery, expiry), steers, and then does what may wait.
One thread, no locks, no clock of its own: every call is given ``now`` (CLOCK_MONOTONIC seconds), so tests run it on a
fake clock.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from mfsd.engine import bulk
from mfsd.engine.audit import Audit
from mfsd.engine.books import Books
from mfsd.engine.carriage import Carriage
from mfsd.engine.columns import Dense, HasRow
from mfsd.engine.delivery import Delivery
from mfsd.engine.endings import AT_ONCE, Endings
from mfsd.engine.gaps import Gaps
from mfsd.engine.hearing import Hearing
from mfsd.engine.leaving import Leaving
from mfsd.engine.ledger import Ledger
from mfsd.engine.overtime import Overtime
from mfsd.engine.positions import UnknownError
from mfsd.engine.probes import Probes
from mfsd.engine.records import Session
from mfsd.engine.rescue import Rescuer
from mfsd.engine.steering import Steering
from mfsd.engine.watches import Watches
from mfsd.ground.model import Event, EventKind, HintError, MarkHint, Mode, ProcessSelector, TransferHint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.bulk import Bad, TransferColumns
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.elsewhere import Elsewhere
    from mfsd.engine.settings import LimitsConfig, RescueConfig, TenantsConfig
    from mfsd.ground.bands import Bands
    from mfsd.ground.model import Hint, Selector
    from mfsd.policy.base import Policy

R = TypeVar("R", bound=HasRow)

HOUSEKEEPING_S: Final = 0.1
"""How often expiry is looked at."""
SWEEP_S: Final = 1.0
"""How often idle connections are checked for sockets that are gone."""
SWEEP_MAX: Final = 256
"""Of them so many in that time."""
SWEEP_BATCH: Final = 32
"""And so many in one tick."""
CAUGHT_UP: Final = 128
"""Transfers that have arrived and are struck out beside a turn of single hints."""
DROPPED_AT_ONCE: Final = 64
"""Idle connections that are forgotten in one tick."""
LINGER_S: Final = 5.0
"""A connection without transfers keeps its slot this long, since the next transfer usually follows."""


class Engine:
    """Composes the books and those who work on them, and gives them a sense of time."""

    def __init__(
        self,
        connections: Connections,
        policy: Policy,
        bands: Bands,
        devices: Sequence[Device],
        limits: LimitsConfig,
        rescue: RescueConfig,
        tenants: TenantsConfig,
        *,
        mode: Mode = Mode.ENFORCE,
    ) -> None:
        self.connections = connections
        self.books = books = Books()
        self.rescuer = Rescuer(devices, connections, bands, rescue)
        self.steering = Steering(books, connections, policy, bands, devices, self.rescuer, tenants)
        self.watches = Watches(books, connections.sockets, bands.level_bands[0].lanes, limits)
        connections.per_user = limits.max_connections_per_user
        self.audit = Audit(books, connections)
        self.probes = Probes(connections)
        gaps = Gaps(books, connections.positions)
        self.endings = Endings(books, connections, gaps, self.watches, self.rescuer, self.audit)
        self.leaving = Leaving(books, self.endings)
        self.delivery = Delivery(books, connections, self.rescuer, self.endings)
        self.carriage = Carriage(books, connections, self.watches, self.delivery, self.steering.band_of, limits)
        self.ledger = Ledger(books, connections, self.watches, self.delivery, self.endings, self.carriage, limits)
        self.overtime = Overtime(books, connections, self.watches)
        self.hearing = Hearing(books, connections, self.watches, self.endings, self.carriage)
        self.ledger.hear = self.hearing.look_at
        self.mode = mode
        self.paused = False
        self.epoch = secrets.randbits(63) | 1
        self.elsewhere: Elsewhere | None = None
        self._next_house = self._next_sweep = 0.0
        self._sweep_from = 0

    def set_limits(self, limits: LimitsConfig, rescue: RescueConfig, tenants: TenantsConfig) -> None:
        """Take other limits; they hold from now on."""
        self.ledger.admission.limits = self.carriage.limits = self.watches.limits = limits
        self.connections.per_user = limits.max_connections_per_user
        self.rescuer.config = rescue
        self.steering.urgency.config = tenants

    # --- sessions and hints -------------------------------------------------------------------------------------------

    def session(
        self, name: str, now: float, *, pid: int = 0, uid: int = -1, only: int = -1, maker: object = None
    ) -> Session:
        """Find or open a client session. Raises HintError for a name that can't be, or too many sessions.

        ``maker`` is who opens it: whoever asks looks whether the one found is its own. ``only``: see Session.
        """
        sessions = self.books.sessions
        found = sessions.get(name)
        if found is not None:
            found.seen = now
            return found
        if not name:
            raise HintError("session", "is empty", "name the session, unique per process")
        limits, user = self.ledger.admission.limits, self.books.user(uid)
        if len(name.encode(errors="replace")) > limits.max_id_bytes:
            raise HintError("session", "is too long", f"at most {limits.max_id_bytes} bytes (limits.max_id_bytes)")
        for whose, have, limit in (
            ("", len(sessions), "max_sessions"),
            (f" by user {uid}", user.sessions, "max_sessions_per_user"),
        ):
            if have >= getattr(limits, limit):
                raise HintError(
                    "session",
                    f"{have} sessions are open already{whose}",
                    f"raise limits.{limit}, or let workers share a session",
                    exhausted=True,
                )
        new = sessions[name] = Session(name, pid, uid, only, user, maker, seen=now)
        user.sessions += 1
        return new

    def end_session(self, session: Session, now: float) -> None:
        """Its process or its client is gone: free everything that it said. No error when it has ended already.

        What its sockets still deliver counts: the kernel sends what was written before a process ended.
        """
        sessions = self.books.sessions
        if sessions.get(session.name) is not session:
            return
        del sessions[session.name]
        session.user.sessions -= 1
        if self.elsewhere is not None:
            self.elsewhere.ended(session)
        self.delivery.hand_over(self.leaving.begin(session, now), now, left=True)

    def apply(self, session: Session, hint: Hint, now: float) -> bool:
        """Apply one hint. Raises HintError and changes nothing if it can't be applied.

        False: it was handed on to another host, and there is nothing to decide here.
        """
        if isinstance(hint, TransferHint | MarkHint):
            hint.selector = self._counted_here(session, hint.selector)
        if self.elsewhere is not None and self.elsewhere.take(session, hint, now):
            return False
        self.ledger.apply(session, hint, now)
        return True

    def _counted_here(self, session: Session, selector: Selector) -> Selector:
        """A process is the one that the session's owner calls so, in whatever pid namespace."""
        if not isinstance(selector, ProcessSelector) or not session.pid:
            return selector
        return replace(selector, pid=self.connections.sockets.process(selector.pid, session.pid))

    def gather(self, now: float, *, on: bool) -> None:
        """Between on and off, and no longer than till others have their turn, cancellations are gathered."""
        self.ledger.gathering = on
        self.ledger.settle(now)
        if not on:
            self.endings.catch_up(CAUGHT_UP, now)

    def transfers(self, session: Session, columns: TransferColumns, now: float) -> Bad:
        """Apply transfers by columns; rows that can't be applied change nothing and are returned."""
        self.ledger.settle(now)
        columns.selectors = [s and self._counted_here(session, s) for s in columns.selectors]
        bad: Bad = []
        if self.elsewhere is not None:
            away = np.array([s is not None and self.elsewhere.sends(s) for s in columns.selectors], dtype=np.bool_)
            handed_on = away.take(columns.selector) if away.any() else away
            for row in np.flatnonzero(handed_on).tolist():
                try:
                    self.elsewhere.take(session, columns.hint(row), now)
                except HintError as e:
                    bad.append((int(columns.row[row]), e))
            if handed_on.any():
                columns = columns.keep(~handed_on)
        self.endings.catch_up(2 * len(columns), now)
        return bad + bulk.announce(self.ledger, session, columns, now)

    # --- time ---------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing to schedule: the daemon may tick slowly."""
        under_way = self.watches.looking or self.hearing.more or self.leaving.under_way
        return not self.books.transfers.n and not under_way

    @property
    def rescue_due(self) -> bool:
        """A promotion may need help within the stall time: tick soon."""
        return self.rescuer.waiting

    @property
    def calm_until(self) -> float:
        """What was decided stands until then if nothing comes in: ticks may be rarer."""
        return self.steering.calm.until

    def hear(self, now: float) -> None:
        """Take in some of what the kernel tells of connections."""
        self.hearing.run(now)

    def tick(self, now: float) -> None:
        """Do everything that time brings: house-keeping, delivery, levels, rescue."""
        self.watches.look(now)
        self.hear(now)
        gone, over = self.connections.search(now)
        for conn in gone:
            self.endings.drop(conn, now, f"no connected socket of this user has cookie {conn.cookie}")
        for conn, end in over:
            self.hearing.over(conn, end, now)
        self.endings.go_on(now)
        self.leaving.go_on(now)
        moved = self.connections.positions.moved(self.books.streams)
        moved = self.delivery.run(moved, now)
        if now >= self._next_house:
            self._next_house = now + HOUSEKEEPING_S
            self._expire(now)
            rates = [d.estimator.rate for d in self.steering.devices]
            self.connections.peers.refresh(now, max(rates, default=0.0))
        self.steering.run(moved, now, steers=self.steers)
        self.audit.note()
        # What nothing waits for.
        self.probes.run(now)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_S * self._sweep(now)

    def _expire(self, now: float) -> None:
        """Forget what nobody completed, cancelled or renewed in time."""
        self.overtime.run(now)
        transfers = self._expired(self.books.transfers, now, AT_ONCE)
        for transfer in transfers:
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(EventKind.EXPIRED, owner, transfer.id, "not completed in its time to live"))
            self.books.counters.transfers_expired += 1
        self.endings.end(transfers, now, lost=True)
        for request in self._expired(self.books.requests, now, AT_ONCE):
            self.endings.finish(request, now)
        empty = (b for b in self._expired(self.books.batches, now) if not b.requests and not b.transfers)
        for batch in list(islice(empty, AT_ONCE)):
            self.books.strike_batch(batch)
        self._expire_sessions(now)
        for watch in self.watches.expired(now):
            self.endings.unwatch(watch, now)
        idle = self.connections.idle(now, LINGER_S)
        for conn in idle[:DROPPED_AT_ONCE]:
            self.endings.drop(conn, now)
        if len(idle) > DROPPED_AT_ONCE:
            self._next_house = now  # the others at the next ticks

    def _expire_sessions(self, now: float) -> None:
        """Renew what marks hold; end the sessions of those whose end nobody sees, and, after long, of the silent."""
        limits = self.ledger.admission.limits
        for session in list(self.books.sessions.values()):
            for mark in session.marks.values():
                if now < mark.renew_at:
                    continue
                mark.renew_at = now + limits.max_ttl_s / 2
                self.connections.renew(mark.conns, now + limits.max_ttl_s)
                watch = session.watches.get(mark.selector)
                if watch is not None:
                    self.watches.get(session, mark.selector, watch.band, now + limits.max_ttl_s, now)
            said = session.requests or session.batches or session.transfers or session.marks
            if session.attached:
                continue
            if session.maker is None or session.lasting:
                # Who has had a stream may come again with another one. Single calls say nothing of their caller's end.
                if (session.kept or not said) and session.seen + limits.default_ttl_s < now:
                    self.end_session(session, now)
            elif not said and session.seen + limits.max_ttl_s < now:
                self.end_session(session, now)

    @staticmethod
    def _expired(store: Dense[R], now: float, most: int | None = None) -> list[R]:
        if not store.n:
            return []
        objects = store.objects
        return [objects[row] for row in np.flatnonzero(store.live("expires") < now)[:most].tolist()]

    def _sweep(self, now: float) -> float:
        """Look whether idle connections still exist; busy ones are asked anyway when they near their end.

        Returns which part of what SWEEP_S is for that was.
        """
        slots = sorted(self.connections.by_slot)
        if not slots:
            return 1.0
        window = [s for s in slots if s >= self._sweep_from][:SWEEP_BATCH] or slots[:SWEEP_BATCH]
        self._sweep_from, part = window[-1] + 1, len(window) / min(len(slots), SWEEP_MAX)
        conns = [self.connections.by_slot[s] for s in window]
        try:
            positions = self.connections.positions.ask([c for c in conns if c.here])
        except UnknownError:
            return part
        for conn, position in positions.items():
            if position is None or position.over:
                self.endings.found_over(conn, position, now)
        return part

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
