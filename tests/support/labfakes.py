# SPDX-License-Identifier: Apache-2.0
"""Connections without a network for the emulator, and cells without an emulator for the reports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mfsd.ground.model import Stage
from mfsd.lab.arms import Faults
from mfsd.lab.requests import Request
from mfsd.lab.results.result import Health, Result, Served
from mfsd.lab.serving.conduits import Conduits, Sockets, receive_kv
from mfsd.lab.serving.driver import Played
from mfsd.lab.serving.forward import Instance, Log, replay
from mfsd.lab.serving.hinter import Hinter
from mfsd.lab.serving.wire import ARRIVAL
from mfsd.lab.settings import PRESETS, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.hosts.levels import LevelChange
    from mfsd.lab.settings import Conduit

STEPS = 4
TWO_RANKS = dataclasses.replace(PRESETS["demo"].settings, arm="ladder", steps=STEPS, max_batch=100)


def request(
    number: int, rank: int, *, at: float = 0.0, new: int = 100, held: dict[str, int] | None = None, slo: float = 1.0
) -> Request:
    held = held or {}
    return Request(number, at, 0, rank, 0, new + sum(held.values()), new, held, slo / 3, slo)


@dataclass
class Voice:
    """Remembers what the daemons would have been told, in order."""

    hosts: Sequence[str] = ("p0", "p1")
    said: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        self.said.append((host, method, args, kwargs))

    def of(self, method: str, host: str = "p0") -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for h, m, args, kwargs in self.said if (h, m) == (host, method)]


@dataclass
class FakeSender:
    """As much of wire.Sender as transports use: delivers at once, keeps what it carried."""

    conduit: Conduit
    deliver: Callable[[int, int], None]
    carried: list[tuple[int, int, int]] = field(default_factory=list)
    """Key, step, bytes."""
    queued: int = 0

    @property
    def cookie(self) -> int:
        return 1000 + self.conduit.number

    def put(self, key: int, step: int, size: int, written: Callable[[], None] | None = None) -> None:
        self.carried.append((key, step, size))
        self.queued += 1  # so that conduits are taken in turns
        asyncio.get_running_loop().call_soon(self.deliver, key, step)
        if written is not None:
            written()


class FakeEnds:
    """As much of wire.Ends, joined with those of other processes."""

    def __init__(self, settings: Settings, local: Sequence[str], all_of_them: list[FakeEnds]) -> None:
        self.local, self.deliver = local, {}  # type: ignore[var-annotated]  # as Ends.deliver
        self.senders = [FakeSender(c, self._to(c, all_of_them)) for c in settings.conduits() if c.src in local]
        all_of_them.append(self)

    def _to(self, conduit: Conduit, all_of_them: list[FakeEnds]) -> Callable[[int, int], None]:
        def deliver(key: int, step: int) -> None:
            (there,) = (e for e in all_of_them if conduit.dst in e.local)
            now = asyncio.get_running_loop().time()
            there.deliver[conduit.stage, conduit.instance](key, step, now)

        return deliver

    def of(self, stage: Stage, instance: int, src: str, dst: str) -> list[FakeSender]:
        wanted = (stage, instance, src, dst)
        return [
            s for s in self.senders if (s.conduit.stage, s.conduit.instance, s.conduit.src, s.conduit.dst) == wanted
        ]

    def group(self, stage: Stage, instance: int) -> list[FakeSender]:
        return [s for s in self.senders if (s.conduit.stage, s.conduit.instance) == (stage, instance)]


class Cluster:
    """An instance with fake connections: in one process, or with one per host."""

    def __init__(self, settings: Settings, work: list[Request]) -> None:
        self.settings, self.work = settings, work
        self.voice = Voice(settings.hosts)
        self.ends: list[FakeEnds] = []
        self.logs: list[Log] = []

    @property
    def log(self) -> Log:
        """Of all processes."""
        out = Log()
        for log in self.logs:
            out.add(log)
        return out

    def carried(self, stage: Stage, src: str = "", dst: str = "") -> list[tuple[int, int, int]]:
        """All frames of a stage, conduit by conduit."""
        chosen = [s for e in self.ends for s in e.senders if s.conduit.stage is stage]
        return [f for s in chosen if s.conduit.src == (src or s.conduit.src) and s.conduit.dst == (dst or s.conduit.dst)
                for f in s.carried]  # fmt: skip

    def run(self) -> None:
        asyncio.run(asyncio.wait_for(self._run(), 20))

    async def _run(self) -> None:
        s, begin = self.settings, asyncio.get_running_loop().time() + 0.05
        parts = [s.hosts] if s.transport == "conduits" else [[h] for h in s.hosts]
        boxes: dict[str, Callable[[dict[str, Any]], None]] = {}
        tasks = []
        for local in parts:
            log, voice = Log(), Voice([h for h in local if h in self.voice.hosts], self.voice.said)
            self.logs.append(log)
            ends: Any = FakeEnds(s, local, self.ends)
            hinter = Hinter(voice, s.scaled.rounds, Faults(), s.seed)
            receive_kv(s, self.work, ends, log)
            transport = Conduits(0, s, local, ends, hinter, log)
            if s.transport == "sockets":
                mail: Any = Mail(boxes)
                transport = Sockets(0, s, local, ends, hinter, log, management=mail, due=lambda r: begin + r.at + r.slo)
                boxes[local[0]] = self._box(transport)
            ranks = [h for h in local if h in s.ranks]
            if ranks:
                instances = {0: Instance(0, ranks[0], s, transport, hinter, log)}
                mine = [r for r in self.work if set(r.ranks(s)) & set(ranks)]
                tasks += [asyncio.create_task(instances[0].run())]
                tasks += [asyncio.create_task(replay(mine, begin, instances, log))]
        while len(self.log.done) < len(self.work):
            await asyncio.sleep(0.005)
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _box(self, transport: Sockets) -> Callable[[dict[str, Any]], None]:
        by_id = {r.id: r for r in self.work}

        def on_message(message: dict[str, Any]) -> None:
            if "fetch" in message:
                transport.asked(by_id[message["fetch"]])
            else:
                transport.begun(message["begin"], message["tokens"])

        return on_message


class Mail:
    """Management network."""

    def __init__(self, boxes: dict[str, Callable[[dict[str, Any]], None]]) -> None:
        self._boxes = boxes

    def send(self, to: str, message: dict[str, Any]) -> None:
        asyncio.get_running_loop().call_soon(self._boxes[to], message)


# --- cells ------------------------------------------------------------------------------------------------------------

HEALTHY = {"cpu": 0.3, "timer_late_p99_ms": 1.0, "overslept": 0.01, "link_peak": 0.99}


def result(arm: str, load: float, met: list[bool], *, regime: str = "one", seed: int = 0, **more: Any) -> Result:
    """A cell whose requests took 0.5 s or, where not met, 2 s, with an SLO of 1 s; one before does not count."""
    settings = dataclasses.replace(PRESETS[regime].settings, arm=arm, load=load, seed=seed, **more)
    requests = [
        Served(i, float(i), 0, 0, 0, 512, 512, {}, 1 / 3, 1.0, True, i + 0.1, i + 0.3, i + (0.5 if ok else 2.0))
        for i, ok in enumerate(met)
    ]
    uncounted = Served(-1, 0.0, 0, 0, 0, 512, 512, {}, 1.0, 1.0, counted=False)
    return Result(
        settings, 100.0, [uncounted, *requests], [(0.0, 0.010, 1), (1.0, 0.030, 1)], [0.5], {"p0 out": load}, {},
        {"rescues": 5} if arm != "none" else {}, {}, Health([], dict(HEALTHY)), {"net.ipv4.tcp_rto_min_us": "5000"},
    )  # fmt: skip


def demo_cell(work: Sequence[Request], done: dict[int, float], levels: Sequence[LevelChange]) -> tuple[Result, Played]:
    """A run in which each request took a pass of 0.1 s and its KV came in ten pieces until it was done."""
    begin, first = 1000.0, {c.src: c.number for c in reversed(TWO_RANKS.conduits()) if c.stage is Stage.P2D}
    log, pieces = Log(), defaultdict[int, list[tuple[float, int, int, int]]](list)
    for r in work:
        conduit = first[f"p{r.rank}"]
        log.conduit[r.id], log.handed[r.id] = conduit, begin + r.at + 0.02
        end = begin + done.get(r.id, r.at + 1.0)
        pieces[r.id] = [(end - 0.01 * k, conduit, r.id, 1_200_000) for k in range(10)]
    served = [
        Served(**vars(r), counted=True, began=r.at, computed=r.at + 0.1, done=done.get(r.id)) for r in work
    ]  # fmt: skip
    out = Result(
        TWO_RANKS, 40.0, served, [(r.at, 0.002, 125_000) for r in work], [0.0], {"p0 out": 0.5}, {}, {"rescues": 5}, {},
        Health([], dict(HEALTHY)), {"net.ipv4.tcp_rto_min_us": "5000"},
    )  # fmt: skip
    rows = np.array([row for each in pieces.values() for row in each], dtype=ARRIVAL)
    moved = [dataclasses.replace(change, at=change.at + begin) for change in levels]
    return out, Played(begin, log, rows, {}, 1.0, moved)
