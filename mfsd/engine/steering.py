# SPDX-License-Identifier: Apache-2.0
"""From what is known to levels, and from levels to the table: the vectorised part of a tick.

transfers -> policy -> level of each transfer
-> the most urgent one of each connection (its byte stream is FIFO: the urgent one needs all before it)
-> ladder -> band -> slot.band, which the classifier obeys from the next packet on
-> rescue of what a promotion left behind in a starved queue
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine import fair
from mfsd.engine.calm import Calm
from mfsd.engine.columns import GONE
from mfsd.engine.guarantees import Guarantees
from mfsd.engine.slots import NS
from mfsd.engine.urgency import Urgency
from mfsd.engine.views import Rows, Shown, views_of
from mfsd.ground.bands import LEVEL_NEW, LEVEL_SCAVENGER, Bands, Ladder, Role
from mfsd.ground.model import INF, Event, EventKind, Stage
from mfsd.policy.views import LinkView, TransferView, Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.records import Transfer
    from mfsd.engine.rescue import Rescuer
    from mfsd.engine.settings import TenantsConfig
    from mfsd.engine.streams import Moved
    from mfsd.policy.base import Policy
    from mfsd.policy.views import B1, F8, I2, Decision

OBSERVE_S: Final = 0.02
"""How often the devices' counters are read."""
FEASIBLE_S: Final = 0.05
"""How often infeasible transfers are looked for, to tell their workers, if decisions don't say who they are."""
AMPLE: Final = 1e12
"""Bytes/s of a link on which nothing is late."""
PATH_MAX: Final = 16
"""Decisions remembered of each transfer."""
SIZES_KEPT: Final = 512
"""Sizes of the latest transfers, for policies that order by size."""
LATELY_S: Final = 10.0
"""So long after its last packet a connection counts as moving, so that its next bytes find a guarantee."""
TELL_MAX: Final = 1024
"""Transfers of which workers are told at one tick that they have become infeasible, or are no more."""


