# SPDX-License-Identifier: Apache-2.0
"""Follows the transfers that were given up because of a learnt rate, to see whether they arrive in time after all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.records import Transfer
    from mfsd.ground.model import Address


@dataclass(slots=True)
class Audit:
    """See the module. What it finds goes to the peers."""

    books: Books
    connections: Connections
    _given_up: dict[Transfer, Address] = field(default_factory=dict)

    def note(self) -> None:
        """Take down who has been given up since the last call; after the policy has decided."""
        peers, t = self.connections.peers, self.books.transfers
        if not len(peers.rate) or not (learnt := peers.judged_by_what_was_learnt()).any():
            return
        noted = t.live("given_up")
        new = np.flatnonzero(t.live("infeasible") & ~noted)
        if not len(new):
            return
        peer = self.connections.peer.take(self.books.streams.slot.take(t.live("stream")[new]))
        on = np.append(learnt, False).take(peer)  # peer -1 takes the last
        noted[new[on]] = True
        for row, index in zip(new[on].tolist(), peer[on].tolist(), strict=True):
            self._given_up[t.objects[row]] = peers.address(index)

    def ended(self, transfers: Sequence[Transfer], delivered_at: Sequence[float] | None) -> None:
        """Transfers are about to be struck out, each delivered then; None: they were not."""
        if not self._given_up:
            return
        for i, transfer in enumerate(transfers):
            address = self._given_up.pop(transfer, None)
            if address is not None:
                deadline = float(self.books.transfers.get(transfer, "deadline"))
                in_time = delivered_at is not None and delivered_at[i] <= deadline
                self.connections.peers.ended(address, in_time=in_time)
