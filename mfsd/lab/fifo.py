# SPDX-License-Identifier: Apache-2.0
"""The network experiment: urgent messages, and promotions, at a switch port that deferred connections fill.

Four hosts send to a fifth; the bottleneck is the switch's port to it, with ``QUEUE_S`` of buffer, as fast as each
sender's own link. Deferred connections (marked P2D), evenly from all senders, take what they can get; one sender has
urgent messages (marked as a collective) besides. Three ways of governing:

    bands     the daemons order what leaves their hosts; the port is one FIFO
    yield     the same, with network.yield
    classes   the same as bands, with three strict DSCP classes in the switch

Everything goes the daemon's way, as in the promotion experiment. Daemons have the precedence over workers that their
unit gives them: four hosts' packets are processed by the processors of one.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from mfsd.client import Client, Stage
from mfsd.ground.bands import Urgency
from mfsd.lab.bulk import Bulk, lanes_for
from mfsd.lab.hosts.governor import UNIT_NICE, Governor
from mfsd.lab.hosts.net import SWITCH, Fabric, LabError, run_id, tool
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.messages import Messages
from mfsd.lab.network import HIGH, LOW, port
from mfsd.lab.promotion import NS_PER_MS, POLICY, latency_ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from mfsd.ground.units import Rate

How = Literal["bands", "yield", "classes"]
SENDERS: Final = ("s0", "s1", "s2", "s3")
SINK: Final = "r"
SMALL: Final = 134_000
LARGE: Final = 2_000_000
WARM_S: Final = 3.0
STEADY_S: Final = 4.0
PAUSE_S: Final = 0.05
"""Between two messages."""
RECOVER_S: Final = 0.5
"""Between two promotions."""
WATCH_S: Final = 0.5
"""How long a promotion is waited for."""
_SPREAD: Final = "for q in /sys/class/net/*/queues/rx-*/rps_cpus; do echo ffff > $q 2>/dev/null || echo 3 > $q; done"
"""A connection's packets are received by one processor, as network cards see to, and don't overtake each other."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    how: How
    rate: Rate
    flows: int
    """Deferred connections, a multiple of four."""
    small: int
    large: int
    """Messages of SMALL and LARGE bytes while they are there."""
    promotions: int
    steady: float = STEADY_S
    """Seconds without messages, for Jain's index."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen in one run. Slowdowns: time of a message over that of the same message alone."""

    small: list[float]
    large: list[float]
    used: float
    """Deferred goodput over what the messages left of the port's."""
    jain: float
    """Jain's index of the deferred connections' goodput while there were no messages."""
    promotions_ms: list[float | None]
    """Until the promoted connection had 90 % of the port; None: not within WATCH_S."""
    told_ms: list[float]
    """Of it, until the daemon had put the connection into its new band."""
    rescues: int
    """Lanes that the daemons purged for the promotions."""


def run(settings: Settings) -> Outcome:
    """Build it, run it, remove it. Raises LabError."""
    with _cluster(settings) as (bulks, messages, clients, governors):
        return _Run(settings, bulks, messages, clients, governors).all()


