# SPDX-License-Identifier: Apache-2.0
"""The connections that mfsd knows: their slots, keys and lanes. How far each of them has got: positions.py."""

from __future__ import annotations

from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.lanes import Lanes
from mfsd.engine.locating import AT_ONCE, LOCATE_S, Unlocated
from mfsd.engine.ownership import own, own_now
from mfsd.engine.peers import Peers
from mfsd.engine.positions import Positions
from mfsd.engine.records import Connection, User
from mfsd.engine.slots import NS, FlowTable, KeyMap, TableFullError
from mfsd.engine.sockets import Socket
from mfsd.engine.tenants import Parted, Tenants
from mfsd.ground.model import INF, Endpoints, HintError, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mfsd.engine.records import Mark, Session
    from mfsd.engine.sockets import End, Sockets
    from mfsd.ground.bands import Bands
    from mfsd.ground.model import Address
    from mfsd.policy.views import F8

MarkKind = tuple[Stage, float, bool]
"""(stage, due_in, gives_way) of a mark."""

UNSEEN_S: Final = 20.0
"""A tuple that no packet has had for so long loses its slot."""
LONG_AGO: Final = -INF
"""Since when a connection is at rest that nobody is expected to use again."""
LENT: Final = 256
"""Free slots that the kernel holds, to take by itself; at most an eighth of the table."""


