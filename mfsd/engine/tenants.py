# SPDX-License-Identifier: Apache-2.0
"""Whose connections are whose. A tenant is a user: the owner of the socket, on the kernel's word.

Not the hint's sender: a router that is trusted to speak for all workers spends their budgets, not its own, and nobody
can spend another's by what a message says. Where there is no socket on this host (bridged pods), or none yet, it is the
user whose hint named the connection.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

REMEMBERED: Final = 256
"""Tenants without connections that keep their place, and so what they owe; the oldest go first."""


class Parted(NamedTuple):
    """What a connection was that has been dropped since the last look."""

    slot: int
    tenancy: int
    tenant: int
    bytes: int


class Tenants:
    """Dense indices of tenants, and how many connections each has."""

    def __init__(self, slots: int) -> None:
        self.of: npt.NDArray[np.int32] = np.zeros(slots, dtype=np.int32)
        """By slot: index of the tenant. 0, that of nobody in particular, for free slots."""
        self.parted: list[Parted] = []
        """Connections that have been dropped; whoever counts them empties it."""
        self._uids: list[int] = [-1]
        self._index: dict[int, int] = {-1: 0}
        self._connections: list[int] = [0]
        self._idle: dict[int, None] = {}
        """Indices without connections, the oldest first."""

    def __len__(self) -> int:
        """One past the highest index."""
        return len(self._uids)

    def uid(self, index: int) -> int:
        """The user; -1: nobody knows."""
        return self._uids[index]

    def connections(self, index: int) -> int:
        """How many it has."""
        return self._connections[index]

    def join(self, slot: int, uid: int) -> int:
        """A connection belongs to a user; returns the index."""
        index = self._index.get(uid)
        if index is None:
            index = self._new(uid)
        self._idle.pop(index, None)
        self._connections[index] += 1
        self.of[slot] = index
        return index

    def _new(self, uid: int) -> int:
        if len(self._idle) >= REMEMBERED:
            index = next(iter(self._idle))
            del self._idle[index], self._index[self._uids[index]]
            self._uids[index] = uid
        else:
            index = len(self._uids)
            self._uids.append(uid)
            self._connections.append(0)
        self._index[uid] = index
        return index

    def part(self, slot: int, index: int) -> None:
        """It does not any more."""
        self._connections[index] -= 1
        self.of[slot] = 0
        if not self._connections[index] and index:
            self._idle[index] = None
