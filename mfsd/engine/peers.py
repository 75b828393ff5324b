# SPDX-License-Identifier: Apache-2.0
"""The hosts at the far end of connections, and what is known of the links into them.

The configuration says what such a link carries, or it is learnt: the most that a peer has acknowledged while nothing
but the network held its sender back (probes.py finds such windows). A sender sees its own share of a link only, so what
is learnt may be too little, and whoever trusts it gives up transfers that would be in time. Hence

* the largest of the last 30 s counts, and nothing before it was seen five times;
* with several peers it is used only above the fair share of our own link, that link's rate by the number of peers: who
  sends to so many hosts is one of so many senders to each, by and large, and what is no more than a fair share may well
  be our share of a link that they use, too;
* with one peer that says nothing, for nothing is above our whole link. There must be more to go by then: many windows,
  in the course of ten seconds, that agree. What a link carries is always the same, a share of it varies as the others'
  windows grow and shrink;
* it is audited: if more than 2 % of the transfers that were given up arrive in time after all, it is raised by a
  quarter.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.engine.sockets import Progress
    from mfsd.ground.model import Address
    from mfsd.policy.views import F8

SEEN_S: Final = 30.0
"""What was seen counts for at least so long, and for AGE_S more at most."""
AGE_S: Final = 5.0
AGES: Final = int(SEEN_S / AGE_S) + 1
SIGHTINGS: Final = 5
"""Windows to be seen within that time before they mean anything."""
MANY: Final = 20
"""Windows to be seen of a single peer, in LONG ages at least."""
LONG: Final = 4
STEADY: Final = 0.05
"""Standard deviation by mean, up to which they agree. A port of our own shows 0.02; half of one, shared with a single
other connection for a minute, never less than 0.10 in ten seconds and 0.12 in fifteen (both at 100 Mbit/s, cubic)."""
SLOWER: Final = 1.1
"""Our own link by what a single peer's is taken to carry, at least: with less between them it says nothing."""
WRONG: Final = 0.02
"""Share of the transfers given up that may arrive in time."""
RAISE: Final = 1.25
REMEMBERED: Final = 1024
"""Peers without connections whose rate is kept; the oldest go first."""
GRAIN_US: Final = 4000
"""TCP counts the time for which it was limited in jiffies (net/ipv4/tcp.c, tcp_get_info_chrono_stats): 4 ms at most
with the usual HZ of 250."""
SLACK: Final = 0.05
"""Share of a window for which a connection may have been limited by something else."""
QUEUED_BYTES: Final = 4096
"""Memory of packets below TCP, above which some of them wait in our own queues: a qdisc that is empty holds none."""


def limited_by_network(before: Progress, after: Progress, seconds: float) -> bool:
    """Whether nothing but the network beyond our own queues held a connection back between two looks at it.

    Not so if its process or its socket's buffer gave too little, the receiver's window was closed, it was still in slow
    start, or packets of it waited in a qdisc of ours.
    """
    window = seconds * 1e6
    slack = GRAIN_US + SLACK * window
    return (
        after.busy_us - before.busy_us >= window - slack
        and after.rwnd_limited_us - before.rwnd_limited_us <= slack
        and after.sndbuf_limited_us - before.sndbuf_limited_us <= slack
        and max(before.queued, after.queued) <= QUEUED_BYTES
        and not after.app_limited
        and not after.slow_start
    )


class Known(NamedTuple):
    """What is known of one peer, for operators; rates in bytes/s."""

    address: Address
    configured: float
    """inf: not."""
    learnt: float
    """With what the audit has added; 0: nothing."""
    sightings: int
    used: float
    """What policies are shown; inf: nothing."""
    given_up: int
    """Transfers to it that were given up while what was learnt was in use, and have ended; since it was raised last."""
    in_time: int
    """How many of them were in time after all, or 0 since it was raised."""
    raised: float
    """By the audit, as a factor."""