class Connections:
    """Registry of connections."""

    def __init__(
        self,
        table: FlowTable,
        keys: KeyMap,
        sockets: Sockets,
        bands: Bands,
        devices: Callable[[], Sequence[int]] = lambda: (0,),
        far_rate: Callable[[Address], float] | None = None,
    ) -> None:
        """``devices``: interface indices of the shaped devices, in their order. ``far_rate``: see Peers."""
        self.table = table
        self.keys = keys
        self.sockets = sockets
        self.bands = bands
        self.peers = Peers(far_rate)
        self._devices = devices
        self._default = bands.default.index
        self.by_slot: dict[int, Connection] = {}
        self.by_cookie: dict[int, Connection] = {}
        self._by_tuple: dict[Endpoints, Connection] = {}
        self._unlocated = Unlocated(table)
        """Known by cookie only."""
        self._strange: dict[Connection, None] = {}
        """Named by somebody whose they have turned out not to be."""
        self.positions = Positions(table, sockets)
        self.lanes = Lanes(max(b.lanes for b in bands.level_bands))
        n = len(table)
        self.tenants = Tenants(n)
        self.tenancy: npt.NDArray[np.int64] = np.zeros(n, dtype=np.int64)
        """By slot: how many connections have had it."""
        # One element more than there are slots: index -1 ("no connection") reads the last.
        self.peer: npt.NDArray[np.int32] = np.full(n + 1, -1, dtype=np.int32)
        """By slot: dense index of the remote address, -1 while unknown."""
        self.last_stage: npt.NDArray[np.uint8] = np.zeros(n, dtype=np.uint8)
        """By slot: stage of the last transfer announced there; bytes without a transfer of their own inherit it."""
        self.mark_sets: dict[frozenset[MarkKind], int] = {frozenset(): 0}
        """What sets of marks a connection had so far, numbered."""
        self.mark_set: npt.NDArray[np.int32] = np.zeros(n, dtype=np.int32)
        """By slot: number of its set of marks; 0: none."""
        self.rest_since: F8 = np.full(n, INF)
        """By slot: since when a connection has nothing that holds it; inf while it has, or is not taken."""
        self._unseen: F8 = np.full(n, INF)
        """By slot: since when a connection is known that nobody has shown to exist; inf for others."""
        self.per_user = n
        """Connections that one user may have made known."""
        self._nobody = User(-1)
        self._lent = 0

    def __len__(self) -> int:
        return len(self.by_slot)

    # --- which connection ---------------------------------------------------------------------------------------------

    def of_cookie(self, cookie: int, expires: float, session: Session, wait_s: float = LOCATE_S) -> Connection:
        """The connection with this socket cookie, made known if it was not. ``wait_s``: for who connects its socket.

        Raises HintError when it isn't ``session``'s to name, or the table is full.
        """
        conn = self.by_cookie.get(cookie)
        if conn is None:
            found = self.sockets.by_cookie(cookie)
            if found is not None:
                found = own_now(self.sockets, session, found)
            conn = self._take(cookie, None, expires, session=session)
            if found is None:
                # An unconnected socket, perhaps: its key works at once, and its addresses follow.
                conn.only = session.only
                self._unlocated.add(conn, wait_s)
            else:
                self.locate(conn, found)
        elif conn in self._unlocated or conn.endpoints is None:
            own(session, conn.only if conn in self._unlocated else conn.uid, "selector.cookie")
        else:
            known = Socket(cookie, conn.endpoints, conn.uid, conn.pid, conn.here)
            if (now := own_now(self.sockets, session, known)) is not known:
                self.locate(conn, now)
        self.renew((conn,), expires)
        return conn

    def of_socket(
        self, socket: Socket, expires: float, slot: int | None = None, *, session: Session | None = None
    ) -> Connection:
        """The connection of a socket that the kernel has told of; ``slot``: the kernel's choice.

        Raises HintError when it isn't ``session``'s to name, or the table is full.
        """
        own(session, socket.uid, "selector.tuple")
        conn = self.by_cookie.get(socket.cookie)
        if conn is None:
            # Matched by its tuple before it existed, or before anybody knew of its socket.
            known = None if slot is None else self.by_slot.get(slot)
            if known is None and not socket.here:
                known = self._by_tuple.get(socket.endpoints)
            if known is not None and not known.cookie:
                conn, conn.cookie, conn.passing = known, socket.cookie, not socket.here
                self.by_cookie[socket.cookie] = conn
                self.keys.add_cookie(socket.cookie, conn.slot)
        if conn is None:
            if slot is not None and not self.table.lent[slot]:
                # The kernel found it by the tuple of a connection that was over: that slot may be anybody's by now.
                self.keys.delete_cookie(socket.cookie)
                slot = None
            conn = self._take(socket.cookie, None, expires, slot, session=session)
        if conn.endpoints is None or not conn.here:
            self.locate(conn, socket)
        return conn

    def of_tuple(self, endpoints: Endpoints, expires: float, session: Session | None = None) -> Connection:
        """A connection without a socket at hand (bridged pods), or still to come. Raises HintError.

        Whoever may not name anybody's connections must have been found to send from there.
        """
        conn = self._by_tuple.get(endpoints) or self._take(0, endpoints, expires, session=session)
        self.renew((conn,), expires)
        return conn

    def pass_by(self, conn: Connection) -> None:
        """Match a connection of another network namespace by its addresses, too: routed packets have no socket."""
        if conn.endpoints is not None and conn.endpoints not in self._by_tuple:
            conn.passing = True
            self._by_tuple[conn.endpoints] = conn
            self.keys.add_tuple(conn.endpoints, conn.slot)

    def locate(self, conn: Connection, socket: Socket) -> None:
        """Its addresses have become known."""
        self._unlocated.discard(conn)
        conn.here, conn.uid, conn.pid = socket.here, socket.uid, socket.pid
        if self.tenants.uid(conn.tenant) != socket.uid:
            self._leave_lane(conn)
            self.tenants.part(conn.slot, conn.tenant)
            tcp = socket.endpoints.protocol == IPPROTO_TCP
            self._enter_lane(conn, self.tenants.join(conn.slot, socket.uid), tcp=tcp)
        self._unseen[conn.slot] = INF
        if conn.only not in (-1, socket.uid):
            self._strange[conn] = None
        if conn.endpoints is None:
            self._set_endpoints(conn, socket.endpoints)

    def unlocate(self, conn: Connection) -> None:
        """It could not be established. Should its socket not try again soon, ``search`` reports it as gone."""
        if conn.endpoints is not None:
            self._forget_endpoints(conn, conn.endpoints)
            conn.endpoints, conn.only = None, conn.uid
            self.peer[conn.slot] = -1
        self._unlocated.add(conn, over=True)

    def search(self, now: float) -> tuple[list[Connection], list[tuple[Connection, End]]]:
        """Look again for the sockets of cookies.

        Returns those that do not show up, or are others', and those that were over before anybody had named them.
        """
        over: list[tuple[Connection, End]] = []
        for conn in self._unlocated.due(now):
            found = self.sockets.by_cookie(conn.cookie)
            if found is not None:
                self.locate(conn, found)
            elif (end := self.end_of(conn)) is not None:
                over.append((conn, end))
            elif self._unlocated.given_up(conn, now):
                self._strange[conn] = None
        return [self._strange.popitem()[0] for _ in range(min(AT_ONCE, len(self._strange)))], over

    def end_of(self, conn: Connection) -> End | None:
        """How one that is searched for has ended, unless its socket may be about to be connected once more."""
        end = self.sockets.end_of(conn.cookie) if conn in self._unlocated else None
        if end is None or (end.active and self.positions.unplaced(conn)):
            return None
        if -1 not in (conn.only, end.socket.uid) and conn.only != end.socket.uid:
            return None  # somebody else's
        return end

    def too_many(self, conn: Connection) -> bool:
        """Its user has more connections than it may, since the kernel has taken a slot by itself."""
        return conn.user.connections > self.per_user

    # --- slots --------------------------------------------------------------------------------------------------------

    def _take(
        self,
        cookie: int,
        endpoints: Endpoints | None,
        expires: float,
        slot: int | None = None,
        *,
        session: Session | None = None,
    ) -> Connection:
        user = self._nobody if session is None else session.user
        if slot is None and session is not None and user.connections >= self.per_user:
            raise HintError(
                "selector",
                f"user {user.uid} has {user.connections} connections already",
                "raise limits.max_connections_per_user, or complete transfers that are done",
                exhausted=True,
            )
        if slot is None and cookie and (found := self.keys.slot_of(cookie)) is not None and self.table.lent[found]:
            slot = found  # the kernel's choice, of which we are still to hear
        if slot is not None:
            lane, band = int(self.table.lane[slot]), int(self.table.band[slot])
            self.table.adopt(slot)
            self.table.expires_ns[slot] = max(int(self.table.expires_ns[slot]), int(expires * NS))
            self._lent -= 1
        else:
            lane, band = 0, self._default
            try:
                slot = self.table.take(self._default, lane, int(expires * NS))
            except TableFullError:
                raise HintError(
                    "selector",
                    f"the connection table is full ({len(self.table)} slots)",
                    "raise daemon.slots, or complete transfers that are done",
                    exhausted=True,
                ) from None
        conn = Connection(slot, cookie, None, lane, user, band=band, expires=expires)
        user.connections += 1
        tcp = endpoints is None or endpoints.protocol == IPPROTO_TCP
        self._enter_lane(conn, self.tenants.join(slot, user.uid), tcp=tcp)
        self.positions.begin(slot)
        self.peer[slot] = -1
        self.tenancy[slot] += 1
        self.by_slot[slot] = conn
        if endpoints is not None:
            self._set_endpoints(conn, endpoints)
            self._by_tuple[endpoints] = conn
            self.keys.add_tuple(endpoints, slot)
            self._unseen[slot] = LONG_AGO
        if cookie:
            self.by_cookie[cookie] = conn
            self.keys.add_cookie(cookie, slot)
        return conn

    def lend(self) -> None:
        """Keep the kernel supplied with slots that it may take by itself, if it does."""
        if not self.sockets.tells:
            return
        wanted = min(LENT, len(self.table) // 8)
        if self._lent <= wanted // 2:
            slots = self.table.reserve(wanted - self._lent)
            self._lent += len(slots)
            self.sockets.lend(slots)

    def _enter_lane(self, conn: Connection, tenant: int, *, tcp: bool = True) -> None:
        """Give a connection the lane that suits its tenant: the one that it has, if that will do."""
        conn.tenant = tenant
        conn.lane = self.table.lane[conn.slot] = self.lanes.take(tenant, tcp=tcp, wish=conn.lane)

    def _leave_lane(self, conn: Connection) -> None:
        self.lanes.give_back(conn.lane, conn.tenant, self.positions.moved_at(conn))

    def alone(self, conn: Connection, now: float) -> bool:
        """Nothing but its own tenant's packets can be queued in its lane."""
        return self.lanes.alone(conn.lane, conn.tenant, now)

    def _set_endpoints(self, conn: Connection, endpoints: Endpoints) -> None:
        conn.endpoints = endpoints
        if endpoints.protocol != IPPROTO_TCP and conn.lane and not self.lanes.one:
            self._leave_lane(conn)
            self._enter_lane(conn, conn.tenant, tcp=False)
        self.peer[conn.slot] = self.peers.take(endpoints.dst)

    def drop(self, conn: Connection) -> None:
        """Forget a connection and free its slot: keys first, so that the kernel never follows a stale one."""
        if conn.cookie:
            self.keys.delete_cookie(conn.cookie)
            self.by_cookie.pop(conn.cookie, None)
        if conn.endpoints is not None:
            self._forget_endpoints(conn, conn.endpoints)
        self.last_stage[conn.slot] = Stage.NONE
        self.mark_set[conn.slot] = 0
        self._unlocated.discard(conn)
        self.positions.forget(conn)
        self.rest_since[conn.slot] = self._unseen[conn.slot] = INF
        conn.user.connections -= 1
        self._leave_lane(conn)
        total = int(self.table.bytes[conn.slot])
        self.tenants.parted.append(Parted(conn.slot, int(self.tenancy[conn.slot]), conn.tenant, total))
        self.tenants.part(conn.slot, conn.tenant)
        self.table.give_back(conn.slot)
        del self.by_slot[conn.slot]

    def _forget_endpoints(self, conn: Connection, endpoints: Endpoints) -> None:
        if self._by_tuple.get(endpoints) is conn:
            self.keys.delete_tuple(endpoints)
            del self._by_tuple[endpoints]
        self.peers.give_back(endpoints.dst)

    # --- what holds a connection --------------------------------------------------------------------------------------

    def note_rest(self, conn: Connection, now: float, *, linger: bool) -> None:
        """Tell whether the connection still has a reason to be known; call after every change of what it carries.

        ``linger``: more is to be expected on it, so it keeps its slot for a while.
        """
        held = bool(conn.watches or conn.marks)
        for stream in () if held else conn.streams:
            if stream.queue:
                held = True
                break
        self.rest_since[conn.slot] = INF if held else now if linger else LONG_AGO

    def set_mark(self, conn: Connection, mark: Mark, now: float, *, on: bool) -> None:
        """Put a mark on a connection, beside those of others, or take it off."""
        (conn.marks.add if on else conn.marks.discard)(mark)
        kinds = frozenset((m.stage, m.due_in, m.gives_way) for m in conn.marks)
        self.mark_set[conn.slot] = self.mark_sets.setdefault(kinds, len(self.mark_sets))
        self.note_rest(conn, now, linger=False)

    def idle(self, now: float, linger: float) -> list[Connection]:
        """Connections at rest for ``linger`` seconds, or past their expiry, or named by a tuple that nothing uses."""
        high = self.table.high
        rest, unseen = self.rest_since[:high], self._unseen[:high]
        over = (rest + linger < now) | ((rest < INF) & (self.table.expires_ns[:high] < int(now * NS)))
        unseen[unseen == LONG_AGO] = now
        unseen[self.table.last_ns[:high] > 0] = INF
        over |= unseen + UNSEEN_S < now
        return [self.by_slot[slot] for slot in np.flatnonzero(over & self.table.used[:high]).tolist()]

    def by_band(self) -> npt.NDArray[np.int64]:
        """How many connections are in each band of each device, shape (devices, 256); one row without devices."""
        used = np.flatnonzero(self.table.used[: self.table.high]).astype(np.int32)
        cells = self.device_of(used).astype(np.int64) * 256 + self.table.band[used]
        return np.bincount(cells, minlength=256 * max(len(self._devices()), 1)).reshape(-1, 256)

    def renew(self, conns: Iterable[Connection], expires: float) -> None:
        """Keep connections alive in the kernel until ``expires`` at least."""
        for conn in conns:
            if conn.expires < expires:
                conn.expires = expires
                self.table.expires_ns[conn.slot] = int(expires * NS)

    def carries(self, conn: Connection, stage: Stage) -> bool:
        """A stage has been announced on a connection. Whether it was unhinted so far: then it is to leave its band."""
        self.last_stage[conn.slot] = stage
        self.rest_since[conn.slot] = INF
        return conn.band == self._default

    def leave_default(self, conn: Connection, band: int) -> bool:
        """Packets of a connection that was unhinted so far go to a band at once; the next tick decides what is best.

        Returns whether it was.
        """
        unhinted = conn.band == self._default
        if unhinted:
            conn.band = self.table.band[conn.slot] = band
        return unhinted

    def device_of(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Index of the device that the last packet of each slot left by; 0 before the first, and for slot -1."""
        indices = self._devices()
        out = np.zeros(len(slots), dtype=np.int32)
        if len(indices) > 1:
            ifindex = np.where(slots >= 0, self.table.ifindex.take(slots), 0)
            for i, known in enumerate(indices):
                out[ifindex == known] = i
        return out
