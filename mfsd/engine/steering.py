# SPDX-License-Identifier: Apache-2.0
"""From what is known to levels, and from levels to the table: the vectorised part of a tick.

transfers -> policy -> level of each transfer
-> the most urgent one of each connection (its byte stream is FIFO: the urgent one needs all before it)
-> ladder -> band -> slot.band, which the classifier obeys from the next packet on
-> rescue of what a promotion left behind in a starved queue
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from mfsd.bands import LEVEL_SCAVENGER, Bands, Ladder
from mfsd.model import Event, EventKind, Stage
from mfsd.policy.parts.still import stage_levels
from mfsd.policy.views import I2, BatchView, LinkView, RequestView, TransferView, Views

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.books import Batch, Connection, Request, Transfer
    from mfsd.engine.columns import Dense
    from mfsd.engine.connections import Connections, Position
    from mfsd.engine.engine import Engine
    from mfsd.engine.estimator import LinkEstimator
    from mfsd.engine.rescue import Rescuer
    from mfsd.policy.base import Policy

STUCK_BYTES: Final = 2 * 65536
"""What a starved TCP socket has in the qdisc: two GSO segments (TCP small queues, net/ipv4/tcp_output.c). These bytes
have passed the classifier but not the link, so a transfer counts as having this much left until TCP says otherwise."""
CONFIRM_MAX: Final = 64
"""Connections asked per tick whether their last bytes have been acknowledged."""
OBSERVE_S: Final = 0.02
"""How often the link's counters are read."""
FEASIBLE_S: Final = 0.05
"""How often infeasible transfers are looked for, to tell their workers."""


class Port(Protocol):
    """What steering needs of one device."""

    name: str
    estimator: LinkEstimator

    def read(self) -> tuple[int, int, npt.NDArray[np.float64]] | None:
        """Bytes sent and queued by the root qdisc, and bytes offered per band, cumulative; None: not enforced."""
        ...


@dataclass(slots=True)
class Stages:
    """Per slot: the stage whose level bytes without a transfer of their own get. Shape (slots,) each."""

    last: npt.NDArray[np.uint8]
    """Stage of the last transfer seen on the connection."""
    mark: npt.NDArray[np.uint8]
    """Static mark; 0: none."""

    @classmethod
    def empty(cls, slots: int) -> Stages:
        """No stages known."""
        return cls(np.zeros(slots, dtype=np.uint8), np.zeros(slots, dtype=np.uint8))


