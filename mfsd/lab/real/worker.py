# SPDX-License-Identifier: Apache-2.0
"""The serving process of one host: a prefill rank, the decode host, or the store. Spoken to over pipes, see host.py.

-> its Order (a line of JSON)
<- {"what": "ready", "session": ..., "address": ...}     its engine, its memory
-> {"what": "go", "begin": ..., "peers": {...}}           monotonic time of the replay's beginning; everybody's memory
<- {"what": "progress", "done": n}                        decode host: requests whose KV is complete
<- {"what": "finished"}                                   rank: both have computed everything
-> {"what": "stop"}
<- {"what": "result", ...}

A rank does per step of a forward pass: wait for the step's cached KV, which it reads from the store (stage 1); sleep;
gloo's all-to-all with the other rank (stage 2); have the step's KV written to the decode host (stage 3).
"""

from __future__ import annotations

import collections
import json
import os
import queue
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from mfsd.client import Client, tuple_of
from mfsd.lab.host import fail, hear, say
from mfsd.lab.hosts.enter import die_with_parent, enter
from mfsd.lab.hosts.net import DEVICE
from mfsd.lab.models import RANKS, Model, Scaled
from mfsd.lab.rank import KV_LANES, P2D_LANES
from mfsd.lab.real.engine import PORTS, Engine
from mfsd.lab.real.memory import Memory, Watch
from mfsd.lab.workload import Job, next_batch
from mfsd.model import Stage
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

Role = Literal["prefill", "decode", "store"]
RENDEZVOUS: Final = 29_500
LOOK_S: Final = 0.002
IDLE_S: Final = 0.002
"""Between two questions whether anybody has work."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is to do. JSON-able."""

    role: Role
    index: int
    namespace: str
    parent: int
    addresses: dict[str, str]
    """Of all hosts by name."""
    targets: dict[str, str]
    """Of mfsd by host name; empty: no hints."""
    model: dict[str, Any]
    """As ``asdict`` of models.Model."""
    link_bits: float
    steps: int
    max_batch: int
    jobs: list[dict[str, Any]]
    """All requests, of both ranks, as ``asdict`` of Job."""

    @property
    def name(self) -> str:
        """Of its host."""
        return f"{self.role[0]}{self.index}"

    @property
    def scaled(self) -> Scaled:
        """Sizes and times."""
        return Scaled(Model(**self.model), Rate(self.link_bits / 8), RANKS, self.steps)

    def all_jobs(self) -> list[Job]:
        """Of both ranks, in order of arrival."""
        return [Job(**j) for j in self.jobs]


class Pool:
    """So many threads that do what is put, in order; a failure ends the process."""

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def put(self, task: Callable[[], None]) -> None:
        """Do it when a thread is free."""
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            self._tasks.get()()


@dataclass(slots=True)
class Log:
    """What a rank has measured; durations in seconds."""

    exchanges: list[float] = field(default_factory=list)
    """From this rank's call until it returns, which includes waiting for the other rank."""
    fetch_waits: list[float] = field(default_factory=list)
    computed: float = 0.0
    overslept: float = 0.0


