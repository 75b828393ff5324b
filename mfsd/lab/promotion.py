# SPDX-License-Identifier: Apache-2.0
"""The promotion experiment: how soon a deferred connection gets the link after its level has changed.

Flow A saturates the link at level 1, ``flows`` others want it at the lowest level and starve. Then a hint lifts the
first of them, F, to level 0, above A, and we watch its bytes arrive. Everything goes the daemon's way: hint -> service
-> engine -> table -> classifier -> htb, and rescue unless it is switched off. (docs/architecture.md, "The promotion
stall", says why plain re-classification fails.)

Promotion latency: from the moment *before the hint is given* (so it includes the client's queue, gRPC and the tick) to
the beginning of the first 10 ms in which the flow gets 90 % of what level 0 entitles it to, which is the link.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.client import Client, Stage, cookie_of
from mfsd.lab.bulk import Bulk, lanes_for
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.net import Fabric, LabError
from mfsd.lab.hosts.tcp import FRAME, MSS, tcp_info
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from mfsd.ground.units import Rate
    from mfsd.lab.hosts.tcp import TcpInfo

WINDOW_MS: Final = 10
SHARE: Final = 0.9
NS_PER_MS: Final = 1_000_000
POLICY: Final = {"name": "deadline-ladder", "kv": "rli"}
"""So that the stage alone makes the level: collectives, then KV reuse, far below it P2D without a deadline."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One series of promotions. Times in seconds."""

    flows: int
    rescue: bool
    trials: int
    watch: float
    """How long a promotion is waited for; later ones are censored."""
    rate: Rate
    starve: float = 0.15
    """From A's first byte to the promotion."""
    recover: float = 0.35
    """Without A, before that."""
    settle: float = 0.3
    """After the promotion, over which retransmissions and timeouts are counted: the same for all series."""
    lanes: int | None = None
    """Leaf queues per band; None: enough for one per flow."""
    yields: bool = False
    """Deferred connections yield in the network (network.yield)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One promotion."""

    latency_ms: float | None
    """None: not within the time watched."""
    first_ms: float | None
    """First byte after the promotion."""
    retransmitted: int
    """Segments of the promoted flow within ``settle``."""
    rtos: int
    """Timeouts of the promoted flow within ``settle``."""
    bystander_rtos: int
    """Timeouts of all other deferred flows within ``settle``."""
    bystander_mbps: float
    """Goodput of all other deferred flows together while A pauses before the promotion, Mbit/s."""
    rescued: bool
    """The daemon has freed the flow's lane."""


def latency_ms(arrivals: npt.NDArray[np.int64], since_ns: int, rate: Rate) -> float | None:
    """Beginning of the first window with its share of the link's payload rate, ms after ``since_ns``; None: never.

    ``arrivals`` has shape (k, 2): monotonic ns and bytes. Windows begin at whole milliseconds.
    """
    after = arrivals[arrivals[:, 0] >= since_ns]
    if not len(after):
        return None
    at = (after[:, 0] - since_ns) // NS_PER_MS
    per_ms = np.bincount(at, weights=after[:, 1].astype(np.float64))
    totals = np.concatenate([[0.0], np.cumsum(per_ms), np.full(WINDOW_MS, per_ms.sum())])
    need = SHARE * rate.bytes_per_s * MSS / FRAME * WINDOW_MS / 1000
    full = np.flatnonzero(totals[WINDOW_MS:] - totals[:-WINDOW_MS] >= need)
    return float(full[0]) if len(full) else None


