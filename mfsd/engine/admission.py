# SPDX-License-Identifier: Apache-2.0
"""What hints may add to the books: limits of sessions, users and all together; which names of transfers are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.engine.records import ENTRY
from mfsd.ground.model import HintError

if TYPE_CHECKING:
    from mfsd.engine.books import Books
    from mfsd.engine.positions import Positions
    from mfsd.engine.records import Session, Transfer
    from mfsd.engine.settings import LimitsConfig
    from mfsd.ground.model import Selector


@dataclass(slots=True)
class Admission:
    """See the module."""

    books: Books
    positions: Positions
    limits: LimitsConfig

    def bound(
        self, field: str, what: str, have: int, limit: str, instead: str = "complete those that are done"
    ) -> None:
        """Raise HintError when the session has as many as ``limits.<limit>`` allows."""
        if have >= getattr(self.limits, limit):
            raise HintError(
                field, f"the session has {have} {what}", f"{instead}, or raise limits.{limit}", exhausted=True
            )

    def room(self, session: Session) -> int:
        """How many transfers a session may add whose names are as long as can be."""
        limits, user = self.limits, session.user
        bytes_left = limits.max_mb_per_user * 1e6 - user.bytes
        return min(
            limits.max_transfers_per_session - len(session.transfers),
            limits.max_transfers_per_user - user.transfers,
            limits.max_transfers - self.books.everybody.transfers,
            int(bytes_left) // (ENTRY + limits.max_id_bytes),
        )

    def room_for(self, field: str, session: Session, name: str, more: int = 0, *, transfer: bool = False) -> None:
        """Raise HintError unless a session's user, and all together, have room for it and ``more``."""
        limits, user = self.limits, session.user
        size = user.bytes + (more + 1) * (ENTRY + len(name))
        problem = ""
        if size > limits.max_mb_per_user * 1e6:
            problem, limit = f"user {user.uid} takes {user.bytes / 1e6:.3g} MB already", "max_mb_per_user"
        elif transfer and user.transfers + more >= limits.max_transfers_per_user:
            problem, limit = f"user {user.uid} has {user.transfers} transfers", "max_transfers_per_user"
        elif transfer and self.books.everybody.transfers + more >= limits.max_transfers:
            problem, limit = f"all users together have {self.books.everybody.transfers} transfers", "max_transfers"
        if problem:
            raise HintError(field, problem, f"complete those that are done, or raise limits.{limit}", exhausted=True)

    def check_new(
        self, session: Session, transfer_id: str, at: tuple[Selector, int], more: int = 0, *, known: bool = False
    ) -> None:
        """Raise HintError unless a transfer may be added. ``more`` are about to be, ``known`` says that it is one.

        ``at``: on which connection, and how much had been written to it.
        """
        old = session.transfers.get(transfer_id)
        if known or (old is not None and not self._written(old, *at) and not self.nowhere(old, at[0])):
            raise HintError("transfer.id", f"{transfer_id!r} is announced already", "ids are unique within a session")
        self.bound("transfer.id", "unfinished transfers", len(session.transfers) + more, "max_transfers_per_session")
        self.room_for("transfer.id", session, transfer_id, more, transfer=True)

    def _written(self, transfer: Transfer, selector: Selector, position: int) -> bool:
        """The worker says so, or that it stands behind the transfer's end: it only has to arrive, its name is free."""
        stream = transfer.stream
        placed = position and stream.ordered and stream.selector == selector and len(stream.members) == 1
        end = float(self.books.transfers.get(transfer, "end"))
        return transfer.handed_over or bool(placed and self.books.streams.offset_at(stream, position) >= end)

    def nowhere(self, transfer: Transfer, selector: Selector) -> bool:
        """Its socket is not connected, and ``selector`` is another one: its worker has come by another connection."""
        stream = transfer.stream
        if stream.selector == selector or not stream.members:
            return False
        return len(self.positions.unconnected(stream)) == len(stream.members)

    def has_room(self, session: Session, transfer_id: str) -> bool:
        """A transfer may be added: what ``check_new`` finds out, in one go, because nearly all may."""
        limits, user, known = self.limits, session.user, session.transfers
        return (
            transfer_id not in known
            and len(known) < limits.max_transfers_per_session
            and user.transfers < limits.max_transfers_per_user
            and self.books.everybody.transfers < limits.max_transfers
            and user.bytes + ENTRY + len(transfer_id) <= limits.max_mb_per_user * 1e6
        )