@dataclass(slots=True)
class Steering:
    """Applies one policy to everything the engine knows."""

    connections: Connections
    policy: Policy
    bands: Bands
    ports: Sequence[Port]
    rescuer: Rescuer
    confirm: set[Connection] = field(default_factory=set)
    """Connections to ask about delivery although the counters give no reason."""
    ladder: Ladder = field(init=False)
    stages: Stages = field(init=False)
    stage_level: I2 = field(init=False)
    _gone: list[Connection] = field(default_factory=list)
    _ask_from: int = 0
    _next_observe: float = 0.0
    _next_feasible: float = 0.0

    def __post_init__(self) -> None:
        self.stages = Stages.empty(len(self.connections.table))
        self.set_policy(self.policy)

    def set_policy(self, policy: Policy) -> None:
        """Change the policy; takes effect at the next tick."""
        self.policy = policy
        self.ladder = Ladder(self.bands, policy.levels)
        self.stage_level = stage_levels(policy)

    # --- delivery -----------------------------------------------------------------------------------------------------

    def delivered(self, transfers: Dense[Transfer], now: float) -> list[Transfer]:
        """Transfers whose bytes have arrived, on TCP's word where there is a local socket to ask."""
        if not transfers.n and not self.confirm:
            return []
        sent = self.connections.sent()
        conns = transfers.live("conn")
        rows = np.flatnonzero((transfers.live("end") <= sent.take(conns)) & (conns >= 0))
        if len(rows) > CONFIRM_MAX:
            # Take turns: many starved transfers may wait here for a long time.
            rows = np.roll(rows, -(self._ask_from % len(rows)))[:CONFIRM_MAX]
            self._ask_from += CONFIRM_MAX
        suspects = [transfers.objects[row] for row in rows]
        asked = {t.conn for t in suspects if t.conn is not None} | self.confirm
        asked |= {p.conn for t in suspects if len(t.parts) > 1 for p in t.parts if p.conn is not None}
        self.confirm.clear()
        if not asked:
            return []
        positions = self.connections.ask([c for c in asked if c is not None])
        done: list[Transfer] = []
        for conn in asked:
            position = positions.get(conn)
            if position is None:
                if conn in positions:
                    self._gone.append(conn)
                else:
                    done += self._drained(conn, transfers, sent, now)
                continue
            done += self._arrived(conn, position, transfers)
        done += self._whole(suspects, transfers, positions)
        return list(dict.fromkeys(done))

    def _arrived(self, conn: Connection, position: Position, transfers: Dense[Transfer]) -> list[Transfer]:
        """Transfers of one connection whose last byte the peer has acknowledged."""
        reach = position.delivered + 0.5
        # When nothing is on its way, whatever was handed over has arrived, however much less than announced it was.
        quiet = reach >= position.written
        handed_over = [t for t in conn.queue if t.handed_over]
        if handed_over and not quiet:
            self.confirm.add(conn)
        done = handed_over if quiet else []
        for transfer in conn.queue:
            if transfer.handed_over and quiet:
                continue
            if transfer.total > transfers.size[transfer.row]:
                continue  # its bytes are spread over several connections, see _whole
            if reach < transfers.end[transfer.row]:
                break  # the stream is FIFO: those behind it end later
            done.append(transfer)
        return done

    @staticmethod
    def _whole(
        suspects: list[Transfer], transfers: Dense[Transfer], positions: Mapping[Connection, Position | None]
    ) -> list[Transfer]:
        """Parts of transfers that have moved all their bytes together, however these were spread.

        With several transfers at once on several lanes nobody can tell whose bytes went where; completion hints can.
        """
        out: list[Transfer] = []
        for transfer in suspects:
            if transfer.total <= transfers.size[transfer.row]:
                continue
            moved = 0.0
            for part in transfer.parts:
                position = positions.get(part.conn) if part.conn is not None else None
                if position is not None:
                    moved += max(position.delivered - transfers.start[part.row], 0.0)
            # Parts that are gone with their connections count as moved.
            shares_done = transfer.total - sum(float(transfers.size[p.row]) for p in transfer.parts)
            if moved + shares_done + 0.5 >= transfer.total:
                out += transfer.parts
        return out

    def _drained(
        self, conn: Connection, transfers: Dense[Transfer], sent: npt.NDArray[np.float64], now: float
    ) -> list[Transfer]:
        """Without a socket to ask: what has entered the qdisc is done once the connection's lane is empty."""
        past = [t for t in conn.queue if transfers.end[t.row] <= sent[conn.slot]]
        if not past or not self.rescuer.lane_empty(conn, now):
            return []
        return past

    def take_gone(self) -> list[Connection]:
        """Connections whose sockets turned out to be gone."""
        gone, self._gone = self._gone, []
        return gone

    def forget(self, conn: Connection) -> None:
        """A connection is about to be dropped."""
        self.confirm.discard(conn)
        self.rescuer.forget(conn)
        self.stages.last[conn.slot] = self.stages.mark[conn.slot] = Stage.NONE

    # --- levels -------------------------------------------------------------------------------------------------------

    def steer(self, engine: Engine, now: float) -> None:
        """Decide all levels and write them."""
        if now >= self._next_observe:
            self._next_observe = now + OBSERVE_S
            for port in self.ports:
                reading = port.read()
                if reading is not None:
                    port.estimator.observe(now, *reading)
        views = self.views(engine, now)
        if engine.arrange_wanted:
            engine.arrange_wanted = False
            arrangement = self.policy.arrange(views)
            if arrangement is not None:
                self._tell_pruned(engine, arrangement.pruned)
                engine.batches.live("rank")[:] = arrangement.rank
                engine.requests.live("pruned")[:] = arrangement.pruned
        if len(views.transfers):
            engine.transfers.live("level")[:] = self.policy.evaluate(views).level
            engine.transfers.live("seen_layer")[:] = views.transfers.current_layer
            if now >= self._next_feasible:
                self._next_feasible = now + FEASIBLE_S
                self._tell_infeasible(engine, views, now)
        self._write(engine, now)

    def views(self, engine: Engine, now: float) -> Views:
        """What the policy sees now."""
        requests, batches = self._request_view(engine, now), self._batch_view(engine)
        t = engine.transfers
        conn, start, end, size = t.live("conn"), t.live("start"), t.live("end"), t.live("size")
        sent = self.connections.sent().take(conn)  # take: a third of the time of [], at 10,000 rows
        left = np.maximum(end - np.maximum(sent, start), np.minimum(size, STUCK_BYTES))
        batch, request = t.live("batch"), t.live("request")
        current, computing = np.zeros(t.n, dtype=np.int32), np.zeros(t.n, dtype=np.bool_)
        if len(batches):
            owned = batch >= 0
            current = batches.current_layer.take(batch) * owned
            computing = owned & ~batches.compute_done.take(batch)
        compute_left = requests.compute_left.take(request) * (request >= 0) if len(requests) else np.zeros(t.n)
        transfers = TransferView(
            stage=t.live("stage"),
            size=size,
            left=left,
            ahead=np.maximum(start - sent, 0.0),  # without a connection both are 0
            request=request,
            batch=batch,
            conn=conn,
            target_layer=t.live("target_layer"),
            current_layer=current,
            computing=computing,
            layer_started=current != t.live("seen_layer"),
            deadline=t.live("deadline"),
            compute_left=compute_left,
            created=t.live("created"),
            level=t.live("level"),
            device=self.connections.port.take(conn),
            peer=self.connections.peer.take(conn),
        )
        return Views(transfers, requests, batches, self._link_view(), now)

    @staticmethod
    def _request_view(engine: Engine, now: float) -> RequestView:
        r: Dense[Request] = engine.requests
        b: Dense[Batch] = engine.batches
        compute_left = np.maximum(r.live("compute_until") - now, 0.0)
        batch = r.live("batch")
        if b.n and r.n:
            per_layer = b.live("layer_compute")
            todo = (b.live("layers") - b.live("current_layer")) * per_layer
            todo -= np.clip(now - b.live("layer_since"), 0.0, per_layer)  # the current layer, as far as it can be
            todo = np.where(b.live("compute_done"), 0.0, np.maximum(todo, 0.0))
            known = (b.live("layers") > 0) & (per_layer > 0) | b.live("compute_done")
            compute_left = np.where((batch >= 0) & known.take(batch), todo.take(batch), compute_left)
        return RequestView(
            deadline=r.live("deadline"),
            arrival=r.live("arrival"),
            batch=batch,
            compute_left=compute_left,
            pruned=r.live("pruned"),
        )

    @staticmethod
    def _batch_view(engine: Engine) -> BatchView:
        b: Dense[Batch] = engine.batches
        return BatchView(
            layers=b.live("layers"),
            current_layer=b.live("current_layer"),
            layer_compute=b.live("layer_compute"),
            compute_done=b.live("compute_done"),
            arrival=b.live("arrival"),
            rank=b.live("rank"),
        )

    def _link_view(self) -> LinkView:
        estimators = [p.estimator for p in self.ports]
        load = np.array([e.band_load for e in estimators]) if estimators else np.zeros((1, len(self.bands)))
        # Everything in bands above that of a level; one more column for "above the scavenger".
        above = np.concatenate([np.zeros((len(load), 1)), np.cumsum(load, axis=1)], axis=1)
        at = [*self.ladder.band_of, self.bands.scavenger.index]
        return LinkView(
            rate=np.array([e.rate for e in estimators] or [0.0]),
            load=np.minimum(load.sum(axis=1), 1.0),
            load_above=np.minimum(above[:, at], 1.0),
            peer_rate=self.connections.peer_rate,
        )

    def _write(self, engine: Engine, now: float) -> None:
        """Levels of connections -> bands in the table; promotions -> rescue."""
        table = self.connections.table
        high = table.high
        if not high:
            return
        level = np.full(high, LEVEL_SCAVENGER, dtype=np.int16)
        busy = np.zeros(high, dtype=np.bool_)
        conn = engine.transfers.live("conn")
        if len(conn):
            on = conn >= 0
            if not on.all():
                conn, levels = conn[on], engine.transfers.live("level")[on]
            else:
                levels = engine.transfers.live("level")
            where = conn.astype(np.intp)  # ufunc.at takes twice as long with other integers
            np.minimum.at(level, where, levels)
            busy[where] = True
        level = np.where(busy, level, self.stage_level.take(self.stages.last[:high]))
        mark = self.stages.mark[:high]
        if mark.any():
            marked = self.stage_level[mark]
            level = np.where(mark > 0, np.where(busy, np.minimum(level, marked), marked), level)
        band, old = self.ladder.bands(level), table.band[:high]
        changed = np.flatnonzero((band != old) & table.used[:high])
        if len(changed):
            before = old[changed].tolist()
            table.band[changed] = band[changed]
            for slot, was in zip(changed.tolist(), before, strict=True):
                known = self.connections.by_slot[slot]
                known.band, known.level = int(band[slot]), int(level[slot])
                if band[slot] < was:
                    known.promotions += 1
                    engine.counters.promotions += 1
                    if engine.steers:
                        self.rescuer.promoted(known, was, now)
        engine.counters.rescues += self.rescuer.run(now)

    # --- the way back -------------------------------------------------------------------------------------------------

    def _tell_infeasible(self, engine: Engine, views: Views, now: float) -> None:
        flags = self.policy.infeasible(views)
        known = engine.transfers.live("infeasible")
        for row in np.flatnonzero(flags != known):
            transfer = engine.transfers.objects[row]
            kind, reason = EventKind.RESTORED, "it can be in time again"
            if flags[row]:
                late = now - views.transfers.deadline[row]
                kind, reason = EventKind.INFEASIBLE, f"{views.transfers.left[row]:.0f} bytes left, "
                reason += f"{late:.3f} s late" if late > 0 else f"{-late:.3f} s to go"
            owner = transfer.request.id if transfer.request else ""
            transfer.session.tell(Event(kind, owner, transfer.id, reason))
        known[:] = flags

    @staticmethod
    def _tell_pruned(engine: Engine, pruned: npt.NDArray[np.bool_]) -> None:
        before = engine.requests.live("pruned")
        for row in np.flatnonzero(pruned != before):
            request = engine.requests.objects[row]
            kind = EventKind.PRUNED if pruned[row] else EventKind.RESTORED
            reason = "demoted so that others meet their deadlines" if pruned[row] else "there is room again"
            request.session.tell(Event(kind, request.id, "", reason))
