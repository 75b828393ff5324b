# SPDX-License-Identifier: Apache-2.0
"""Engine time per tick at 100, 1,000 and 10,000 connections.

The engine, the default policy and the slot table are the real ones, the table mmapped from the kernel's map. Every
connection carries one unfinished transfer; stages, deadlines and sizes are mixed, batches advance by a layer now and
then, and between ticks the counters move as the classifier would move them. Sockets are simulated: nothing is sent.
A tick includes everything that the daemon does in one: delivery, house-keeping at its period, levels, table.
"""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import numpy as np

from bench.common import Figure, parser, write
from mfsd.daemon.keys import KernelKeys
from mfsd.daemon.memory import keep_freed
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.engine.connections import Connections
from mfsd.engine.engine import Engine
from mfsd.engine.estimator import LinkEstimator
from mfsd.engine.probes import Probes
from mfsd.engine.settings import LimitsConfig, RescueConfig, TenantsConfig
from mfsd.engine.slots import FlowTable
from mfsd.engine.sockets import Event, Socket
from mfsd.ground.bands import Bands
from mfsd.ground.model import (
    BatchHint,
    CookieSelector,
    Endpoints,
    Maker,
    ProgressHint,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    TupleSelector,
)
from mfsd.host.sockets import TcpProgress
from mfsd.policy.registry import DEFAULT, make_policy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.device import Rescue, Rescued
    from mfsd.engine.estimator import Reading

COUNTS = (100, 1_000, 10_000)
TICKS = 400
PER_BATCH = 64
TICK_S = 0.010
LINK = 1.25e9
LIMITS = LimitsConfig(max_connections_per_user=16_384)
"""All connections are one user's."""


BUSY = TcpProgress(
    bytes_acked=0, unsent_plus_unacked=1 << 40, notsent=1 << 40, total_retrans=0, rto_us=200_000, last_ack_ms=0,
    last_sent_ms=0, busy_us=0, rwnd_limited_us=0, sndbuf_limited_us=0, app_limited=False, slow_start=False, queued=0,
    holes=False, window_full=False,
)  # fmt: skip
"""TCP's word on a socket that exists only here."""


class SimulatedSockets:
    """engine.sockets.Sockets that knows every cookie."""

    tells = True
    busy_us = 0
    """For how long they all have been limited by the network."""

    def events(self) -> list[Event]:
        return []

    def by_cookie(self, cookie: int) -> Socket | None:
        here, there = ip_address("10.0.0.1"), ip_address(f"10.1.{cookie >> 8 & 255}.{cookie & 255}")
        return Socket(cookie, Endpoints(here, 1024 + cookie % 60000, there, 6000), 0, 0, here=True)

    def end_of(self, cookie: int) -> None:
        del cookie

    def datagram(self, cookie: int) -> bool:
        raise NotImplementedError(cookie)

    def user(self, socket: Socket) -> int:
        return socket.uid

    def exact(self, selector: TupleSelector) -> Socket | None:
        raise NotImplementedError(selector)

    def sends(self, endpoints: Endpoints, uid: int) -> bool:
        raise NotImplementedError(endpoints, uid)

    def process(self, number: int, teller: int) -> int:
        del teller
        return number

    def descends(self, pid: int, ancestor: int) -> bool:
        return pid == ancestor

    def made_by(self, socket: Socket, maker: Maker) -> bool:
        del socket, maker
        return False

    def look(self, selectors: Sequence[Selector]) -> None:
        raise NotImplementedError(selectors)

    def progress(self, sockets: Sequence[tuple[int, Endpoints]]) -> dict[int, TcpProgress]:
        return {cookie: replace(BUSY, busy_us=self.busy_us) for cookie, _ in sockets}

    def watch(self, selector: Selector, uid: int, band: int, lanes: int, expires_ns: int) -> None:
        raise NotImplementedError(selector, uid, band, lanes, expires_ns)

    def unwatch(self, selector: Selector, uid: int) -> None:
        raise NotImplementedError(selector, uid)

    def lend(self, slots: Sequence[int]) -> None:
        del slots