BEST, SEEN, SUM, SQUARES = range(4)
"""What is kept of the windows of an age: the largest rate, their number, sum and sum of squares of the rates."""


class _Columns:
    """Numbers by peer, shape (peers,) or (peers, 4, AGES)."""

    def __init__(self, n: int) -> None:
        self.configured = np.full(n, np.inf)
        self.windows = np.zeros((n, 4, AGES))
        self.raised = np.ones(n)
        self.given_up = np.zeros(n, dtype=np.int64)
        self.in_time = np.zeros(n, dtype=np.int64)


class Peers:
    """Dense indices of the remote addresses of live connections, given back with the last connection to one."""

    def __init__(self, far_rate: Callable[[Address], float] | None) -> None:
        """``far_rate``: bytes/s of the link into a host, inf if unknown; None: nothing is configured."""
        self._far_rate = far_rate
        self._index: dict[Address, int] = {}
        self._address: list[Address] = []
        """By index; of those that are not live, the last one."""
        self._users: list[int] = []
        self._free: list[int] = []
        self._age = 0
        """Number of the current age; its column is that modulo AGES."""
        self._columns = _Columns(0)
        self._remembered: OrderedDict[Address, tuple[int, F8, float]] = OrderedDict()
        """Of peers without connections: age when they went, windows, raised."""
        self.rate: F8 = np.zeros(0)
        """Bytes/s by peer, as policies are shown it, shape (indices in use at most,); inf: unknown. Stays empty while
        nothing is known of any."""

    def __len__(self) -> int:
        """Indices given out so far; more than live peers only where some have gone."""
        return len(self._users)

    @property
    def live(self) -> int:
        """Peers with connections."""
        return len(self._index)

    def index(self, address: Address) -> int:
        """Of an address; -1: no connection leads there."""
        return self._index.get(address, -1)

    def take(self, address: Address) -> int:
        """Index of an address, for one more connection."""
        index = self._index.get(address)
        if index is None:
            if self._free:
                index = self._free.pop()
            else:
                index = len(self._users)
                self._users.append(0)
                self._address.append(address)
                if index >= len(self._columns.raised):
                    self._grow(max(16, 2 * index))
            self._index[address], self._address[index] = index, address
            self._begin(index, address)
        self._users[index] += 1
        return index

    def give_back(self, address: Address) -> None:
        """One connection to it is gone."""
        index = self._index[address]
        self._users[index] -= 1
        if not self._users[index]:
            del self._index[address]
            self._free.append(index)
            c = self._columns
            if c.windows[index].any():
                self._remembered[address] = self._age, c.windows[index].copy(), c.raised[index]
                if len(self._remembered) > REMEMBERED:
                    self._remembered.popitem(last=False)
            self._clear(index)

    def _grow(self, n: int) -> None:
        old, self._columns = self._columns, _Columns(n)
        for name, column in vars(old).items():
            getattr(self._columns, name)[: len(column)] = column

    def _clear(self, index: int) -> None:
        fresh = _Columns(1)
        for name, column in vars(self._columns).items():
            column[index] = getattr(fresh, name)[0]
        if index < len(self.rate):
            self.rate[index] = np.inf

    def _begin(self, index: int, address: Address) -> None:
        c = self._columns
        if self._far_rate is not None:
            c.configured[index] = self._far_rate(address)
        if len(self.rate) or np.isfinite(c.configured[index]):
            self.rate = np.append(self.rate, np.full(len(self) - len(self.rate), np.inf))
            self.rate[index] = c.configured[index]
        if address in self._remembered:
            age, windows, raised = self._remembered.pop(address)
            c.windows[index], c.raised[index] = np.where(self._past(age), 0.0, windows), raised

    # --- learning -----------------------------------------------------------------------------------------------------

    @property
    def configured(self) -> npt.NDArray[np.bool_]:
        """The rate of whose link is in the configuration, so that there is nothing to learn, shape (len(self),)."""
        return np.asarray(np.isfinite(self._columns.configured[: len(self)]))

    def saw(self, index: int, rate: float, now: float) -> None:
        """A peer has acknowledged so many bytes/s for a while in which nothing but the network held us back."""
        self._advance(now)
        windows = self._columns.windows[index, :, self._age % AGES]
        windows[BEST] = max(windows[BEST], rate)
        windows[SEEN:] += 1, rate, rate * rate

    def _past(self, age: int) -> npt.NDArray[np.bool_]:
        """Which columns have begun anew since an age, shape (AGES,)."""
        passed = np.arange(age + 1, min(self._age, age + AGES) + 1) % AGES
        return np.isin(np.arange(AGES), passed)

    def _advance(self, now: float) -> None:
        age = int(now // AGE_S)
        if age > self._age:
            before, self._age = self._age, age
            self._columns.windows[:, :, self._past(before)] = 0.0

    def learnt(self, now: float) -> F8:
        """Bytes/s that each peer is known to have taken, raised by the audit, shape (len(self),); 0: nothing yet."""
        self._advance(now)
        c, n = self._columns, len(self)
        enough = c.windows[:n, SEEN].sum(axis=1) >= SIGHTINGS
        return np.where(enough, c.windows[:n, BEST].max(axis=1) * c.raised[:n], 0.0)

    def _alone(self, link: float) -> npt.NDArray[np.bool_]:
        """Whether many windows agree on less than our own link, shape (len(self),)."""
        windows = self._columns.windows[: len(self)]
        n, total, squares = (windows[:, what].sum(axis=1) for what in (SEEN, SUM, SQUARES))
        often = (n >= MANY) & ((windows[:, SEEN] > 0).sum(axis=1) >= LONG)
        # Variance n squares - total^2 of the sum, by total^2; without windows 0 <= 0.
        steady = n * squares <= (1.0 + STEADY**2) * total**2
        return np.asarray(often & steady & (windows[:, BEST].max(axis=1) * SLOWER < link))

    def refresh(self, now: float, link: float) -> None:
        """Say anew what policies are shown. ``link``: bytes/s of the fastest of our own, 0: unknown."""
        learnt, configured = self.learnt(now), self._columns.configured[: len(self)]
        # What is as fast as our own link sets no limit.
        of_use = learnt < link
        of_use &= learnt > link / self.live if self.live > 1 else self._alone(link)
        rate = np.where(np.isfinite(configured), configured, np.where(of_use, learnt, np.inf))
        self.rate = rate if np.isfinite(rate).any() else np.zeros(0)

    def judged_by_what_was_learnt(self) -> npt.NDArray[np.bool_]:
        """Peers that policies are shown a learnt rate of, shape (len(self.rate),)."""
        return np.isfinite(self.rate) & ~self.configured[: len(self.rate)]

    def ended(self, address: Address, *, in_time: bool) -> None:
        """A transfer that had been given up by what was learnt has ended."""
        index = self._index.get(address)
        if index is None:
            return
        c = self._columns
        c.given_up[index] += 1
        c.in_time[index] += in_time
        if c.in_time[index] > WRONG * c.given_up[index]:
            c.raised[index] *= RAISE
            c.given_up[index] = c.in_time[index] = 0

    def address(self, index: int) -> Address:
        """Of a live peer."""
        return self._address[index]

    def known(self, now: float) -> list[Known]:
        """All peers of which something is known, those with the least rate first."""
        learnt, c = self.learnt(now), self._columns
        shown = np.append(self.rate, np.full(len(self) - len(self.rate), np.inf))
        out = [
            Known(
                address,
                float(c.configured[i]),
                float(learnt[i]),
                int(c.windows[i, SEEN].sum()),
                float(shown[i]),
                int(c.given_up[i]),
                int(c.in_time[i]),
                float(c.raised[i]),
            )
            for address, i in self._index.items()
            if np.isfinite(c.configured[i]) or c.windows[i].any()
        ]
        return sorted(out, key=lambda k: (min(k.configured, k.learnt or np.inf), str(k.address)))