class Rank:
    """One prefill rank."""

    def __init__(self, order: Order, engine: Engine, clients: dict[str, Client], peers: dict[str, Any]) -> None:
        import torch  # noqa: PLC0415 - an extra
        import torch.distributed as dist  # noqa: PLC0415 - an extra

        self.log = Log()
        self._torch: Any = torch
        self._dist: Any = dist
        self._order, self._engine, self._clients, self._peers = order, engine, clients, peers
        self._scaled = order.scaled
        jobs = order.all_jobs()
        self._jobs = [j for j in jobs if j.rank == order.index]
        self._memory = Memory.of(jobs, self._scaled)
        largest = max((self._scaled.kv(max(j.tokens, j.remote)) for j in jobs), default=1)
        source, self._source = engine.memory(largest)
        source[:] = 1
        _, self._sink = engine.memory(largest)
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._open = len(self._jobs)
        self._unread = {j.id: set(range(self._scaled.rounds)) for j in self._jobs if j.remote}
        """Request -> steps whose cached KV has not come; several are read at once, so they end in any order."""
        self._unwritten = {j.id: self._scaled.rounds for j in self._jobs}
        self._fetching, self._writing = Pool(KV_LANES), Pool(P2D_LANES)
        here = order.addresses
        other = here[f"p{1 - order.index}"]
        clients["own"].mark(tuple_of(other, 0), Stage.COLLECTIVE)
        self._to_decode = tuple_of(here["d0"], PORTS)
        self._from_store = tuple_of(here[order.name], 0, here["s0"], PORTS)

    def arrive(self, begin: float) -> None:
        """Replay the arrivals."""
        for job in self._jobs:
            time.sleep(max(begin + job.at - time.monotonic(), 0.0))
            left = begin + job.at + job.slo - time.monotonic()
            compute = self._scaled.compute(job.new) * self._scaled.rounds
            self._clients["own"].request(f"r{job.id}", ttft_left_s=left, compute_left_s=compute)
            if job.remote:
                self._clients["store"].request(f"r{job.id}", ttft_left_s=left, compute_left_s=compute)
                for step in range(self._scaled.rounds):
                    self._fetch(job, step)
            with self._changed:
                self._waiting.append(job)

    def _fetch(self, job: Job, step: int) -> None:
        """Stage 1: the store sends, so its daemon is told."""
        size, name, client = self._scaled.kv(job.remote), f"r{job.id}/{step}", self._clients["store"]
        session, remote = self._peers["s0"]["session"], self._peers["s0"]["address"]

        def read() -> None:
            self._engine.read(session, self._sink, remote, size)
            client.done(transfer=name)
            with self._changed:
                self._unread[job.id].remove(step)
                last = not self._unread[job.id]
                self._changed.notify_all()
            if last:
                client.done(request=f"r{job.id}")

        client.transfer(name, self._from_store, size, stage=Stage.KV_REUSE, request=f"r{job.id}", layer=step)
        self._fetching.put(read)

    def _hand_over(self, job: Job, step: int) -> None:
        """Stage 3."""
        size, name, client = self._memory.size[job.id], f"r{job.id}/{step}", self._clients["own"]
        session = self._peers["d0"]["session"]
        remote = self._peers["d0"]["address"] + self._memory.offset(job.id, step)

        def write() -> None:
            self._engine.write(session, self._source, remote, size)
            client.done(transfer=name)
            with self._changed:
                self._unwritten[job.id] -= 1
                last = not self._unwritten[job.id]
            if last:
                client.done(request=f"r{job.id}")

        client.transfer(name, self._to_decode, size, stage=Stage.P2D, request=f"r{job.id}", layer=step)
        self._writing.put(write)

    def run(self) -> None:
        """Forward passes until no rank has more work."""
        passes = 0
        while True:
            with self._changed:
                batch = next_batch(self._waiting, self._order.max_batch)
                mine = [sum(j.new for j in batch), self._open]
            both = self._torch.tensor(mine, dtype=self._torch.int64)
            self._dist.all_reduce(both)
            tokens, still_open = both.tolist()
            if tokens:
                self._pass(f"b{passes}", batch, tokens)
                passes += 1
                with self._changed:
                    self._open -= len(batch)
            elif still_open:
                time.sleep(IDLE_S)
            else:
                return

    def _pass(self, name: str, batch: list[Job], tokens: int) -> None:
        client, log, torch = self._clients["own"], self.log, self._torch
        compute, size = self._scaled.compute(tokens), self._scaled.exchange(tokens)
        if batch:
            client.batch(name, [f"r{j.id}" for j in batch], layers=self._scaled.rounds, layer_compute_s=compute)
        out, into = (torch.zeros(RANKS * size, dtype=torch.uint8) for _ in range(2))
        for step in range(self._scaled.rounds):
            if batch:
                client.layer(name, step)
            before = time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda step=step: not any(step in self._unread[j.id] for j in batch if j.remote))  # type: ignore[misc]
            began = time.monotonic()
            if any(j.remote for j in batch):
                log.fetch_waits.append(began - before)
            time.sleep(compute)
            ended = time.monotonic()
            log.computed += compute
            log.overslept += ended - began - compute
            self._dist.all_to_all_single(into, out)
            log.exchanges.append(time.monotonic() - ended)
            for job in batch:
                self._hand_over(job, step)
        if batch:
            client.layer(name, self._scaled.rounds - 1, compute_done=True)
            client.done(batch=name)


def prefill(order: Order, engine: Engine) -> None:
    """Play one rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    import torch  # noqa: PLC0415 - an extra, and it reads the variable above
    import torch.distributed as dist  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    master = f"tcp://{order.addresses['p0']}:{RENDEZVOUS}"
    dist.init_process_group("gloo", init_method=master, rank=order.index, world_size=RANKS)
    warm = torch.zeros(RANKS, dtype=torch.uint8)
    dist.all_to_all_single(warm.clone(), warm)  # connects, so that a mark finds the connection
    say(what="ready", session=engine.session, address=0)
    go = hear("go")
    targets = order.targets
    with (
        Client(f"rank{order.index}", targets.get(order.name, "")) as own,
        Client(f"fetch{order.index}", targets.get("s0", "")) as store,
    ):
        rank = Rank(order, engine, {"own": own, "store": store}, go["peers"])

        def work() -> None:
            time.sleep(max(go["begin"] - time.monotonic(), 0.0))
            rank.run()
            say(what="finished")

        for target in (lambda: rank.arrive(go["begin"]), work):
            threading.Thread(target=target, daemon=True).start()
        hear("stop")
        hints = [asdict(c.stats) for c in (own, store)]
    say(what="result", log=asdict(rank.log), hints=hints)


def decode(order: Order, engine: Engine) -> None:
    """Receive KV."""
    jobs = order.all_jobs()
    memory = Memory.of(jobs, order.scaled)
    data, address = engine.memory(memory.total)
    say(what="ready", session=engine.session, address=address)
    begin = hear("go")["begin"]
    watch, stop = Watch(memory, data), threading.Event()

    def look() -> None:
        coming = collections.deque(jobs)
        told = 0
        while not stop.wait(LOOK_S):
            now = time.monotonic()
            while coming and begin + coming[0].at <= now:
                watch.expect(coming.popleft().id)
            watch.look(now)
            if len(watch.done) > told:
                told = len(watch.done)
                say(what="progress", done=told)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    hear("stop")
    stop.set()
    thread.join()
    say(what="result", done=watch.done, slices=watch.slices)


def store(order: Order, engine: Engine) -> None:
    """Have cached KV."""
    size = max((order.scaled.kv(j.remote) for j in order.all_jobs() if j.remote), default=1)
    data, address = engine.memory(size)
    data[:] = 1
    say(what="ready", session=engine.session, address=address)
    hear("go")
    hear("stop")
    say(what="result")


def main() -> None:
    """Do what the order on stdin says."""
    threading.excepthook = fail
    # Libraries may print to descriptor 1, which is the way back to the runner.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = Order(**json.loads(sys.stdin.readline()))
    die_with_parent(order.parent)
    enter(order.namespace)
    engine = Engine(order.addresses[order.name])
    {"prefill": prefill, "decode": decode, "store": store}[order.role](order, engine)
    sys.stdout.flush()
    os._exit(0)  # the pools' threads are blocked and have nothing to lose


if __name__ == "__main__":
    main()
