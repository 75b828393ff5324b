# SPDX-License-Identifier: Apache-2.0
"""Connections of which nothing is known yet but their socket's cookie, and the search for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

from mfsd.engine.slots import NS
from mfsd.ground.model import INF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.engine.records import Connection
    from mfsd.engine.slots import FlowTable

LOCATE_S: Final = 1.0
"""A cookie that no socket has for so long is reported as gone."""
UNCONNECTED_S: Final = 10.0
"""So long where the kernel tells of sockets, if nothing was known to have been written to it when a transfer was
announced: it may be about to be connected."""
MARKED_S: Final = 60.0
"""So long there if it was marked, as pools and groups do when they make their sockets."""
RETRY_S: Final = 0.1
SILENT_S: Final = 3.0
"""So is one that has sent nothing but acknowledgements since it was hinted, and those so long ago: its socket was being
closed. One that has sent more lives where nobody can look, such as an unconnected UDP socket, or one in a network
namespace other than the daemon's that is older than the daemon."""
AT_ONCE: Final = 64
"""Connections that are searched for in one tick, and that are given up: some may have been over, and end."""
SYN: Final = 1
"""Bytes, as TCP counts."""


@dataclass(slots=True)
class _Search:
    """The search for the socket of a cookie."""

    wait_s: float
    """How long it takes to be given up."""
    over: bool
    """It had one, which could not be connected."""
    next_try: float = 0.0
    since: float = INF
    """When it was found for the first time that there is none."""


@dataclass(slots=True)
class Unlocated:
    """All of them."""

    table: FlowTable
    _searches: dict[Connection, _Search] = field(default_factory=dict)

    def __contains__(self, conn: object) -> bool:
        return conn in self._searches

    def add(self, conn: Connection, wait_s: float = LOCATE_S, *, over: bool = False) -> None:
        """Search for a socket from now on, for so long. ``over``: the one that there was could not be connected."""
        self._searches[conn] = _Search(wait_s, over)

    def discard(self, conn: Connection) -> None:
        """It is found, or nobody wants to know. No error when it is not here."""
        self._searches.pop(conn, None)

    def due(self, now: float) -> Iterator[Connection]:
        """Those to look for now, at most AT_ONCE; who is found is to be discarded before the next one is asked for."""
        due = (conn for conn, search in self._searches.items() if now >= search.next_try)
        for conn in list(islice(due, AT_ONCE)):
            search = self._searches[conn] = self._searches.pop(conn)  # the others are first next time
            search.next_try = now + RETRY_S
            yield conn

    def given_up(self, conn: Connection, now: float) -> bool:
        """A connection has not been found again; for long enough to say that it is gone."""
        search = self._searches[conn]
        search.since = min(search.since, now)
        if now > search.since + LOCATE_S:
            search.next_try = now + LOCATE_S
        wait_s = LOCATE_S if self._was_connected(conn) else search.wait_s
        return now >= search.since + wait_s and (search.over or self._silent(conn.slot, now))

    def _was_connected(self, conn: Connection) -> bool:
        """So it will not be any more: it has sent something, or its worker says that all is written."""
        said = (x.handed_over for stream in conn.streams for x in stream.queue)
        return bool(self.table.last_ns[conn.slot]) or any(said)

    def _silent(self, slot: int, now: float) -> bool:
        last, moved = int(self.table.last_ns[slot]), int(self.table.sent[slot])
        if self.table.acked[slot]:  # else counted from 0 on: what acknowledges in TIME_WAIT is no full socket
            moved = (moved - int(self.table.origin[slot])) & 0xFFFFFFFF
        return not last or (moved <= SYN and last < int((now - SILENT_S) * NS))
