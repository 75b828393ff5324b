# SPDX-License-Identifier: Apache-2.0
"""What transfers ask of a link, in the order of their deadlines: the demand bound.

With R_i the bytes left and T_i the time left of the i-th by deadline, a link must give the first k together

    u_k = (R_1 + ... + R_k) / T_k

to have them all in time; earliest deadline first does it at the rate of the largest u_k, and nothing does it at less
(the processor demand criterion of Baruah et al., "Preemptively scheduling hard-real-time sporadic tasks on one
processor", RTSS 1990, for jobs that are all there). So a link is overloaded if some u_k exceeds what it can give, and
the i-th transfer is in time as long as the link gives the largest u_k with k >= i to those before and at k.

Thousands of transfers needn't be sorted for that: they are counted in buckets of time left, 32 to each power of two,
so that what is in one differs by 1 in 32 at most. All of a bucket are due when its first is. Errors are to the safe
side, by 3 % at most, and there is none where transfers are few or due together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, F8, I4

_SHIFT: Final = 23 - 5
"""Five of the 23 bits of a float32's mantissa: its upper bits as an integer grow with it, and so number its bucket."""
_SHORTEST: Final = 2.0**-10
"""Seconds. What has less time left, or none, is in one bucket."""
_LONGEST: Final = 2.0**12


def _upper_bits(seconds: F8) -> I4:
    bits: I4 = seconds.astype(np.float32).view(np.int32) >> _SHIFT
    return bits


_FIRST: Final = int(_upper_bits(np.array([_SHORTEST]))[0])
BUCKETS: Final = int(_upper_bits(np.array([_LONGEST]))[0]) - _FIRST + 1


def bucket(seconds: F8) -> I4:
    """Number of the bucket of each time left, 0 .. BUCKETS-1, shape as ``seconds``; never falls as they grow."""
    return _upper_bits(seconds.clip(_SHORTEST, _LONGEST)) - np.int32(_FIRST)


@dataclass(frozen=True, slots=True)
class Margin:
    """Time to keep in hand: ``fixed`` seconds, shape (links, 1) or of all links, and a ``share`` of the time left."""

    fixed: float | F8
    share: float

    def on(self, links: npt.NDArray[np.signedinteger]) -> Margin:
        """That of some of the links, in this order."""
        return self if isinstance(self.fixed, float) else Margin(self.fixed.take(links, axis=0), self.share)

    @property
    def twice(self) -> Margin:
        """Double it."""
        return Margin(2.0 * self.fixed, 2.0 * self.share)

    def leave(self, seconds: F8) -> F8:
        """What it leaves of ``seconds``."""
        return seconds * (1.0 - self.share) - self.fixed


@dataclass(slots=True)
class Load:
    """Demand on some links. Matrices have the shape (links, BUCKETS), per-entry arrays that of the entries, (m,)."""

    cell: npt.NDArray[np.signedinteger]
    """Element of the flattened matrices that each entry is counted in, shape (m,)."""
    due: F8
    """Least time left in each bucket, seconds; inf in empty ones."""
    own: F8
    """What is due in the bucket, in seconds of the link at full rate."""
    total: F8
    """What is due in the bucket or before."""

    @classmethod
    def of(cls, link: npt.NDArray[np.signedinteger], seconds: F8, octets: F8, rate: F8) -> Load:
        """``octets`` left and ``seconds`` until they are due (inf: not counted) of each entry, on which ``link``.

        All of shape (m,). ``rate`` in bytes/s, shape (links,); inf where it isn't known.
        """
        shape = (len(rate), BUCKETS)
        cell = link * np.int64(BUCKETS) + bucket(seconds)
        weights = octets * (seconds < np.inf)
        octets_due = np.bincount(cell, weights=weights, minlength=shape[0] * BUCKETS).astype(np.float64, copy=False)
        own = octets_due.reshape(shape) / rate[:, None]
        due = np.full(shape, np.inf)
        np.minimum.at(due.ravel(), cell, seconds)
        return cls(cell, due, own, own.cumsum(axis=1))

    def overloaded(self, room: F8) -> B1:
        """Links that can't have all in time though they give a share ``room`` of their rate, shape (links,)."""
        over: B1 = (self.total > self.due * room[:, None]).max(axis=1)
        return over

    def spare(self, room: F8) -> F8:
        """Seconds of the link that could be due in each bucket and leave all else in time, shape (links, BUCKETS)."""
        free = self.due * room[:, None] - self.total
        return np.minimum.accumulate(free[:, ::-1], axis=1)[:, ::-1]

    def before(self) -> F8:
        """What is due before each entry, in seconds of the link, shape (m,)."""
        return (self.total - self.own).ravel().take(self.cell)

    def well_before(self) -> F8:
        """The same without what is due in the bucket before its own: time that passes moves entries between buckets."""
        own = self.own.copy()
        own[:, 1:] += self.own[:, :-1]
        return (self.total - own).ravel().take(self.cell)


