# SPDX-License-Identifier: Apache-2.0
"""The thread that touches one device's qdiscs for the engine.

Requests to the kernel may wait for the rtnl lock. Here they do so without holding up the event loop: orders are taken
in turn, what has become stale meanwhile is not done, and results wait to be fetched.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from mfsd.datapath.errors import DatapathError
from mfsd.engine.device import Rescued
from mfsd.engine.estimator import Reading
from mfsd.host import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
    from mfsd.engine.device import Rescue
    from mfsd.ground.bands import Bands

T = TypeVar("T")

FRESH_S: Final = 0.1
"""How long a look at a lane is worth something."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Qdiscs of ours in force on a device."""

    enforcer: DeviceEnforcer
    lanes: tuple[tuple[int, int], ...]
    """(classid of lane 0, number of lanes) per band."""

    def lane(self, band: int, lane: int) -> tuple[int, int]:
        """As the classifier does: a band may have fewer lanes on this device than the table knows."""
        return band, lane % self.lanes[band][1]


class Hands:
    """Carries out orders for one device, whose qdiscs may change from call to call."""

    def __init__(self, name: str, failed: Callable[[str, Any, Exception], None]) -> None:
        """``failed(what, shape, error)`` is called from the thread."""
        self._failed = failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"mfsd-{name}")
        self._thread.submit(bool)  # it starts now: when it is needed there may be none to be had
        self._lock = threading.Lock()
        self._readings: deque[Reading] = deque(maxlen=1)
        self._reading = False
        self._rescued: list[Rescued] = []
        self._looked: dict[tuple[int, int], tuple[float, int]] = {}
        self._looking: set[tuple[int, int]] = set()
        self._shares: Mapping[int, float] | None = None

    def close(self) -> None:
        """Idempotent."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _do(self, what: str, shape: Any, work: Callable[[], None]) -> None:
        def body() -> None:
            try:
                work()
            except (OSError, DatapathError) as e:
                self._failed(what, shape, e)

        self._thread.submit(body)

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Have the thread find something out, in its turn."""
        return self._thread.submit(work)

    # --- counters -----------------------------------------------------------------------------------------------------

    def read(self, shape: Any, classifier: Classifier, bands: Bands) -> Reading | None:
        """The last reading, and an order for another."""
        if not self._reading:
            self._reading = True
            self._do("read", shape, lambda: self._read(shape.enforcer, classifier, bands))
        return self._readings.popleft() if self._readings else None

    def _read(self, enforcer: DeviceEnforcer, classifier: Classifier, bands: Bands) -> None:
        try:
            sent, backlog = enforcer.link_bytes()
            offered = classifier.bands()["bytes"][: len(bands)].astype(np.float64)
            # The classifier counts hinted packets alone; what else came to the qdisc is the default band's.
            offered[bands.default.index] += sent + backlog - offered.sum()
            self._readings.append(Reading(clock.monotonic(), sent, backlog, offered))
        finally:
            self._reading = False

    def empty(self, shape: Shape, band: int, lane: int) -> bool:
        """The lane was empty when it was last looked at; orders a look where that is long ago."""
        key = shape.lane(band, lane)
        at, backlog = self._looked.pop(key, (0.0, 1))
        if at > clock.monotonic() - FRESH_S:
            return backlog == 0
        if key not in self._looking:
            self._looking.add(key)
            self._do("backlog", shape, lambda: self._look(shape.enforcer, key))
        return False

    def _look(self, enforcer: DeviceEnforcer, key: tuple[int, int]) -> None:
        try:
            self._looked[key] = clock.monotonic(), enforcer.backlog(*key)[0]
        finally:
            self._looking.discard(key)

    # --- rescue -------------------------------------------------------------------------------------------------------

    def rescue(self, shape: Shape, orders: Sequence[Rescue]) -> None:
        """Purge the lanes of these orders, together."""
        self._do("purge", shape, lambda: self._rescue(shape, orders))

    def _rescue(self, shape: Shape, orders: Sequence[Rescue]) -> None:
        stuck: dict[Rescue, tuple[int, int]] = {}
        freed: dict[tuple[int, int], int] = {}
        try:
            for order in orders:
                key = shape.lane(order.band, order.lane)
                if shape.enforcer.backlog(*key)[0]:
                    stuck[order] = key
            if stuck:
                purged = shape.enforcer.purge(list(dict.fromkeys(stuck.values())))
                freed = {(p.band, p.lane): p.bytes for p in purged}
        finally:
            with self._lock:
                self._rescued += [Rescued(o, freed.get(stuck[o], 0) if o in stuck else 0) for o in orders]

    def rescued(self) -> list[Rescued]:
        """What has been carried out since the last call."""
        with self._lock:
            done, self._rescued = self._rescued, []
        return done

    # --- guarantees ---------------------------------------------------------------------------------------------------

    def guarantee(self, shape: Shape, shares: Mapping[int, float]) -> None:
        """Change what bands are guaranteed. Orders that the thread has not come to yet are replaced by this one."""
        waiting, self._shares = self._shares, shares
        if waiting is None:
            self._do("guarantee", shape, lambda: self._guarantee(shape.enforcer))

    def _guarantee(self, enforcer: DeviceEnforcer) -> None:
        shares, self._shares = self._shares, None
        if shares is not None:
            enforcer.guarantee(shares)
