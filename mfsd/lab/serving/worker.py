# SPDX-License-Identifier: Apache-2.0
"""The serving process of one host: a prefill rank, a decode host or a store.

Its runner (processes.py) and it say:

-> its Part
<- what its peers must know, since it listens
-> the same of all peers, since everybody listens
<- socket cookies of its P2D conduits, since it is connected
-> the monotonic time of the replay's beginning
<- so many requests more have been done, again and again
-> stop
<- Played, as far as this process has seen it
"""

from __future__ import annotations

import asyncio
import gc
import os
import traceback
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil

from mfsd.ground.model import Stage
from mfsd.lab.arms import arm_of
from mfsd.lab.hosts.child import parent
from mfsd.lab.hosts.enter import enter
from mfsd.lab.serving.conduits import Sockets, cross_traffic, receive_kv
from mfsd.lab.serving.driver import Part, Played
from mfsd.lab.serving.forward import Instance, Log, Transport, replay
from mfsd.lab.serving.hinter import Hinter
from mfsd.lab.serving.management import Management
from mfsd.lab.serving.real import RealSide
from mfsd.lab.serving.teller import Clients
from mfsd.lab.serving.wire import ARRIVAL, Ends

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROGRESS_S: Final = 0.05


class TcpSide:
    """One host's side of plain TCP."""

    def __init__(self, part: Part, log: Log) -> None:
        self._part, self._log = part, log
        self._requests = {r.id: r for r in part.work}
        self._transports: list[Sockets] = []
        self._ends = Ends(part.settings.conduits(), part.hosts, [part.host])
        receive_kv(part.settings, part.work, self._ends, log)
        self._management = Management(part.directory, part.host, self._on_message)
        self.arrivals = self._ends.arrivals
        """Rows of wire.ARRIVAL."""
        self.speaks_for = [part.host]
        """Hosts whose daemons are told of what this process moves."""
        self.cookies: dict[int, int] = {}
        """Of P2D conduits, where they are known."""

    def _on_message(self, message: dict[str, Any]) -> None:
        transport = self._transports[message["instance"]]
        if "fetch" in message:
            transport.asked(self._requests[message["fetch"]])
        else:
            transport.begun(message["begin"], message["tokens"])

    async def open(self) -> dict[str, Any]:
        """Begin to listen; returns what peers must know."""
        self._ends.listen()
        await self._management.listen()
        return {}

    async def connect(self, peers: dict[str, dict[str, Any]]) -> None:
        """Connect to the peers, all of which listen."""
        await self._management.join(h for h in peers if h != self._part.host)
        self._ends.connect()
        self.cookies = {s.conduit.number: s.cookie.cookie for s in self._ends.senders if s.conduit.stage is Stage.P2D}

    def transports(self, hinter: Hinter) -> list[Transport]:
        """For each instance."""
        p = self._part
        self._transports += [
            Sockets(index, p.settings, [p.host], self._ends, hinter, self._log, management=self._management, due=p.due)
            for index in range(p.settings.instances)
        ]
        return list(self._transports)

    async def look(self) -> None:
        """Do what has to be done all the time."""
        await cross_traffic(self._part.settings, self._ends)


def _hear(pipe: Connection) -> Any:
    """What the runner says next; without a runner there is nothing to do."""
    try:
        return pipe.recv()
    except EOFError:
        os._exit(1)


async def _progress(pipe: Connection, log: Log) -> None:
    told = 0
    while True:
        await asyncio.sleep(PROGRESS_S)
        if len(log.done) > told:
            pipe.send(len(log.done) - told)
            told = len(log.done)


def _fail(_loop: object, context: dict[str, Any]) -> None:
    """Something has failed outside of any task: so has the experiment."""
    traceback.print_exception(context.get("exception") or RuntimeError(context["message"]))
    os._exit(1)


async def play(part: Part, pipe: Connection) -> None:
    """Do what the runner says until it says stop. What blocks before the replay begins keeps nobody waiting."""
    asyncio.get_running_loop().set_exception_handler(_fail)
    s, log = part.settings, Log()
    side = RealSide(part, log) if s.transport == "real" else TcpSide(part, log)
    pipe.send(await side.open())
    await side.connect(_hear(pipe))
    targets = {h: part.targets[h] for h in side.speaks_for if h in part.targets}
    with Clients(part.host, targets) as voice:
        hinter = Hinter(voice, s.scaled.rounds, arm_of(s.arm).faults, s.seed)
        instances = {
            i: Instance(i, f"{part.host}i{i}", s, transport, hinter, log)
            for i, transport in enumerate(side.transports(hinter))
        }
        voice.settle()
        pipe.send(side.cookies)
        part.begin = _hear(pipe)
        gc.collect()
        gc.disable()  # a collection in the middle would look like a late machine
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(side.look())
            tasks.create_task(_progress(pipe, log))
            if part.host in s.ranks:
                for instance in instances.values():
                    tasks.create_task(instance.run())
                mine = [r for r in part.work if part.host in r.ranks(s)]
                tasks.create_task(replay(mine, part.begin, instances, log))
            await asyncio.to_thread(_hear, pipe)
            cpu = sum(psutil.Process().cpu_times()[:2])
            pipe.send(Played(part.begin, log, np.array(side.arrivals, dtype=ARRIVAL), voice.stats(), cpu))
            os._exit(0)  # libraries' threads are blocked and have nothing to lose


def main() -> None:
    """Do what the runner says."""
    pipe = parent()
    part: Part = _hear(pipe)
    enter(part.hosts[part.host].namespace)
    try:
        asyncio.run(play(part, pipe))
    except BaseException:  # noqa: BLE001 - nothing may keep it from ending
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
