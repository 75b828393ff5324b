# SPDX-License-Identifier: Apache-2.0
"""The one estimator of what a link gives.

Bytes over *busy* time: an interval counts when the qdisc had a backlog at both of its ends, so idle gaps never pull
the estimate down, and time spent queueing in front of a transfer never counts as slowness of the link. Everything
that needs a rate (MLU, give-up, RED's feasibility) asks here; two estimators would contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from mfsd.policy.usage import LOAD_TAU_S, PACKET, Pauses

MIN_BUSY_S: Final = 0.010
"""Busy time to gather before it counts as one sample."""
MIN_BUSY_BYTES: Final = 8 * PACKET
"""And bytes: fewer measure the granularity of GSO packets, of which on slow links none passes between two readings."""
MOST_BUSY_S: Final = 1.0
"""Busy time in which a sample counts whatever has passed: the link may be slower than anybody thinks."""
PASSING: Final = 0.05
"""Share of the rate: less that is above the collectives is none."""
GAIN: Final = 0.25
"""Weight of a new sample in the exponential average."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Cumulative counters of a device."""

    at: float
    """When they were read, CLOCK_MONOTONIC seconds."""
    sent: int
    """Bytes that the root qdisc has let out."""
    backlog: int
    """Bytes queued now."""
    offered: npt.NDArray[np.float64]
    """Bytes that came to each band, shape (bands,): unhinted ones to the default band."""


@dataclass(slots=True)
class LinkEstimator:
    """Rate and load of one port. Feed it ``observe`` every 20-50 ms.

    ``configured`` is the rate to assume until the link has been busy (bytes/s); a measurement never exceeds it by more
    than the counters' grain, but may lie below (pause frames, a slower lower device, a shared wire).
    """

    configured: float
    bands: int
    measured: float = 0.0
    """Bytes/s while busy; 0: never busy yet."""
    utilisation: float = 0.0
    """Share of the last interval's capacity that was used, 0..1."""
    band_load: npt.NDArray[np.float64] = field(init=False)
    """Shape (bands,): share of the rate that each band offered lately."""
    pauses: Pauses = field(default_factory=Pauses)
    _last: tuple[float, int, bool] | None = None
    _band_bytes: npt.NDArray[np.float64] | None = None
    _busy_s: float = 0.0
    _busy_bytes: float = 0.0

    def __post_init__(self) -> None:
        self.band_load = np.zeros(self.bands)

    @property
    def rate(self) -> float:
        """Best knowledge of the rate, bytes/s."""
        return self.measured or self.configured

    def observe(self, reading: Reading, collectives: int = -1, left: float = 1.0) -> None:
        """Take the device's counters.

        ``collectives``: their band, -1 if they have none; ``left``: share of the rate that it got lately while it had
        something to send.
        """
        now, sent, busy, band_bytes = reading.at, reading.sent, reading.backlog > 0, reading.offered
        if self._last is not None and self._band_bytes is not None:
            then, sent_then, busy_then = self._last
            dt, done = now - then, sent - sent_then
            if dt <= 0 or done < 0:  # counters were reset: start over from here
                self._last, self._band_bytes = (now, sent, busy), band_bytes.copy()
                return
            if busy and busy_then:
                self._busy_s += dt
                self._busy_bytes += done
                enough = self._busy_bytes >= MIN_BUSY_BYTES and self._busy_s >= MIN_BUSY_S
                if enough or self._busy_s >= MOST_BUSY_S:
                    sample = self._busy_bytes / self._busy_s
                    self.measured = sample if not self.measured else self.measured + GAIN * (sample - self.measured)
                    self._busy_s = self._busy_bytes = 0.0
            if self.rate > 0:
                self.utilisation = min(done / (dt * self.rate), 1.0)
                share = np.maximum(band_bytes - self._band_bytes, 0.0) / (dt * self.rate)
                weight = 1.0 - np.exp(-dt / LOAD_TAU_S)
                self.band_load += weight * (np.minimum(share, 1.0) - self.band_load)
                # What passes the collectives takes all it can get, so what they send meanwhile says nothing of pauses.
                if collectives >= 0 and share[:collectives].sum() <= PASSING:
                    self.pauses.observe(float(share[collectives]), left, dt)
        self._last, self._band_bytes = (now, sent, busy), band_bytes.copy()

    @property
    def load(self) -> float:
        """Rho over all bands, 0..1."""
        return float(min(self.band_load.sum(), 1.0))