class Need:
    """What it takes to meet a load, if each link gives a share ``room`` of its rate, shape (links,), to it.

    Per-entry results have the shape (m,).
    """

    def __init__(self, load: Load, margin: Margin, room: F8) -> None:
        self._load, self._margin = load, margin
        self._least = load.total / room[:, None]
        self._left = margin.leave(load.due)
        self._late = self._least > self._left
        self._in_time = not self._late.any()

    @cached_property
    def _calm(self) -> F8:
        """Share of the rate that meets what is due so far, with the margin; 0 where that doesn't fit."""
        none = self._late | (self._load.total == 0.0)
        calm: F8 = np.where(none, 0.0, self._load.total / np.where(none, 1.0, self._left))
        return calm

    @cached_property
    def _hurried(self) -> F8:
        """The same without the margin, where it doesn't fit."""
        due = np.maximum(self._load.due, _SHORTEST)
        hurried: F8 = np.where(self._late, self._load.total / due, 0.0)
        return hurried

    def shares(self) -> F8:
        """Share of the rate that the entry and those due before and with it need; 1 and more: the margin is gone."""
        each = self._calm if self._in_time else np.where(self._late, np.maximum(self._hurried, 1.0), self._calm)
        shares: F8 = self._suffix(np.maximum, each)
        return shares

    def late(self) -> B1:
        """The margin does not fit any more: not for this entry, or not for some due later, which waits for it."""
        if self._in_time:
            return np.zeros(len(self._load.cell), dtype=np.bool_)
        late: B1 = self._suffix(np.logical_or, self._late)
        return late

    def later(self) -> B1:
        """Twice the margin does not."""
        later: B1 = self._suffix(np.logical_or, self._least > self._margin.twice.leave(self._load.due))
        return later

    def laxity(self) -> F8:
        """Seconds that it and those due later have to spare if all are served by deadline from now on."""
        laxity: F8 = self._suffix(np.minimum, self._load.due - self._least)
        return laxity

    def spare(self) -> F8:
        """Seconds that each link has to spare before somebody is late, shape (links,)."""
        spare: F8 = (self._load.due - self._least).min(axis=1)
        return spare

    def steady(self) -> F8:
        """Share of its rate at which each link meets all that isn't late, with the margin, shape (links,)."""
        steady: F8 = self._calm.max(axis=1)
        return steady

    def average(self) -> F8:
        """Share of its rate that each link must give on average from now on, shape (links,).

        With the fixed part of the margin only; what has no more than that left does not count.
        """
        left = self._load.due - self._margin.fixed
        waits = left > 0.0
        average: F8 = np.where(waits, self._load.total / np.where(waits, left, 1.0), 0.0).max(axis=1)
        return average

    def rush(self) -> F8:
        """Share of its rate at which each link meets what is late, without any margin, shape (links,)."""
        if self._in_time:
            return np.zeros(len(self._late))
        rush: F8 = self._hurried.max(axis=1)
        return rush

    def _suffix(self, ufunc: np.ufunc, matrix: npt.NDArray[Any]) -> Any:
        """``ufunc`` over the bucket of each entry and all later ones."""
        return ufunc.accumulate(matrix[:, ::-1], axis=1)[:, ::-1].ravel().take(self._load.cell)


def evenly(link: npt.NDArray[np.signedinteger], seconds: F8, octets: F8, rate: F8) -> F8:
    """Share of its rate at which each link meets entries that share it evenly, shape (links,).

    Until the i-th is done, others get as much as it does, or all that they want. Arguments: see Load.of.
    """
    order = np.lexsort((octets, link))
    link, octets, seconds = link.take(order), octets.take(order), seconds.take(order)
    count = np.bincount(link, minlength=len(rate))
    upto = count.cumsum()
    sums = np.concatenate([[0.0], octets.cumsum()])
    done = sums[1:] - sums.take((upto - count).take(link))
    done += octets * (upto.take(link) - 1 - np.arange(len(link)))  # the larger ones
    shares = np.zeros(len(rate))
    np.maximum.at(shares, link, done / (np.maximum(seconds, _SHORTEST) * rate.take(link)))
    return shares
