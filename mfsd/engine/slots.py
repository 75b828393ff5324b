# SPDX-License-Identifier: Apache-2.0
"""The flow table: one row (slot) per hinted connection, shared with the kernel.

The rows are ordinary memory: mmapped from the classifier's array map in the daemon, plain numpy in tests and in the
simulator. The kernel counts in them and obeys them (bpf/mfsd.h says who writes which field); the engine reads and
writes whole columns at once, so 10,000 connections cost a handful of array operations and no system call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mfsd.datapath import _abi

if TYPE_CHECKING:
    from mfsd.ground.model import Endpoints

NS = 1_000_000_000
QUIET = _abi.SLOT_QUIET
WAITS = _abi.SLOT_WAITS
"""Flags of a slot."""

SlotRows = np.ndarray[Any, np.dtype[Any]]
"""Shape (slots,), dtype _abi.SLOT_DTYPE."""


class TableFullError(Exception):
    """No free slot."""


class KeyMap(Protocol):
    """The two hash maps that lead a packet to its slot."""

    def slot_of(self, cookie: int) -> int | None:
        """The slot that packets of the socket with this SO_COOKIE are led to, by whomever."""
        ...

    def add_cookie(self, cookie: int, slot: int) -> None:
        """Match the local socket with this SO_COOKIE."""
        ...

    def delete_cookie(self, cookie: int) -> None:
        """Undo; no error when absent."""
        ...

    def add_tuple(self, endpoints: Endpoints, slot: int) -> None:
        """Match packets by 5-tuple."""
        ...

    def delete_tuple(self, endpoints: Endpoints) -> None:
        """Undo; no error when absent."""
        ...


class MemoryKeys:
    """Keys without a kernel: for tests and the simulator."""

    def __init__(self) -> None:
        self.cookies: dict[int, int] = {}
        self.tuples: dict[Endpoints, int] = {}

    def slot_of(self, cookie: int) -> int | None:
        """See KeyMap."""
        return self.cookies.get(cookie)

    def add_cookie(self, cookie: int, slot: int) -> None:
        """See KeyMap."""
        self.cookies[cookie] = slot

    def delete_cookie(self, cookie: int) -> None:
        """See KeyMap."""
        self.cookies.pop(cookie, None)

    def add_tuple(self, endpoints: Endpoints, slot: int) -> None:
        """See KeyMap."""
        self.tuples[endpoints] = slot

    def delete_tuple(self, endpoints: Endpoints) -> None:
        """See KeyMap."""
        self.tuples.pop(endpoints, None)


def memory_rows(slots: int) -> SlotRows:
    """Rows that no kernel sees."""
    return np.zeros(slots, dtype=_abi.SLOT_DTYPE)


class FlowTable:
    """Takes and gives back slots; exposes their columns.

    ``used`` (shape (slots,)) is the daemon's own note of which rows are taken; the kernel's is ``expires_ns`` != 0.
    """

    def __init__(self, rows: SlotRows) -> None:
        if rows.dtype != _abi.SLOT_DTYPE:
            raise ValueError(f"rows have dtype {rows.dtype}, expected _abi.SLOT_DTYPE")
        self.rows = rows
        self.expires_ns: npt.NDArray[np.uint64] = rows["expires_ns"]
        self.lane: npt.NDArray[np.uint16] = rows["lane"]
        self.band: npt.NDArray[np.uint8] = rows["band"]
        self.flags: npt.NDArray[np.uint8] = rows["flags"]
        self.bytes: npt.NDArray[np.uint64] = rows["bytes"]
        self.sent: npt.NDArray[np.uint64] = rows["sent"]
        self.acked: npt.NDArray[np.uint64] = rows["acked"]
        self.origin: npt.NDArray[np.uint32] = rows["origin"]
        self.ifindex: npt.NDArray[np.uint32] = rows["ifindex"]
        self.packets: npt.NDArray[np.uint64] = rows["packets"]
        self.last_ns: npt.NDArray[np.uint64] = rows["last_ns"]
        self.used: npt.NDArray[np.bool_] = np.zeros(len(rows), dtype=np.bool_)
        self.lent: npt.NDArray[np.bool_] = np.zeros(len(rows), dtype=np.bool_)
        """Reserved for somebody else to take."""
        self._free = list(range(len(rows) - 1, -1, -1))
        self._taken = 0
        self.high = 0
        """One past the highest slot ever taken: columns need to be read up to here only."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taken(self) -> int:
        """Slots in use."""
        return self._taken

    def take(self, band: int, lane: int, expires_ns: int) -> int:
        """Claim a slot with its counters at zero. Raises TableFullError.

        The caller inserts the keys afterwards, so that the kernel never sees a half-written row.
        """
        if not self._free:
            raise TableFullError
        slot = self._free.pop()
        row = self.rows[slot]
        generation = (int(row["generation"]) + 1) & 0xFFFFFFFF
        self.rows[slot] = np.zeros((), dtype=_abi.SLOT_DTYPE)
        row["generation"], row["lane"], row["band"] = generation, lane, band
        row["expires_ns"] = expires_ns
        self.adopt(slot)
        return slot

    def reserve(self, count: int) -> list[int]:
        """Up to ``count`` free slots that somebody else (the kernel) may take; they count as neither used nor free."""
        count = min(count, len(self._free) // 2)
        slots, self._free = self._free[len(self._free) - count :], self._free[: len(self._free) - count]
        self.lent[slots] = True
        return slots

    def adopt(self, slot: int) -> None:
        """A reserved slot has been taken; its row is filled in already."""
        self.used[slot], self.lent[slot] = True, False
        self._taken += 1
        self.high = max(self.high, slot + 1)

    def give_back(self, slot: int) -> None:
        """Free a slot whose keys have been deleted. The row says so to packets already past the key lookup."""
        self.expires_ns[slot] = 0
        self.band[slot] = _abi.BAND_KEEP
        self.used[slot] = False
        self._taken -= 1
        self._free.append(slot)
