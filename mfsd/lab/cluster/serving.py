# SPDX-License-Identifier: Apache-2.0
"""The emulated serving system: continuous batching over real connections, with a sleep where a GPU would compute.

An instance runs its ranks in lock step. Per step of a forward pass (a group of layers):

1. wait for the step's cached KV of every request in the batch (stage 1, fetched from the stores since the arrival);
2. compute: sleep;
3. every rank exchanges with every other one (stage 2);
4. the step's KV goes to the requests' decode hosts (stage 3).

A request has its first token when the last byte of its KV is at its decode host.
"""

from __future__ import annotations

import asyncio
import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mfsd.lab.rank import KV_LANES, P2D_LANES
from mfsd.lab.workload import next_batch
from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.lab.cluster.hinter import Hinter
    from mfsd.lab.cluster.jobs import Job
    from mfsd.lab.cluster.lanes import Lane, Plugboard
    from mfsd.lab.cluster.regimes import Cluster
    from mfsd.lab.hosts.net import Host


@dataclass(slots=True)
class Log:
    """What was measured; times in seconds since the beginning, durations in seconds."""

    began: dict[int, float] = field(default_factory=dict)
    """Request -> beginning of its forward pass."""
    computed: dict[int, float] = field(default_factory=dict)
    """Request -> end of it."""
    done: dict[int, float] = field(default_factory=dict)
    """Request -> first token."""
    collectives: list[tuple[float, float, int]] = field(default_factory=list)
    """(begin, duration until the last rank has everything, bytes per pair)."""
    fetch_waits: list[float] = field(default_factory=list)
    """Time a step stood still because cached KV had not come."""
    overslept: float = 0.0
    """Seconds by which emulated computing took longer than meant: the machine's fault."""
    passes: float = 0.0
    """Seconds of forward passes."""
    late: list[float] = field(default_factory=list)
    """Seconds by which arrivals were served late: the event loop was busy."""


