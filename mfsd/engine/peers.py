# SPDX-License-Identifier: Apache-2.0
"""The hosts at the far end of connections, and what is known of the links into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.model import Address


class Peers:
    """Dense indices of the remote addresses of live connections, given back with the last connection to one."""

    def __init__(self, far_rate: Callable[[Address], float] | None) -> None:
        """``far_rate``: bytes/s of the link into a host, inf if unknown; None: nothing is known of any."""
        self._far_rate = far_rate
        self._index: dict[Address, int] = {}
        self._users: list[int] = []
        self._free: list[int] = []
        self.rate: npt.NDArray[np.float64] = np.zeros(0)
        """Bytes/s by peer, shape (indices in use at most,); stays empty while nothing is known of any."""

    def __len__(self) -> int:
        """Indices given out so far; more than live peers only where some have gone."""
        return len(self._users)

    def take(self, address: Address) -> int:
        """Index of an address, for one more connection."""
        index = self._index.get(address)
        if index is None:
            if self._free:
                index = self._free.pop()
            else:
                index = len(self._users)
                self._users.append(0)
                if self._far_rate is not None:
                    self.rate = np.append(self.rate, np.inf)
            self._index[address] = index
            if self._far_rate is not None:
                self.rate[index] = self._far_rate(address)
        self._users[index] += 1
        return index

    def give_back(self, address: Address) -> None:
        """One connection to it is gone."""
        index = self._index[address]
        self._users[index] -= 1
        if not self._users[index]:
            del self._index[address]
            self._free.append(index)