def run(settings: Settings, on_trial: Callable[[], None] = lambda: None) -> list[Trial]:
    """Build a lab, run the series, remove it. One promotion more than asked for is made at first and not counted.

    (The first time that they starve, all connections run into their retransmission timers, whatever happens to F.)
    Raises LabError when the daemon did not do what the experiment is about.
    """
    lanes = settings.lanes or lanes_for(settings.flows + 1)
    options: dict[str, dict[str, Any]] = {
        "policy": POLICY,
        "rescue": {"enabled": settings.rescue},
        "bands": {"lanes": lanes},
        "network": {"yield": "on" if settings.yields else "off", "replace": True},  # the lab's sockets choose cubic
    }
    with (
        tempfile.TemporaryDirectory(prefix="mfsd-") as directory,
        Fabric(["a", "b"]) as fabric,
        Governor(fabric.hosts["a"], Path(directory), settings.rate, options) as governor,
        Bulk(fabric.hosts["a"], fabric.hosts["b"], settings.flows + 1) as bulk,
        Client("promotion", governor.target) as client,
    ):
        series = _Series(settings, bulk, client, governor)
        series.prepare()
        _check_levels(governor, bulk)
        series.trial()
        trials = []
        for _ in range(settings.trials):
            trials.append(series.trial())
            on_trial()
        counters = governor.status().counters
        wanted = settings.rescue and not settings.yields  # who yields may have nothing in its lane
        if counters.promotions < settings.trials or (wanted and not counters.rescues):
            raise LabError(
                f"the daemon counted {counters.promotions} promotions and {counters.rescues} rescues in "
                f"{settings.trials} trials: the experiment did not test what it should"
            )
        return trials


def _check_levels(governor: Governor, bulk: Bulk) -> None:
    """A must stand between level 0 and the others, or nobody starves. Raises LabError."""
    known = governor.control.ListConnections(pb.ListConnectionsRequest(), timeout=5.0).connections
    level = {c.cookie: c.level for c in known}
    *deferred, top = (level.get(cookie_of(s), -1) for s in bulk.sockets)
    if not 0 < top < min(deferred):
        raise LabError(f"A has level {top}, the deferred flows {sorted(set(deferred))}: A must be between 0 and them")


class _Series:
    def __init__(self, settings: Settings, bulk: Bulk, client: Client, governor: Governor) -> None:
        self.settings, self.bulk, self.client, self._governor = settings, bulk, client, governor
        self.deferred, self.top = range(settings.flows), settings.flows
        """Indices of the deferred flows, and of A."""

    def prepare(self) -> None:
        for i, s in enumerate(self.bulk.sockets):
            self.client.mark(s, Stage.KV_REUSE if i == self.top else Stage.P2D)
        if not self.client.flush(5.0) or self.client.stats.rejected:
            raise LabError(f"the daemon did not take the marks: {self.client.stats}")
        self.bulk.want(self.deferred)
        time.sleep(1.0)

    def trial(self) -> Trial:
        s, flow = self.settings, 0
        others = self.deferred[1:]
        self.bulk.want(self.deferred)
        before, _ = self.bulk.received()
        time.sleep(s.recover)
        after, _ = self.bulk.received()
        mbps = int((after - before)[others].sum()) * 8e-6 / s.recover
        self.bulk.watch(flow)
        self.bulk.want([*self.deferred, self.top])
        time.sleep(s.starve)
        info, rescues = self._infos(), self._governor.counters()["rescues"]
        promoted_ns = time.monotonic_ns()
        self.client.mark(self.bulk.sockets[flow], Stage.COLLECTIVE)
        time.sleep(s.settle)
        later = self._infos()
        if s.watch > s.settle:
            time.sleep(s.watch - s.settle)
        _, arrivals = self.bulk.received()
        self.client.mark(self.bulk.sockets[flow], Stage.P2D)
        moved = arrivals[arrivals[:, 0] >= promoted_ns, 0]
        return Trial(
            latency_ms=latency_ms(arrivals, promoted_ns, s.rate),
            first_ms=float(moved[0] - promoted_ns) / NS_PER_MS if len(moved) else None,
            retransmitted=later[flow].retransmitted - info[flow].retransmitted,
            rtos=later[flow].rtos - info[flow].rtos,
            bystander_rtos=sum(later[i].rtos - info[i].rtos for i in others),
            bystander_mbps=mbps,
            rescued=self._governor.counters()["rescues"] > rescues,
        )

    def _infos(self) -> list[TcpInfo]:
        return [tcp_info(s) for s in self.bulk.sockets[: self.settings.flows]]