class Instance:
    """One prefill instance: a rank on every prefill host."""

    def __init__(
        self, index: int, cluster: Cluster, hosts: Mapping[str, Host], board: Plugboard, hinter: Hinter, log: Log
    ) -> None:
        self._index, self._cluster, self._hinter, self._log = index, cluster, hinter, log
        self._scaled = cluster.scaled
        self._loop = asyncio.get_running_loop()
        ranks = [f"p{i}" for i in range(cluster.prefill)]
        self._exchange = [board.connect(hosts[a], hosts[b], Stage.COLLECTIVE) for a in ranks for b in ranks if a != b]
        for lane in self._exchange:
            hinter.collective(lane)
        self._p2d = {
            (i, d): [board.connect(hosts[rank], hosts[f"d{d}"], Stage.P2D) for _ in range(P2D_LANES)]
            for i, rank in enumerate(ranks)
            for d in range(cluster.decode)
        }
        self._kv = {
            (s, i): [board.connect(hosts[f"s{s}"], hosts[rank], Stage.KV_REUSE) for _ in range(KV_LANES)]
            for s in range(cluster.stores)
            for i, rank in enumerate(ranks)
        }
        self._waiting: collections.deque[Job] = collections.deque()
        self._arrived = asyncio.Event()
        self._fetched: dict[int, list[asyncio.Event]] = {}
        """Request -> per step: its cached KV is here."""
        self._passes = 0
        self.begin = 0.0

    # --- what the outside does ----------------------------------------------------------------------------------------

    def arrive(self, job: Job) -> None:
        """A request has come."""
        hosts = {f"p{r}" for r in self._ranks(job)} | {f"s{s}" for s, n in enumerate(job.cached) if n}
        self._hinter.request(hosts, job, self._scaled.compute(job.new) * self._scaled.rounds)
        self._fetch(job)
        self._waiting.append(job)
        self._arrived.set()

    def _ranks(self, job: Job) -> range:
        return range(self._cluster.prefill) if self._scaled.model.dense else range(job.rank, job.rank + 1)

    def _fetch(self, job: Job) -> None:
        """Have the stores send its cached KV, step by step."""
        rounds, ranks = self._scaled.rounds, self._ranks(job)
        if not job.remote:
            return
        here = self._fetched[job.id] = [asyncio.Event() for _ in range(rounds)]
        parts = [
            (store, min(self._kv[store, rank], key=lambda lane: lane.queued), tokens)
            for store, tokens in enumerate(job.cached)
            if tokens
            for rank in ranks
        ]
        missing = [len(parts)] * rounds
        unwritten = collections.Counter(store for store, *_ in parts for _ in range(rounds))

        for step in range(rounds):

            def arrived(_at: float, step: int = step) -> None:
                missing[step] -= 1
                if not missing[step]:
                    here[step].set()

            for store, lane, tokens in parts:

                def written(store: int = store) -> None:
                    unwritten[store] -= 1
                    if not unwritten[store]:
                        self._hinter.sent(f"s{store}", job)

                size = max(self._scaled.kv(tokens) // len(ranks), 1)
                self._hinter.send(lane, job, step, size)
                lane.put(size, arrived, written)

    # --- the forward passes -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._pass(next_batch(self._waiting, self._cluster.max_batch))

    async def _pass(self, batch: list[Job]) -> None:
        name, log, rounds = f"i{self._index}b{self._passes}", self._log, self._scaled.rounds
        self._passes += 1
        tokens = sum(j.new for j in batch)
        compute, size = self._scaled.compute(tokens), self._scaled.exchange(tokens)
        hosts: dict[str, list[Job]] = {}
        for job in batch:
            for host in [f"p{r}" for r in self._ranks(job)] + [f"s{s}" for s, n in enumerate(job.cached) if n]:
                hosts.setdefault(host, []).append(job)
        now = self._loop.time() - self.begin
        log.began |= dict.fromkeys((j.id for j in batch), now)
        self._hinter.batch(hosts, name, compute)
        lanes = {j.id: [min(self._p2d[r, j.decode], key=lambda lane: lane.queued) for r in self._ranks(j)]
                 for j in batch}  # fmt: skip
        missing = {j.id: rounds * len(lanes[j.id]) for j in batch}
        for step in range(rounds):
            self._hinter.layer(name, step)
            await self._cached(batch, step)
            await self._sleep(compute)
            await self._all_to_all(size)
            for job in batch:
                self._hand_over(job, lanes[job.id], step, missing)
        self._hinter.computed(name)
        began, now = now, self._loop.time() - self.begin
        log.passes += now - began
        log.computed |= dict.fromkeys((j.id for j in batch), now)

    async def _cached(self, batch: list[Job], step: int) -> None:
        before = self._loop.time()
        waited = False
        for job in batch:
            if job.remote:
                waited = True
                await self._fetched[job.id][step].wait()
        if waited:
            self._log.fetch_waits.append(self._loop.time() - before)

    async def _sleep(self, seconds: float) -> None:
        before = self._loop.time()
        # The loop rounds timers up to whole milliseconds (epoll_wait), so the last one is spent looking at the clock.
        await asyncio.sleep(max(seconds - 0.001, 0.0))
        while self._loop.time() < before + seconds:  # noqa: ASYNC110 - nothing but time will end it
            await asyncio.sleep(0)
        self._log.overslept += self._loop.time() - before - seconds

    async def _all_to_all(self, size: int) -> None:
        began, last, left = self._loop.time(), 0.0, len(self._exchange)
        if not left:
            return
        over = self._loop.create_future()

        def arrived(at: float) -> None:
            nonlocal left, last
            left -= 1
            last = max(last, at)
            if not left and not over.done():
                over.set_result(None)

        for lane in self._exchange:
            lane.put(size, arrived)  # marked once as collective: no hint per message is needed
        await over
        self._log.collectives.append((began - self.begin, last - began, size))

    def _hand_over(self, job: Job, lanes: list[Lane], step: int, missing: dict[int, int]) -> None:
        """Send a step's KV to the decode host."""
        last = step == self._scaled.rounds - 1

        def arrived(at: float) -> None:
            missing[job.id] -= 1
            if not missing[job.id]:
                self._log.done[job.id] = at - self.begin

        for lane in lanes:

            def written(lane: Lane = lane) -> None:
                # Bytes retire transfers by themselves; only the last one of a request is worth a message.
                if last:
                    self._hinter.sent(lane.src.name, job)

            size = max(self._scaled.kv(job.tokens) // len(lanes), 1)
            self._hinter.send(lane, job, step, size)
            lane.put(size, arrived, written)