@dataclass(slots=True)
class Steering:
    """Applies one policy to everything in the books."""

    books: Books
    connections: Connections
    policy: Policy
    bands: Bands
    devices: Sequence[Device]
    rescuer: Rescuer
    tenants: TenantsConfig
    """As they were at the beginning; ``urgency`` has those in force."""
    ladder: Ladder = field(init=False)
    urgency: Urgency = field(init=False)
    guarantees: Guarantees = field(init=False)
    calm: Calm = field(init=False)
    stage_level: I2 = field(init=False)
    _marked: list[tuple[int, int]] = field(init=False)
    """By set of marks (Connections.mark_sets): the most urgent level of those that count always, and of all."""
    _stage_band: npt.NDArray[np.uint8] = field(init=False)
    _sizes: F8 = field(default_factory=lambda: np.zeros(0))
    _assures: bool = field(init=False)
    """The policy guarantees levels something."""
    _untold: dict[Transfer, tuple[float, float]] = field(default_factory=dict)
    """Those of whom workers are still to be told that they can't be in time, or can again; what was left, how late."""
    _shown: Shown = field(default_factory=Shown)
    _next_observe: float = 0.0
    _next_feasible: float = 0.0

    def __post_init__(self) -> None:
        self.guarantees = Guarantees(self.devices, self.bands)
        self.calm = Calm(self.books, self.connections, self.devices, self.bands, self.rescuer)
        self.urgency = Urgency(self.connections, self.devices, self.bands, self.books, self.tenants)
        self._set_policy(self.policy)

    def change_policy(self, policy: Policy) -> None:
        """Take another policy; effective at the next tick."""
        self._set_policy(policy)
        # Levels of another policy mean nothing to this one, and most policies only ever raise them.
        self.books.transfers.live("level")[:] = LEVEL_NEW
        self.books.requests.live("pruned")[:] = False
        self.books.arrange_wanted = True

    def _set_policy(self, policy: Policy) -> None:
        self.policy = policy
        self.ladder = Ladder(self.bands, policy.levels)
        self.stage_level = policy.unannounced()
        one = Views.of(TransferView.of(1), LinkView.of(AMPLE, policy.levels))
        self._assures = policy.evaluate(one).guarantee is not None
        self._marked, self.calm.until = [], 0.0
        self._stage_band = self.ladder.bands(self.stage_level)
        self.guarantees.collectives = self.band_of(Stage.COLLECTIVE)

    def band_of(self, stage: Stage, due_in: float = INF) -> int:
        """Where bytes belong of which nothing but the stage is known, and in how many seconds they count as due."""
        if due_in == INF:
            return int(self._stage_band[stage])
        return int(self.ladder.bands(np.array([self._level_of(stage, due_in)], dtype=np.int16))[0])

    def _level_of(self, stage: Stage, due_in: float) -> int:
        """Never below the stage's own: when such bytes are due comes no nearer, so they would wait for ever."""
        known = int(self.stage_level[stage])
        if due_in == INF:
            return known
        one = TransferView.of(1, stage=int(stage), deadline=due_in)
        return min(int(self.policy.evaluate(Views.of(one, LinkView.of(AMPLE, self.policy.levels))).level[0]), known)

    def _marks(self) -> tuple[I2, I2]:
        """``_marked``, completed, by columns."""
        for kinds in list(self.connections.mark_sets)[len(self._marked) :]:
            levels = [(self._level_of(stage, due_in), gives_way) for stage, due_in, gives_way in kinds]
            always = min((level for level, gives_way in levels if not gives_way), default=LEVEL_SCAVENGER)
            self._marked.append((always, min((level for level, _ in levels), default=LEVEL_SCAVENGER)))
        columns = np.array(self._marked, dtype=np.int16)
        return columns[:, 0], columns[:, 1]

    def views(
        self, now: float, moved: Moved | None = None, rows: Rows | None = None, unannounced: B1 | None = None
    ) -> Views:
        """What the policy sees now of all transfers, or of ``rows``.

        Given how far streams have come, and on which levels something goes unannounced (None: look).
        """
        moved = self.connections.positions.moved(self.books.streams) if moved is None else moved
        views = views_of(
            self.books,
            self.connections,
            moved,
            self.devices,
            self.bands,
            self.ladder,
            self._unannounced(now) if unannounced is None else unannounced,
            now,
            rows,
        )
        views.sizes = self._sizes
        return views

    def _unannounced(self, now: float) -> B1:
        """Devices and levels on which something moves of which nothing but the stage is known, shape (devices, levels).

        Connections with marks, while nothing is announced there; and those written in turns, at their stage's level.
        """
        out = np.zeros((max(len(self.devices), 1), self.policy.levels), dtype=np.bool_)

        def note(slots: npt.NDArray[np.int32], level: I2) -> None:
            some = (level >= 0) & (level < self.policy.levels)
            out[self.connections.device_of(slots[some]), level[some]] = True

        table, transfers, streams = self.connections.table, self.books.transfers, self.books.streams
        marks, stream = self.connections.mark_set[: table.high], transfers.live("stream")
        if marks.any():
            lately = table.last_ns[: table.high] > int((now - LATELY_S) * NS)
            slots = np.flatnonzero((marks > 0) & lately & ~streams.carried(stream, table.high)).astype(np.int32)
            note(slots, self._marks()[1].take(marks.take(slots)))
        level = transfers.live("level")
        moves = self.moving(level)
        held = np.flatnonzero(moves < level) if moves is not level else ()
        if len(held):
            note(streams.slot.take(stream.take(held)), moves.take(held))
        return out

    def run(self, moved: Moved, now: float, *, steers: bool) -> None:
        """Decide all levels and write them, and what bands are guaranteed.

        ``steers``: packets follow the levels. Then promotions may need help; else what is queued is let out.
        """
        unannounced = self._unannounced(now)
        self.urgency.count(now, steers=steers)
        if self.urgency.any or self._untold or not self.calm.stands(now, unannounced, steers=steers):
            self._steer(moved, now, unannounced, steers=steers)
        self.rescuer.run(now, self.guarantees.extra)
        promoted = self.rescuer.rescued()
        self.books.counters.rescues += len(promoted)
        self.books.tally.rescues += [now - at for at in promoted]
        # Last, so that no rescue waits for the counters in the device's thread.
        if now >= self._next_observe:
            self._next_observe = now + OBSERVE_S
            for row, device in enumerate(self.devices):
                reading = device.read()
                if reading is not None:
                    device.estimator.observe(reading, self.guarantees.collectives, self.guarantees.left(row))

    def _steer(self, moved: Moved, now: float, unannounced: B1, *, steers: bool) -> None:
        """See ``run``."""
        decided = None
        there = self.books.transfers.n or self.books.arrange_wanted or len(self.connections.positions.goes_on(now))
        if there or unannounced.any():
            decided = self._decide(moved, now, unannounced)
        else:
            self._untold.clear()
        band = self.urgency.demote(self.ladder.bands(self.levels()))
        # Before the levels, so that whoever is promoted finds its guarantee.
        if steers:
            given, last = (self._nothing(), None) if decided is None else (decided.guarantee, decided.given_up)
            draining, rising = self.rescuer.draining(now), () if given is None else self._rising()
            leaving = self._leaving(band) | self.rescuer.leaving(now)
            self.guarantees.give(given, self.ladder, now, draining, last, rising, leaving)
        else:
            self.guarantees.drain(now)
        self._write(band, now, rescue=steers)
        self.calm.note(0.0 if decided is None else decided.lasts, now, unannounced, steers=steers)

    def _rising(self) -> set[int]:
        """Bands below unhinted traffic with transfers that are due some time."""
        t, default = self.books.transfers, self.bands.default.index
        due = t.live("deadline") < INF
        bands = np.unique(self.ladder.bands(t.live("level")[due])).tolist()
        return {b for b in bands if b > default and self.bands.bands[b].role is Role.LEVEL}

    def _decide(self, moved: Moved, now: float, unannounced: B1) -> Decision | None:
        """Decide the levels of all transfers; returns what was decided, for what is guaranteed."""
        rows = self._asked(self._shown.rows(self.books, now))
        views = self.views(now, moved, rows, unannounced)
        if self.books.arrange_wanted:
            self.books.arrange_wanted = False
            self._arrange(views)
        if not len(views.transfers) and not views.link.beyond.any() and not views.link.unannounced.any():
            return None
        new = views.transfers.size[views.transfers.level == LEVEL_NEW]
        if len(new):
            views.sizes = self._sizes = np.concatenate([self._sizes, new])[-SIZES_KEPT:]
        decision = fair.decide(self.policy, views, self._tenants_of(views.transfers.conn))
        where: Rows | slice = slice(None) if rows is None else rows
        self._note(views, decision.level, where, now)
        self.books.transfers.live("seen_layer")[where] = views.transfers.current_layer
        if decision.infeasible is not None:
            self._tell_infeasible(views, decision.infeasible, where)
        elif now >= self._next_feasible:
            self._next_feasible = now + FEASIBLE_S
            self._tell_infeasible(views, self.policy.infeasible(views), where)
        return decision

    def _asked(self, rows: Rows | None) -> Rows | None:
        """Less those of which most may have gone already, as after a restart: they would make others late."""
        streams = self.books.streams
        if not streams.unasked:
            return rows
        asked = np.ones(streams.high, dtype=np.bool_)
        asked[[stream.index for stream in streams.unasked]] = False
        shown = asked.take(self.books.transfers.live("stream"))
        return np.flatnonzero(shown) if rows is None else rows[shown.take(rows)]

    def _tenants_of(self, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Whose transfers are, by slot. Beside several tenants, those without a connection yet are nobody's."""
        of: npt.NDArray[np.int32] = self.connections.tenants.of.take(slot, mode="clip")
        waiting = slot < 0
        if waiting.any():
            known = np.unique(of[~waiting])
            of = np.where(waiting, known[0] if len(known) == 1 else 0, of)
        return of

    def _note(self, views: Views, level: I2, where: Rows | slice, now: float) -> None:
        """Take over what was decided of these rows, and note what has changed."""
        transfers = self.books.transfers
        before, objects = transfers.live("level")[where], transfers.objects
        for recorder in self.books.recorders:
            recorder.decided(views, level, objects if isinstance(where, slice) else [objects[i] for i in where], now)
        changed = before != level
        if not changed.any():
            return
        new = before == LEVEL_NEW
        first = transfers.live("first_level")
        first[where] = np.where(new, level, first[where])
        for i in np.flatnonzero(changed & ~new).tolist():
            transfer = objects[i if isinstance(where, slice) else where[i]]
            transfer.path = (*transfer.path[1 - PATH_MAX :], (now, int(level[i])))
        transfers.live("level")[where] = level

    def _arrange(self, views: Views) -> None:
        arrangement = self.policy.arrange(views)
        if arrangement is not None:
            self._tell_pruned(arrangement.pruned)
            self.books.batches.live("rank")[:] = arrangement.rank
            self.books.requests.live("pruned")[:] = arrangement.pruned

    # --- the table ----------------------------------------------------------------------------------------------------

    def _nothing(self) -> F8 | None:
        """What is guaranteed while nobody is there, so that the first bytes of who comes are no long debt.

        None: the policy guarantees nothing.
        """
        return np.zeros((len(self.devices), self.policy.levels)) if self._assures else None

    def _leaving(self, band: npt.NDArray[np.uint8]) -> set[tuple[int, int]]:
        """Rows of devices and bands that connections are about to leave for more urgent ones, ``band`` by slot."""
        table, high = self.connections.table, len(band)
        up = np.flatnonzero((band < table.band[:high]) & table.used[:high])
        rows = self.connections.device_of(up.astype(np.int32)).tolist()
        return set(zip(rows, table.band[up].tolist(), strict=True))

    def _write(self, band: npt.NDArray[np.uint8], now: float, *, rescue: bool) -> None:
        """Bands of connections, by slot, to the table; promotions to the rescuer."""
        table, old = self.connections.table, self.connections.table.band[: len(band)]
        changed = np.flatnonzero((band != old) & table.used[: len(band)])
        if not len(changed):
            return
        before = old[changed].tolist()
        table.band[changed] = band[changed]
        for slot, was in zip(changed.tolist(), before, strict=True):
            conn = self.connections.by_slot[slot]
            conn.band = int(band[slot])
            if band[slot] < was:
                conn.promotions += 1
                self.books.counters.promotions += 1
                if rescue:
                    self.rescuer.promoted(conn, was, now)

    def levels(self) -> I2:
        """Level by slot, shape (high,): of the most urgent transfer, else of the last stage; a mark is the least.

        Marks that give way (rules) count where there is no transfer.

        A transfer's level (``moving``) is that of all connections of its stream: nobody can tell which of them its
        bytes take.
        """
        high = self.connections.table.high
        level = np.full(high, LEVEL_SCAVENGER, dtype=np.int16)
        busy = np.zeros(high, dtype=np.bool_)
        transfers, streams = self.books.transfers, self.books.streams
        if transfers.n and streams.members.n:
            of_stream = np.full(streams.high, LEVEL_SCAVENGER, dtype=np.int16)
            used = np.zeros(streams.high, dtype=np.bool_)
            where = transfers.live("stream")
            np.minimum.at(of_stream, where, self.moving(transfers.live("level")))
            used[where] = True
            slot, stream = streams.members.live("slot").astype(np.intp), streams.members.live("stream")
            on = used.take(stream)
            np.minimum.at(level, slot[on], of_stream.take(stream[on]))
            busy[slot[on]] = True
            busy &= level != LEVEL_NEW  # with nothing but transfers that no policy has been shown yet
        level = np.where(busy, level, self.stage_level.take(self.connections.last_stage[:high]))
        marks = self.connections.mark_set[:high]
        if marks.any():
            always, least = self._marks()
            level = np.where(marks > 0, np.where(busy, np.minimum(level, always.take(marks)), least.take(marks)), level)
        return level

    def moving(self, level: I2) -> I2:
        """Levels at which transfers move, shape (n,): those written in turns at their stage's, or a more urgent one.

        Whoever holds one of these back, or gives it up, holds back all that is written to its connection from now on.
        """
        ordered = self.books.transfers.live("ordered")
        if ordered.all():
            return level
        return np.where(ordered, level, np.minimum(level, self.stage_level.take(self.books.transfers.live("stage"))))

    # --- the way back -------------------------------------------------------------------------------------------------

    def _tell_infeasible(self, views: Views, flags: B1, where: Rows | slice) -> None:
        """Take over who can't be in time, for the next decision to go on from there, and tell workers some of it."""
        known, objects = self.books.transfers.live("infeasible"), self.books.transfers.objects
        changed = np.flatnonzero(flags != known[where])
        if not len(changed) and not self._untold:
            return
        rows = changed if isinstance(where, slice) else where[changed]
        for row, place in zip(changed.tolist(), rows.tolist(), strict=True):
            # Who has not been told of the one need not be told of the other.
            if self._untold.pop(objects[place], None) is None:
                late = views.now - views.transfers.deadline[row]
                self._untold[objects[place]] = float(views.transfers.left[row]), float(late)
        known[rows] = flags[changed]
        for transfer in list(islice(self._untold, TELL_MAX)):
            left, late = self._untold.pop(transfer)
            if transfer.row == GONE:
                continue
            kind, reason = EventKind.RESTORED, "it can be in time again"
            if self.books.transfers.get(transfer, "infeasible"):
                kind, reason = EventKind.INFEASIBLE, f"{left:.0f} bytes left, "
                reason += f"{late:.3f} s late" if late > 0 else f"{-late:.3f} s to go"
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(kind, owner, transfer.id, reason))

    def _tell_pruned(self, pruned: npt.NDArray[np.bool_]) -> None:
        before = self.books.requests.live("pruned")
        for row in np.flatnonzero(pruned != before):
            request = self.books.requests.objects[row]
            kind = EventKind.PRUNED if pruned[row] else EventKind.RESTORED
            reason = "demoted so that others meet their deadlines" if pruned[row] else "there is room again"
            request.session.tell(Event(kind, request.id, "", reason))