@contextlib.contextmanager
def _cluster(s: Settings) -> Iterator[tuple[list[Bulk], Messages, list[Client], list[Governor]]]:
    tables: dict[str, dict[str, Any]] = {"policy": POLICY, "bands": {"lanes": lanes_for(s.flows // len(SENDERS) + 1)}}
    if s.how == "classes":
        tables["bands"]["dscp"] = {Urgency.URGENT: HIGH, Urgency.MIDDLE: LOW, Urgency.LAST: LOW}
    if s.how == "yield":
        tables["network"] = {"yield": "on", "replace": True}  # the lab's sockets choose cubic
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
        hosts = stack.enter_context(Fabric([*SENDERS, SINK])).hosts
        for namespace in (*(h.namespace for h in hosts.values()), f"mfsd-{run_id()}-{SWITCH}"):
            tool("ip", "netns", "exec", namespace, "sh", "-c", _SPREAD)
        port(SINK, s.rate, "classes" if s.how == "classes" else "fifo", 0)
        governors = [Governor(hosts[name], directory, s.rate, tables, nice=UNIT_NICE) for name in SENDERS]
        for governor in governors:
            stack.callback(governor.stop)
            governor.launch()
        for governor in governors:
            governor.ready()
        each = s.flows // len(SENDERS)
        bulks = [stack.enter_context(Bulk(hosts[n], hosts[SINK], each, 7000 + i)) for i, n in enumerate(SENDERS)]
        messages = stack.enter_context(Messages(hosts[SENDERS[0]], hosts[SINK]))
        clients = [stack.enter_context(Client("network", governor.target)) for governor in governors]
        clients[0].mark(messages.socket, Stage.COLLECTIVE)
        for client, bulk in zip(clients, bulks, strict=True):
            for sock in bulk.sockets:
                client.mark(sock, Stage.P2D)
            if not client.flush(5.0) or client.stats.rejected:
                raise LabError(f"a daemon did not take the marks: {client.stats}")
        yield bulks, messages, clients, governors


class _Run:
    def __init__(
        self,
        settings: Settings,
        bulks: list[Bulk],
        messages: Messages,
        clients: list[Client],
        governors: list[Governor],
    ) -> None:
        self.settings, self.bulks, self.messages, self.clients = settings, bulks, messages, clients
        self._rescuer = governors[1]
        """Of the connection that is promoted."""
        self._wire = settings.rate.bytes_per_s * EFFICIENCY

    def all(self) -> Outcome:
        s = self.settings
        for _ in range(3):
            self.messages.send(LARGE)
        alone = {size: float(np.median(self._times(size, n))) for size, n in ((SMALL, 10), (LARGE, 5))}
        # Bursts of token buckets let a small message through faster than the port is.
        alone = {size: max(took, size / self._wire) for size, took in alone.items()}
        for bulk in self.bulks:
            bulk.want(range(s.flows // len(SENDERS)))
        time.sleep(WARM_S)
        before = self._received()
        time.sleep(s.steady)
        grown = (self._received() - before).astype(np.float64)
        jain = float(grown.sum() ** 2 / (len(grown) * (grown**2).sum()))
        before, begin = self._received(), time.monotonic()
        small, large = self._times(SMALL, s.small), self._times(LARGE, s.large)
        taken, got = time.monotonic() - begin, (self._received() - before).sum()
        left = self._wire * taken - s.small * SMALL - s.large * LARGE
        rescues = self._rescuer.counters()["rescues"]
        promotions = [self._promote() for _ in range(s.promotions)]
        return Outcome(
            small=[t / alone[SMALL] for t in small],
            large=[t / alone[LARGE] for t in large],
            used=float(got / left),
            jain=jain,
            promotions_ms=[ms for ms, _ in promotions],
            told_ms=[told for _, told in promotions],
            rescues=self._rescuer.counters()["rescues"] - rescues,
        )

    def _times(self, size: int, count: int) -> list[float]:
        out = []
        for _ in range(count):
            out.append(self.messages.send(size))
            time.sleep(PAUSE_S)
        return out

    def _received(self) -> npt.NDArray[np.int64]:
        return np.concatenate([bulk.received()[0] for bulk in self.bulks])

    def _promote(self) -> tuple[float | None, float]:
        """The first connection of the second sender, up and down again: until it had the port, and its band."""
        bulk, client = self.bulks[1], self.clients[1]
        bulk.watch(0)
        time.sleep(0.05)
        begin = time.monotonic_ns()
        client.mark(bulk.sockets[0], Stage.COLLECTIVE)
        if not client.flush(WATCH_S):
            raise LabError("the daemon did not take a promotion")
        told = (time.monotonic_ns() - begin) / NS_PER_MS
        time.sleep(WATCH_S)
        _, arrivals = bulk.received()
        client.mark(bulk.sockets[0], Stage.P2D)
        bulk.watch(-1)
        time.sleep(RECOVER_S)
        found = latency_ms(arrivals, begin, self.settings.rate)
        return None if found is None or found > WATCH_S * 1e9 / NS_PER_MS else found, told