class SimulatedDevice:
    """A link without a qdisc."""

    def __init__(self, bands: Bands) -> None:
        self.name = "sim"
        self.estimator = LinkEstimator(LINK, len(bands))
        self.enforced = self.floors = False

    def read(self) -> Reading | None:
        return None

    def rescue(self, orders: Sequence[Rescue]) -> None:
        del orders

    def rescued(self) -> list[Rescued]:
        return []

    def empty(self, band: int, lane: int) -> bool:
        del band, lane
        return True

    def guarantee(self, shares: Mapping[int, float]) -> None:
        del shares


class TimedProbes(Probes):
    """The engine's, and how long they take."""

    def __init__(self, connections: Connections) -> None:
        super().__init__(connections)
        self.took: list[float] = []
        """Milliseconds."""

    def run(self, now: float) -> None:
        """As the engine does, timed."""
        start = time.perf_counter()
        super().run(now)
        self.took.append((time.perf_counter() - start) * 1000)


def measure(n: int) -> tuple[float, float, float, float]:
    """Median and p99 of a tick with n connections, and of what of it learns the peers' rates, in ms."""
    rng = np.random.default_rng(n)
    with LibbpfLoader().open_classifier(16_384) as classifier:
        policy = make_policy(DEFAULT, 5)
        bands = Bands.build(5, default_after=policy.default_after, lanes=32)
        sockets = SimulatedSockets()
        connections = Connections(FlowTable(classifier.slots), KernelKeys(classifier), sockets, bands)
        engine = Engine(connections, policy, bands, [SimulatedDevice(bands)], LIMITS, RescueConfig(), TenantsConfig())
        session = engine.session("bench", 0.0)
        now = 100.0
        for i in range(n):
            if i % PER_BATCH == 0:
                ids = [f"r{j}" for j in range(i, min(i + PER_BATCH, n))]
                for r in ids:
                    engine.apply(session, RequestHint(r, now + float(rng.uniform(1, 20))), now)
                engine.apply(session, BatchHint(f"b{i // PER_BATCH}", ids, 64, 0, 0.02), now)
            stage = Stage(int(rng.integers(1, 4)))
            size = int(rng.integers(1 << 30, 1 << 34))
            hint = TransferHint(f"t{i}", f"r{i}", "", stage, int(rng.integers(0, 64)), size, CookieSelector(i + 1))
            engine.apply(session, hint, now)
        engine.tick(now)
        engine.probes = probes = TimedProbes(connections)
        took = []
        rows, slots = classifier.slots, np.array(sorted(connections.by_slot))
        for k in range(TICKS):
            now += TICK_S
            # What the kernel does between two ticks.
            sent = rng.integers(0, 100_000, n)
            for name in ("bytes", "sent", "acked"):
                rows[name][slots] += sent.astype(np.uint64)
            rows["packets"][slots] += 16  # so that a window is over in two ticks
            rows["last_ns"][slots] = int(now * 1e9)
            sockets.busy_us += round(TICK_S * 1e6)
            if k % 4 == 0:
                batch = int(rng.integers(0, (n + PER_BATCH - 1) // PER_BATCH))
                engine.apply(session, ProgressHint(f"b{batch}", k // 8), now)
            start = time.perf_counter()
            engine.tick(now)
            took.append((time.perf_counter() - start) * 1000)
        assert engine.books.transfers.n == n, "transfers must stay unfinished for the whole run"
        assert any(p.sightings for p in connections.peers.known(now)), "no window of the network's was seen"
        engine.end_session(session, now)
        learning = probes.took
        return (
            float(np.median(took)),
            float(np.percentile(took, 99)),
            float(np.median(learning)),
            float(np.percentile(learning, 99)),
        )


def main() -> None:
    """Run and write build/bench/tick.json."""
    parser(__doc__).parse_args()
    keep_freed()  # as the daemon does
    figures = []
    for n in COUNTS:
        median, p99, learning, learning_p99 = measure(n)
        if n == COUNTS[-1]:
            figures.append(Figure.against(f"tick_{n}_ms", median, "ms", target=1.0, want="at most"))
            figures.append(Figure.against(f"learning_{n}_ms", learning, "ms", target=0.2, want="at most"))
            figures.append(Figure(f"learning_{n}_p99_ms", learning_p99, "ms"))
        else:
            figures.append(Figure(f"tick_{n}_ms", median, "ms"))
        figures.append(Figure(f"tick_{n}_p99_ms", p99, "ms"))
    write("tick", figures)


if __name__ == "__main__":
    main()
