# SPDX-License-Identifier: Apache-2.0
"""The forward pass: continuous batching over real connections, with a sleep where a GPU would compute.

An instance runs its ranks in lock step. Per step of a pass (a group of layers):

1. wait for the step's cached KV of every request in the batch (stage 1, fetched since the arrival);
2. compute: sleep;
3. every rank exchanges with every other one (stage 2);
4. the step's KV goes to the requests' decode hosts (stage 3).

A request has its first token when the last byte of its KV is at its decode host. What moves the bytes is a Transport:
conduits.py (plain TCP), real.py (gloo and Mooncake's transfer engine). An Instance stands for all ranks of an instance
where one process plays them, and for one of them where they are processes; the transport makes them agree.
"""

from __future__ import annotations

import asyncio
import collections
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mfsd.lab.hosts.alarm import Alarm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mfsd.lab.requests import Request
    from mfsd.lab.serving.hinter import Hinter
    from mfsd.lab.settings import Settings


@dataclass
class Log:
    """What a process has measured; times in monotonic seconds (one machine, one clock), durations in seconds."""

    began: dict[int, float] = field(default_factory=dict)
    """Request -> beginning of its forward pass."""
    computed: dict[int, float] = field(default_factory=dict)
    """Request -> end of it."""
    handed: dict[int, float] = field(default_factory=dict)
    """Request -> when the first of its KV was handed to the transport."""
    conduit: dict[int, int] = field(default_factory=dict)
    """Request -> number of the (first) conduit that takes its KV to the decode host."""
    done: dict[int, float] = field(default_factory=dict)
    """Request -> first token."""
    exchanges: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    """Collective -> from when the last rank has begun, until the last has everything; bytes per pair."""
    fetch_waits: list[float] = field(default_factory=list)
    """Time a step stood still because cached KV had not come."""
    overslept: float = 0.0
    """Seconds by which emulated computing took longer than meant: the machine's fault."""
    passes: float = 0.0
    """Seconds of forward passes."""
    late: list[float] = field(default_factory=list)
    """Seconds by which arrivals were served late: the event loop was busy."""

    def add(self, other: Log) -> None:
        """What another process has measured of the same run."""
        for name in ("began", "computed", "handed", "conduit", "done"):
            getattr(self, name).update(getattr(other, name))
        for name in ("fetch_waits", "late"):
            getattr(self, name).extend(getattr(other, name))
        for key, (began, ended, size) in other.exchanges.items():
            mine = self.exchanges.get(key, (began, ended, size))
            self.exchanges[key] = max(mine[0], began), max(mine[1], ended), size
        self.overslept += other.overslept
        self.passes += other.passes


class Inbox:
    """Requests that wait for a pass of one scheduler."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._waiting: collections.deque[Request] = collections.deque()
        self._stirred = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request) -> None:
        """One more."""
        self._waiting.append(request)
        self.stir()

    def stir(self) -> None:
        """Something has happened that whoever waits may wait for."""
        self._stirred.set()

    async def until(self, what: Callable[[], Any]) -> None:
        """Wait until something is true, which it may have become whenever there was a stir."""
        while not what():
            self._stirred.clear()
            await self._stirred.wait()

    def take(self) -> list[Request]:
        """What a pass computes: first come, first served, up to ``max_batch`` new tokens; one may exceed it."""
        batch: list[Request] = []
        tokens = 0
        while self._waiting and (not batch or tokens + self._waiting[0].new <= self._max_batch):
            batch.append(self._waiting.popleft())
            tokens += batch[-1].new
        return batch


class Transport(Protocol):
    """How the bytes of an instance move, as far as this process plays its ranks."""

    async def agree(self, inbox: Inbox) -> tuple[list[Request], int]:
        """Wait until a rank has requests; returns those taken here (maybe none), and the new tokens of all ranks."""
        ...

    def fetch(self, request: Request) -> None:
        """Have its cached KV sent here, step by step (stage 1)."""
        ...

    async def fetched(self, request: Request, step: int) -> None:
        """Wait for a step's cached KV."""
        ...

    async def exchange(self, size: int) -> float:
        """``size`` bytes from each rank to each other (stage 2); returns when the last one was here."""
        ...

    def hand_over(self, request: Request, step: int) -> None:
        """Send a step's KV to the decode host (stage 3)."""
        ...


class Instance:
    """One prefill instance, or one rank of it. To be made inside a running event loop. ``name`` is part of hints."""

    def __init__(
        self, index: int, name: str, settings: Settings, transport: Transport, hinter: Hinter, log: Log
    ) -> None:
        self._index, self._name, self._settings = index, name, settings
        self._transport, self._hinter, self._log = transport, hinter, log
        self._scaled = settings.scaled
        self._inbox = Inbox(settings.max_batch)
        self._passes = self._exchanges = 0

    def arrive(self, request: Request, left: float) -> None:
        """A request has come, due in ``left`` seconds."""
        compute = self._scaled.compute(request.new) * self._scaled.rounds
        self._hinter.request(request.senders(self._settings), request, left, compute)
        self._transport.fetch(request)
        self._inbox.put(request)

    async def run(self) -> None:
        """Serve until cancelled."""
        alarm = Alarm()
        try:
            while True:
                batch, tokens = await self._transport.agree(self._inbox)
                await self._pass(batch, tokens, alarm)
        finally:
            alarm.close()

    async def _pass(self, batch: list[Request], tokens: int, alarm: Alarm) -> None:
        """One pass of all ranks over ``tokens`` new tokens, of which the ``batch`` is what is played here."""
        name, log, hinter, transport = f"{self._name}b{self._passes}", self._log, self._hinter, self._transport
        self._passes += 1
        compute, size = self._scaled.compute(tokens), self._scaled.exchange(tokens)
        began = time.monotonic()
        log.began |= _at(began, batch)
        hinter.batch(self._hosts(batch), name, compute)
        for step in range(self._scaled.rounds):
            hinter.layer(name, step)
            await self._cached(batch, step)
            log.overslept += await alarm.sleep(compute)
            await self._all_to_all(size)
            if not step:
                log.handed |= _at(time.monotonic(), batch)
            for request in batch:
                transport.hand_over(request, step)
        hinter.computed(name)
        ended = time.monotonic()
        log.passes += ended - began
        log.computed |= _at(ended, batch)

    def _hosts(self, batch: Iterable[Request]) -> dict[str, list[Request]]:
        """Hosts that bytes of the batch will leave, with its requests there."""
        out: dict[str, list[Request]] = {}
        for request in batch:
            for host in request.senders(self._settings):
                out.setdefault(host, []).append(request)
        return out

    async def _cached(self, batch: Iterable[Request], step: int) -> None:
        remote = [r for r in batch if r.held]
        before = time.monotonic()
        for request in remote:
            await self._transport.fetched(request, step)
        if remote:
            self._log.fetch_waits.append(time.monotonic() - before)

    async def _all_to_all(self, size: int) -> None:
        began = time.monotonic()
        ended = await self._transport.exchange(size)
        self._log.exchanges[f"{self._index}/{self._exchanges}"] = began, ended, size
        self._exchanges += 1


async def replay(work: Iterable[Request], begin: float, instances: Mapping[int, Instance], log: Log) -> None:
    """Let requests arrive at their times after ``begin``."""
    for request in work:
        at = begin + request.at
        await asyncio.sleep(max(at - time.monotonic(), 0.0))
        now = time.monotonic()
        log.late.append(now - at)
        instances[request.instance].arrive(request, at + request.slo - now)


def _at(time_s: float, batch: Iterable[Request]) -> dict[int, float]:
    return {r.id: time_s for r in batch}
